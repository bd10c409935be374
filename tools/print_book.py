"""Join the built pages into one that can be printed, and print it to a PDF with Chromium or Chrome.

Usage: python -m tools.print_book _build/html

Writes _build/html/book/print.html, and _build/html/book.pdf. Folded solutions and folded code are open, views that need
a script show the picture and the table that they have without it.
"""

from __future__ import annotations

import posixpath
import shutil
import sys
from pathlib import Path
from urllib.parse import urldefrag

from bs4 import BeautifulSoup, Tag

from tools.toc import toc_pages

ROOT = Path(__file__).resolve().parent.parent
PRINTED = "book/print.html"
LEFT_OUT = {"headerlink", "prev-next-footer", "sd-stretched-link"}
"""Classes of what only a screen can use, besides scripts and buttons."""
STYLE = """
body { margin: 0 auto; max-width: 50rem; padding: 1rem; }
.printed-page + .printed-page { break-before: page; }
img, tr, .mha-explorer { break-inside: avoid; }
h1, h2, h3 { break-after: avoid; }
img { max-height: 22rem; width: auto; }
pre { white-space: pre-wrap; }
"""
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]


def join(site: Path, names: list[str]) -> BeautifulSoup:
    """Make one page of the articles of the pages ``names``, such as ``book/index``, in this order."""
    soups = {name: read(site / f"{name}.html") for name in names}
    articles = {name: article_of(soup) for name, soup in soups.items()}
    renamed = rename(articles)
    for name, article in articles.items():
        relink(article, name, renamed)

    page = BeautifulSoup("<!DOCTYPE html><html lang='en' data-theme='light'></html>", "html.parser")
    head, body = page.new_tag("head"), page.new_tag("body")
    (html,) = page.find_all("html")
    html.extend([head, body])
    first = soups[names[0]]
    head.extend(first.select("meta[charset], title, link[rel=stylesheet]"))
    head.extend(script for script in first.select("script") if "mathjax" in str(script).lower())
    style = page.new_tag("style")
    style.string = STYLE
    head.append(style)
    for name, article in articles.items():
        section = page.new_tag("section", id=place_of(name), attrs={"class": "printed-page"})
        section.extend(list(article.children))
        body.append(section)
    return page


def read(path: Path) -> BeautifulSoup:
    """Parse a page."""
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


def article_of(soup: BeautifulSoup) -> Tag:
    """The text of a page, unfolded, without what only a screen can use."""
    (article,) = soup.find_all("article", class_="bd-article")
    for useless in article.find_all(is_useless):
        useless.decompose()
    for folded in article.find_all("details"):
        folded["open"] = ""
    return article


def is_useless(tag: Tag) -> bool:
    """Whether a tag does nothing on paper."""
    return tag.name in ("script", "button") or not LEFT_OUT.isdisjoint(
        tag.get_attribute_list("class")
    )


def place_of(name: str) -> str:
    """The id of a page's section."""
    return f"page-{posixpath.basename(name)}"


def rename(articles: dict[str, Tag]) -> dict[tuple[str, str], str]:
    """Give ids that are taken another name; return all, by page and old id."""
    renamed: dict[tuple[str, str], str] = {}
    taken: set[str] = set()
    for name, article in articles.items():
        for number, tag in enumerate(article.find_all(id=True)):
            old = str(tag["id"])
            new = f"{place_of(name)}-{number}-{old}" if old in taken else old
            taken.add(new)
            renamed.setdefault((name, old), new)
            tag["id"] = new
    return renamed


def relink(article: Tag, name: str, renamed: dict[tuple[str, str], str]) -> None:
    """Point links between the pages at places inside the one page, and files at where they lie from there."""
    pages = {page for page, _ in renamed}
    for attribute in ("href", "src"):
        for tag in article.find_all(None, {attribute: True}):
            address = str(tag[attribute])
            if address.startswith(("http:", "https:", "data:", "mailto:")):
                continue
            file, fragment = urldefrag(address)
            folder = posixpath.dirname(name)
            target = posixpath.normpath(posixpath.join(folder, file)) if file else f"{name}.html"
            page = target.removesuffix(".html")
            if (page, fragment) in renamed:
                tag[attribute] = f"#{renamed[page, fragment]}"
            elif page in pages:
                tag[attribute] = f"#{place_of(page)}"
            else:
                moved = posixpath.relpath(target, posixpath.dirname(PRINTED))
                tag[attribute] = f"{moved}#{fragment}" if fragment else moved


def to_pdf(page: Path, pdf: Path) -> None:
    """Print a page on A4."""
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program, channel=None if program else "chrome", args=FLAGS
        )
        sheet = browser.new_page()
        sheet.goto(page.resolve().as_uri())
        sheet.evaluate("window.MathJax?.startup?.promise")
        margin = {"top": "18mm", "bottom": "18mm", "left": "16mm", "right": "16mm"}
        sheet.pdf(path=pdf, format="A4", scale=0.7, margin=margin, print_background=True)  # type: ignore[arg-type]
        browser.close()


def main(site: Path) -> None:
    """Write the page and the PDF."""
    names = [str(path.relative_to(ROOT).with_suffix("").as_posix()) for path in toc_pages(ROOT)]
    page = site / PRINTED
    page.write_text(str(join(site, names)), encoding="utf-8")
    to_pdf(page, site / "book.pdf")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
