"""The real book: each page, the code it shares with the library, its exercises, and the built site."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import book_checks, code_checks, exercise_checks, site_checks
from tests.support import ROOT
from tests.test_explore import COMMITTED_BYTES
from tools.toc import toc_pages

PACKAGE = ROOT / "mha_lib"
PAGES = toc_pages(ROOT)
NOTEBOOKS = [page for page in PAGES if page.suffix == ".ipynb"]
YOUR_TURN = [page for page in NOTEBOOKS if page.name.startswith("your_turn_")]
CHAPTERS = [page for page in NOTEBOOKS if page.name[0].isdigit()]
TEXTS = [*PAGES, *sorted(ROOT.glob("*.md")), *sorted(PACKAGE.glob("*.py"))]

each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
each_exercise = pytest.mark.parametrize("notebook", YOUR_TURN, ids=lambda path: path.stem)


def test_the_table_of_contents_names_the_pages_there_are() -> None:
    assert book_checks.toc_problems(ROOT) == []


@each_notebook
def test_notebooks_are_clean_and_executed(notebook: Path) -> None:
    assert book_checks.hygiene(notebook) == []


@each_notebook
def test_numbers_in_the_prose_come_from_cells(notebook: Path) -> None:
    assert book_checks.number_problems(notebook) == []


@pytest.mark.parametrize("name", ["Block", "GPT"])
def test_two_pages_show_the_same_gpt(name: str) -> None:
    """The page on the cache runs alone, so it repeats the model of the page before."""
    shown = [
        ast.unparse(node)
        for page in ("08_gpt", "08_cache")
        for _, cell in book_checks.code_cells(book_checks.read(ROOT / "book" / f"{page}.ipynb"))
        if f"class {name}(" in cell.source
        for node in ast.parse(cell.source).body
        if isinstance(node, ast.ClassDef) and node.name == name
    ]
    assert len(shown) == 2
    assert shown[0] == shown[1]


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_chapters_choose_their_device(chapter: Path) -> None:
    line = 'device = "cuda" if torch.cuda.is_available() else "cpu"'
    assert any(line in cell.source for _, cell in book_checks.code_cells(book_checks.read(chapter)))


@each_notebook
def test_cells_that_are_not_compared_are_listed(
    notebook: Path,
    capsys: pytest.CaptureFixture[str],
    record_property: Callable[[str, object], None],
) -> None:
    cells = book_checks.ignored_cells(notebook)
    record_property("not compared", cells)
    with capsys.disabled():
        print("", *(f"not compared: {cell}" for cell in cells), sep="\n", end="")
    assert len(cells) <= book_checks.MOST_IGNORED_CELLS


@pytest.mark.parametrize("page", TEXTS, ids=lambda path: path.name)
def test_the_text_does_without_these_words(page: Path) -> None:
    assert book_checks.prose_problems(page) == []


@pytest.mark.parametrize("chapter", "13678")
def test_attention_can_be_explored_in_the_chapter(chapter: str) -> None:
    views = [
        page
        for notebook in CHAPTERS
        if notebook.name.startswith(f"0{chapter}")
        for _, output in book_checks.outputs_of(book_checks.read(notebook), "execute_result")
        if 'class="mha-explorer"' in (page := output.data.get("text/html", ""))
    ]
    assert views
    assert all(len(view.encode()) < COMMITTED_BYTES for view in views)


def test_the_code_of_the_book_is_the_code_of_the_library() -> None:
    assert code_checks.code_problems(PACKAGE, NOTEBOOKS) == []


def test_notebooks_import_only_what_is_built() -> None:
    assert code_checks.import_problems(PACKAGE, NOTEBOOKS) == []


def test_published_figures_in_the_book_are_those_of_the_file() -> None:
    published = json.loads((ROOT / "benchmarks" / "published.json").read_text(encoding="utf-8"))
    notebook = book_checks.read(ROOT / "book" / "05_gpu_optimization.ipynb")
    (cell,) = (c for _, c in book_checks.code_cells(notebook) if c.source.startswith("PUBLISHED ="))
    assignment = ast.parse(cell.source).body[0]
    assert isinstance(assignment, ast.Assign)
    assert ast.literal_eval(assignment.value) == published


@each_exercise
def test_blanks_are_blank_and_whole(notebook: Path) -> None:
    assert exercise_checks.blank_problems(notebook) == []


@each_exercise
def test_solutions_are_right(notebook: Path) -> None:
    assert exercise_checks.solution_problems(notebook) == []


@each_exercise
def test_wrong_answers_are_diagnosed(notebook: Path) -> None:
    wrong = exercise_checks.wrong_answers(ROOT / "tests" / "wrong_answers", notebook)
    assert exercise_checks.wrong_answer_problems(notebook, wrong) == []


def test_the_book_builds_without_a_warning(site: Path) -> None:
    built = {path.stem for path in (site / "book").glob("*.html")}
    assert {page.stem for page in PAGES} <= built


def test_the_pages_load_nothing_from_elsewhere(site: Path) -> None:
    assert site_checks.remote_assets(site) == []


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_chapters_say_how_long_they_ran(chapter: Path, site: Path) -> None:
    path = ROOT / "benchmarks" / "run_times" / "cpu.json"
    seconds = json.loads(path.read_text(encoding="utf-8"))["seconds"][chapter.stem]
    page = (site / "book" / f"{chapter.stem}.html").read_text(encoding="utf-8")
    assert f'<p class="run-time">Measured run time: {seconds} s on ' in page
