"""The view of the split in a real browser, opened from the disk, twice on one page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page

from mha_lib.explore_split import explore_split
from tests.test_browser import DESKTOP, PHONE, Reader, barriers, browser

__all__ = ["browser"]

PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Two views</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>body {{ margin: 16px; background: #fff; color: #222 }}
@media (prefers-color-scheme: dark) {{ body {{ background: #121212; color: #ddd }} }}</style></head>
<body><main><h1>Two views</h1>{}{}</main></body></html>"""
TOKENS = ["the", "<b>cat", "sat", "down"]
STEPS = ["1 packed", "2 split", "3 heads first", "4 merge"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one page, on which two views of different sizes stand."""
    views = explore_split(TOKENS).html, explore_split(3, 4, 2).html
    (tmp_path / "page.html").write_text(PAGE.format(*views), encoding="utf-8")
    return tmp_path


@pytest.fixture
def reader(browser: Browser, folder: Path) -> Iterator[Reader]:
    """A wide and light page; it must stay quiet."""
    reader = Reader(browser, folder, DESKTOP)
    reader.open("page.html")
    yield reader
    assert reader.complaints == []
    reader.page.close()


@pytest.fixture(params=[DESKTOP, PHONE], ids=["desktop", "phone"])
def sized(
    request: pytest.FixtureRequest,
    browser: Browser,
    folder: Path,
) -> Iterator[Reader]:
    """The page wide and light, then narrow and dark."""
    reader = Reader(browser, folder, request.param, "dark" if request.param is PHONE else "light")
    reader.open("page.html")
    yield reader
    assert reader.complaints == []
    reader.page.close()


def view(page: Page, at: int = 0) -> Locator:
    return page.locator(".mha-split").nth(at)


def step(of: Locator, name: str) -> None:
    of.get_by_role("button", name=name).click()


def cell(of: Locator, panel: str, number: int) -> Locator:
    return of.locator(f".{panel} .cell").nth(number)


def told(of: Locator) -> str:
    return of.get_by_role("status").inner_text()


def place(of: Locator, panel: str, number: int) -> str:
    return str(cell(of, panel, number).evaluate("cell => cell.style.transform"))


def chosen(of: Locator) -> dict[str, list[int]]:
    """The numbers that are marked in each panel."""
    found: dict[str, list[int]] = of.evaluate(
        """host => Object.fromEntries([...host.shadowRoot.querySelectorAll(".panel")].map(panel => [
        panel.classList[1], [...panel.querySelectorAll(".cell")].flatMap(
        (cell, at) => cell.classList.contains("chosen") ? [at] : [])]))"""
    )
    return found


def test_opens_with_the_mistake_in_sight(reader: Reader) -> None:
    first = view(reader.page)
    assert first.locator("button[aria-current=step]").inner_text() == "3 heads first"
    assert "18 of 24 numbers misplaced" in first.locator(".wrong .count").inner_text()
    assert "misplaced: read as" in told(first)


def test_steps_move_the_numbers_by_mouse(reader: Reader) -> None:
    first = view(reader.page)
    step(first, "1 packed")
    assert first.locator(".panel:visible").count() == 1
    seen = []
    for name in STEPS:
        step(first, name)
        current = first.locator("button[aria-current=step]")
        assert current.all_inner_texts() == [name]
        seen.append(place(first, "right", 16))
    assert len(set(seen)) == 3  # merged, a number is back in its packed place
    assert seen[0] == seen[3]


def test_steps_move_the_numbers_by_keyboard(reader: Reader) -> None:
    page, first = reader.page, view(reader.page)
    page.keyboard.press("Tab")
    page.keyboard.press("Home")
    before = place(first, "right", 13)
    page.keyboard.press("ArrowRight")
    assert first.locator("button[aria-current=step]").inner_text() == STEPS[1]
    assert first.locator("button:focus-visible").inner_text() == STEPS[1]
    assert place(first, "right", 13) != before
    page.keyboard.press("End")
    assert first.locator("button[aria-current=step]").inner_text() == STEPS[3]


def test_a_number_is_marked_wherever_it_stands(reader: Reader) -> None:
    first = view(reader.page)
    step(first, "2 split")
    cell(first, "packed", 13).hover()
    assert chosen(first) == {"packed": [13], "right": [13], "wrong": [13]}
    assert told(first) == (
        "Number 13: token 2 (sat), head 0, dimension 1. "
        "Right: block token 2, row head 0, column 1. "
        "Wrong way: block head 1, row token 0, column 1, "
        "misplaced: read as token 0 (the), head 1, dimension 1."
    )
    cell(first, "wrong", 7).click()
    assert chosen(first) == {"packed": [7], "right": [7], "wrong": [7]}
    assert "token 1 (<b>cat)" in told(first)


def test_numbers_are_walked_through_by_keyboard(reader: Reader) -> None:
    page, first = reader.page, view(reader.page)
    step(first, "3 heads first")
    first.get_by_label("wrong way beside it").focus()
    walked = []
    for pressed in ("Tab", "ArrowRight", "ArrowDown", "End", "Tab", "ArrowDown", "Tab", "Home"):
        page.keyboard.press(pressed)
        walked.append(chosen(first)["wrong"][0])
        focused = first.locator(".cell:focus-visible")
        assert focused.count() == 1
        assert focused.evaluate("cell => getComputedStyle(cell.firstChild).strokeWidth") == "5px"
        assert f"Number {walked[-1]}:" in told(first)
    assert walked == [3, 4, 10, 11, 11, 17, 17, 15]


def test_cells_tell_a_screen_reader_what_they_are(reader: Reader) -> None:
    first = view(reader.page)
    step(first, "2 split")
    boxes = first.get_by_role("listbox")
    assert boxes.count() == 3
    assert boxes.nth(2).get_attribute("aria-label") == "wrong way: packed.view(b, h, n, d)"
    assert first.locator(".panel").get_by_role("option").count() == 3 * 24
    assert cell(first, "wrong", 13).get_attribute("aria-label") == (
        "number 13: token 2 (sat), head 0, dimension 1, "
        "stands in block head 1, row token 0, column 1, misplaced"
    )


@pytest.mark.parametrize(
    ("mistake", "counts"),
    [("split", [18, 18, 18]), ("merge", [0, 0, 18]), ("both", [18, 18, 0])],
)
def test_misplaced_numbers_are_counted_and_dashed(
    reader: Reader, mistake: str, counts: list[int]
) -> None:
    first = view(reader.page)
    first.get_by_label("wrong way beside it").select_option(mistake)
    for name, count in zip(STEPS[1:], counts, strict=True):
        step(first, name)
        assert f"{count} of 24 numbers misplaced" in first.locator(".wrong .count").inner_text()
        assert first.locator(".wrong .stray").count() == count
        assert first.locator(".right .stray").count() == 0
    assert ("undone" in first.locator(".wrong .count").inner_text()) == (mistake == "both")


def test_the_wrong_way_can_be_put_away(reader: Reader) -> None:
    first = view(reader.page)
    step(first, "2 split")
    first.get_by_label("wrong way beside it").select_option("none")
    assert first.locator(".panel:visible").count() == 2
    assert "Wrong" not in told(first)
    first.get_by_label("wrong way beside it").select_option("merge")
    assert "Wrong way: block token 0" in told(first)


def test_two_on_a_page_do_not_meet(reader: Reader) -> None:
    first, second = view(reader.page), view(reader.page, 1)
    before = second.inner_html(), told(second), chosen(second)
    step(first, "4 merge")
    cell(first, "packed", 20).click()
    assert (second.inner_html(), told(second), chosen(second)) == before
    step(second, "2 split")
    assert second.locator(".packed .cell").count() == 24
    assert first.locator("button[aria-current=step]").inner_text() == STEPS[3]
    assert chosen(first)["packed"] == [20]
    ids = """[document, ...[...document.querySelectorAll('.mha-split')].map(host => host.shadowRoot)]
        .reduce((sum, root) => sum + root.querySelectorAll('[id]').length, 0)"""
    assert reader.page.evaluate(ids) == 0


def test_started_again_it_stays_as_it_is(reader: Reader) -> None:
    first = view(reader.page)
    step(first, "3 heads first")
    reader.page.evaluate("eval(document.querySelector('main script').textContent)")
    assert first.locator("button[aria-current=step]").inner_text() == STEPS[2]
    assert first.locator(".panel").count() == 3


@pytest.mark.parametrize("name", STEPS)
def test_keeps_nobody_out_and_fits(sized: Reader, name: str) -> None:
    page = sized.page
    page.emulate_media(reduced_motion="reduce")
    for at in range(2):
        step(view(page, at), name)
    assert barriers(page) == []
    assert page.viewport_size
    width = page.viewport_size["width"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    scrolled = ".scroll:visible"
    for box in view(page).locator(scrolled).all():
        assert box.evaluate("box => box.scrollWidth <= box.clientWidth")


def test_follows_the_scheme_of_the_page(sized: Reader) -> None:
    dark = sized.page.viewport_size == PHONE
    scheme = view(sized.page).evaluate("host => host.style.colorScheme")
    assert scheme == ("dark" if dark else "light")


def test_who_wants_no_motion_gets_none(reader: Reader) -> None:
    page = reader.page
    time = "cell => getComputedStyle(cell).transitionDuration"
    assert cell(view(page), "right", 0).evaluate(time) == "0.6s"
    page.emulate_media(reduced_motion="reduce")
    assert cell(view(page), "right", 0).evaluate(time) == "0s"


def test_no_picture_is_cut_off(sized: Reader) -> None:
    for name in STEPS:
        step(view(sized.page), name)
        pictures = view(sized.page).locator(".scroll:visible").all()
        assert pictures
        for picture in pictures:
            shown, whole = picture.evaluate("it => [it.clientHeight, it.scrollHeight]")
            assert shown == whole > 36
