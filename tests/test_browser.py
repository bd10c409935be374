"""The built pages in a real browser, opened from the disk as a reader would."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Error, Page, sync_playwright

from mha_lib import explore_attention, explore_split
from tests.support import ROOT
from tools.toc import toc_pages

PAGES = [page.stem for page in toc_pages(ROOT)]
PHONE = {"width": 360, "height": 780}
DESKTOP = {"width": 1280, "height": 900}
GRAVE = ("serious", "critical")
ALL_PAGES = os.environ.get("MHA_PAGES") == "all"
EXAMINED = PAGES if ALL_PAGES else ["index", "01_query_key_value", "08_induction", "claims", "api"]
"""The pages that axe goes through, which takes seconds for each; ``make test-all`` takes every page."""
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]

EXPLORED = explore_attention(torch.eye(2), ["the", "cat"]).html
SPLIT = explore_split(2, num_heads=2, head_dim=2).html

each_page = pytest.mark.parametrize("name", PAGES)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium or Chrome of this machine."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as playwright:
        try:
            started = playwright.chromium.launch(
                executable_path=program, channel=None if program else "chrome", args=FLAGS
            )
        except Error as error:
            if os.environ.get("CI") == "true":
                raise
            pytest.skip(f"needs Chromium or Chrome: {error.message.splitlines()[0]}")
        yield started
        started.close()


class Reader:
    """A page in the browser, and what it complained about or asked other machines for."""

    def __init__(
        self, browser: Browser, site: Path, size: dict[str, int], theme: str = "light"
    ) -> None:
        self.site = site
        self.page: Page = browser.new_page(viewport=size, color_scheme=theme)  # type: ignore[arg-type]
        self.complaints: list[str] = []
        self.page.on("console", lambda message: self.hear(message.type, message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.watch(request.url))

    def hear(self, kind: str, text: str) -> None:
        """Remember errors."""
        if kind == "error":
            self.complaints.append(text)

    def watch(self, url: str) -> None:
        """Remember what does not come from the disk."""
        if not url.startswith(("file:", "data:", "blob:")):
            self.complaints.append(f"asked for {url}")

    def open(self, address: str) -> Page:
        """Open a page of the book and wait until its formulas are set."""
        self.page.goto(f"{self.site.as_uri()}/{address}")
        self.page.evaluate("window.MathJax?.startup?.promise")
        return self.page


@pytest.fixture
def desktop(browser: Browser, site: Path) -> Iterator[Reader]:
    reader = Reader(browser, site, DESKTOP)
    yield reader
    reader.page.close()


@pytest.fixture
def phone(browser: Browser, site: Path) -> Iterator[Reader]:
    reader = Reader(browser, site, PHONE, "dark")
    yield reader
    reader.page.close()


def barriers(page: Page) -> list[str]:
    """What axe finds that keeps somebody out."""
    found: list[dict[str, Any]] = (
        Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
    )
    return [
        f"{rule['id']}: {node['html'][:200]}"
        for rule in found
        if rule["impact"] in GRAVE
        for node in rule["nodes"]
    ]


def test_axe_finds_what_is_wrong(desktop: Reader) -> None:
    desktop.page.set_content("<main><img src='data:,'><p style='color:#ccc'>pale</p></main>")
    assert {problem.partition(":")[0] for problem in barriers(desktop.page)} >= {
        "image-alt",
        "color-contrast",
    }


def test_a_complaint_is_heard(desktop: Reader) -> None:
    desktop.page.set_content("<script>console.error('here'); throw Error('there')</script>")
    assert desktop.complaints == ["here", "there"]


@each_page
def test_pages_open_quietly_fit_a_phone_and_can_be_downloaded(phone: Reader, name: str) -> None:
    page = phone.open(f"book/{name}.html")
    assert page.locator("h1").first.inner_text()
    assert phone.complaints == []
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    source = page.locator("a.btn-download-source-button").first.get_attribute("href")
    assert source
    assert (phone.site / "book" / source).resolve().is_file()


@pytest.mark.parametrize("name", EXAMINED)
def test_pages_keep_nobody_out(desktop: Reader, name: str) -> None:
    page = desktop.open(f"book/{name}.html")
    assert desktop.complaints == []
    assert barriers(page) == []


@pytest.mark.parametrize("name", PAGES if ALL_PAGES else ["index", "08_induction"])
def test_the_dark_theme_on_a_phone_keeps_nobody_out(phone: Reader, name: str) -> None:
    page = phone.open(f"book/{name}.html")
    assert page.locator("html").get_attribute("data-theme") == "dark"
    assert barriers(page) == []


def test_the_search_finds_a_term(desktop: Reader) -> None:
    page = desktop.open("search.html?q=softcap")
    page.locator("#search-results li a", has_text="The finished module").first.wait_for()
    assert desktop.complaints == []


def test_the_theme_can_be_switched(desktop: Reader) -> None:
    page = desktop.open("book/index.html")
    seen = []
    for _ in range(3):
        page.locator("button.theme-switch-button").first.click()
        seen.append(page.locator("html").get_attribute("data-theme"))
    assert {"light", "dark"} <= set(seen)


def test_code_can_be_copied(desktop: Reader) -> None:
    desktop.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = desktop.open("book/01_query_key_value.html")
    block = page.locator(".cell_input .highlight:visible").first
    block.hover()
    block.locator("button.copybtn").click()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.split() == block.locator("pre").inner_text().split()


def test_solutions_are_folded_and_open(desktop: Reader) -> None:
    page = desktop.open("book/03_logical_split.html")
    solution = page.locator("div.solution.dropdown").first
    inside = solution.locator("p:not(.admonition-title)").first
    assert not inside.is_visible()
    solution.locator("button.toggle-button").first.click()
    inside.wait_for(state="visible", timeout=5000)


def test_attention_is_explored_by_mouse_and_keyboard(desktop: Reader) -> None:
    page = desktop.open("book/03_logical_split.html")
    view = page.locator(".mha-explorer").first
    told = view.locator(".row")
    queries = view.get_by_role("listbox").first.get_by_role("option")
    queries.nth(1).hover()
    by_mouse = told.inner_text()
    queries.nth(1).click()
    page.keyboard.press("ArrowDown")
    by_keyboard = told.inner_text()
    assert by_mouse != by_keyboard
    queries.nth(2).hover()
    assert told.inner_text() == by_keyboard
    view.get_by_role("combobox", name="head").select_option("mean of all")
    assert "mean of 4 heads" in told.inner_text()
    view.get_by_label("view").select_option("matrix")
    assert view.locator(".stage canvas").is_visible()
    assert desktop.complaints == []


def test_a_view_follows_the_colours_of_what_is_around_it(desktop: Reader) -> None:
    page = desktop.open("book/03_logical_split.html")
    view = page.locator(".mha-explorer").first
    assert view.evaluate("view => view.style.colorScheme") == "light"
    page.evaluate("document.body.style.setProperty('--pst-color-text-base', '#eee')")
    page.wait_for_function(
        "document.querySelector('.mha-explorer').style.colorScheme === 'dark'", timeout=5000
    )
    view.evaluate("view => view.remove()")
    page.locator("button.theme-switch-button").first.click()
    page.wait_for_timeout(100)
    assert desktop.complaints == []


@pytest.mark.parametrize("fragment", [EXPLORED, SPLIT], ids=["attention", "split"])
def test_a_view_does_not_mind_one_that_a_host_has_stripped(desktop: Reader, fragment: str) -> None:
    name = "mha-split" if "mha-split" in fragment else "mha-explorer"
    desktop.page.set_content(f"<main><div class='{name}'><p>no data</p></div>{fragment}</main>")
    stripped, whole = desktop.page.locator(f".{name}").all()
    assert whole.evaluate("view => view.shadowRoot !== null")
    assert stripped.evaluate("view => view.shadowRoot === null")
    assert whole.get_attribute("data-lm-suppress-shortcuts") == "true"
    assert desktop.complaints == []


def test_a_token_that_was_found_is_scrolled_to(desktop: Reader) -> None:
    tokens = [f"token{place}" for place in range(40)]
    desktop.page.set_content(explore_attention(torch.eye(40), tokens).html)
    search, found = (
        desktop.page.get_by_role("searchbox"),
        desktop.page.get_by_role("option", name="token33").first,
    )
    search.fill("token33")
    search.press("Enter")
    stage, item = desktop.page.locator(".stage").bounding_box(), found.bounding_box()
    assert stage
    assert item
    assert stage["y"] <= item["y"] <= stage["y"] + stage["height"] - item["height"]


def test_without_javascript_a_picture_and_a_table_are_left(browser: Browser, site: Path) -> None:
    page = browser.new_page(java_script_enabled=False)
    page.goto(f"{site.as_uri()}/book/03_logical_split.html")
    view = page.locator(".mha-explorer").first
    assert view.get_by_role("img").is_visible()
    assert view.get_by_role("row").count() == 9  # eight queries below a head
    page.close()


def test_the_split_is_explored_by_mouse_and_keyboard(desktop: Reader) -> None:
    page = desktop.open("book/04_common_mistakes.html")
    view = page.locator(".mha-split").first
    told = view.locator(".row")
    view.get_by_role("button", name="heads first").click()
    assert "18 of 24" in " ".join(view.locator(".panels p").all_inner_texts())
    cells = view.locator(".cell")
    cells.nth(4).click()
    by_mouse = told.inner_text()
    page.keyboard.press("ArrowRight")
    assert told.inner_text() != by_mouse
    view.get_by_role("button", name="merge").click()
    view.get_by_role("combobox").select_option(label="both mistakes")
    assert "18 of 24" not in " ".join(view.locator(".panels p").all_inner_texts())
    assert desktop.complaints == []
