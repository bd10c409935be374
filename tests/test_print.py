"""The book as one page: everything is there, and every link inside it leads somewhere."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from bs4 import BeautifulSoup

from tests.support import ROOT
from tools.print_book import PRINTED, join
from tools.toc import toc_pages

NAMES = [path.relative_to(ROOT).with_suffix("").as_posix() for path in toc_pages(ROOT)]


@pytest.fixture(scope="module")
def printed(site: Path) -> BeautifulSoup:
    return join(site, NAMES)


def test_every_page_of_the_book_is_on_it_in_order(printed: BeautifulSoup) -> None:
    assert [tag["id"] for tag in printed.select("section.printed-page")] == [
        f"page-{name.rpartition('/')[2]}" for name in NAMES
    ]
    assert all(section.select_one("h1") for section in printed.select("section.printed-page"))


def test_no_two_places_have_the_same_name(printed: BeautifulSoup) -> None:
    counts = Counter(tag["id"] for tag in printed.find_all(id=True))
    assert [name for name, count in counts.items() if count > 1] == []


def test_links_lead_to_places_on_the_page(printed: BeautifulSoup) -> None:
    places = {tag["id"] for tag in printed.find_all(id=True)}
    links = [str(tag["href"]) for tag in printed.select("a[href^='#']")]
    assert len(links) > 100
    assert [link for link in links if link != "#" and link[1:] not in places] == []


def test_files_are_where_the_page_looks_for_them(printed: BeautifulSoup, site: Path) -> None:
    folder = (site / PRINTED).parent
    files = [str(tag["src"]) for tag in printed.select("img[src], script[src]")]
    files += [str(tag["href"]) for tag in printed.select("link[href]")]
    local = [file.partition("?")[0] for file in files if not file.startswith("data:")]
    assert len(local) > 50
    assert [file for file in local if not (folder / file).is_file()] == []


def test_what_was_folded_is_open_and_nothing_needs_a_script(printed: BeautifulSoup) -> None:
    assert all(tag.has_attr("open") for tag in printed.select("details"))
    assert all("mathjax" in str(tag).lower() for tag in printed.select("script"))
