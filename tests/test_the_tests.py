"""Each check of the book fails on a deliberately broken copy, and for its own reason."""

from __future__ import annotations

import ast
import base64
import copy
import io
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from conftest import SkipWatch, figure_distance, skip_problems
from tests import book_checks, code_checks, exercise_checks, site_checks
from tests.support import ROOT
from tests.tolerances import FIGURE_RMS
from tools.notebook import clean, execute

Change = Callable[[Any], object]


def png(shade: int) -> str:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, shade, shade)).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def page() -> Any:
    """A notebook without fault: a printed number and a figure."""
    figure = {"image": {"alt": "a grey square"}, "figure": {"caption": "Grey."}}
    cells = [
        new_markdown_cell("# Title\n\nThe loss is 0.75, or 75%."),
        new_code_cell(
            'print(0.75, "75%")',
            execution_count=1,
            outputs=[new_output("stream", name="stdout", text="0.75 75%\n")],
        ),
        new_code_cell(
            "draw()",
            execution_count=2,
            metadata={"mystnb": figure},
            outputs=[new_output("display_data", data={"image/png": png(90), "text/plain": "<F>"})],
        ),
    ]
    return clean(new_notebook(cells=cells))


def saved(notebook: Any, path: Path) -> Path:
    nbformat.write(notebook, path)
    return path


def test_the_intact_page_passes(tmp_path: Path) -> None:
    path = saved(page(), tmp_path / "page.ipynb")
    assert book_checks.hygiene(path) == []
    assert book_checks.number_problems(path) == []
    assert book_checks.prose_problems(path) == []
    assert book_checks.ignored_cells(path) == []


def set_source(number: int, source: str) -> Change:
    return lambda notebook: notebook.cells[number].update(source=source)


def add_cell(cell: Any) -> Change:
    return lambda notebook: notebook.cells.append(cell)


def add_output(number: int, output: Any) -> Change:
    return lambda notebook: notebook.cells[number].outputs.append(output)


def set_tags(number: int, *tags: str) -> Change:
    return lambda notebook: notebook.cells[number].metadata.update(tags=list(tags))


def clear(notebook: Any) -> None:
    for cell in notebook.cells[1:]:
        cell.outputs, cell.execution_count = [], None


def clear_outputs(notebook: Any) -> None:
    for cell in notebook.cells[1:]:
        cell.outputs = []


def skip_count(notebook: Any) -> None:
    notebook.cells[2].execution_count = 3


def ignore_many(notebook: Any) -> None:
    notebook.cells += [
        new_code_cell(
            f"timing({n})", execution_count=3 + n, metadata={"tags": ["nbval-ignore-output"]}
        )
        for n in range(book_checks.MOST_IGNORED_CELLS + 1)
    ]


def drop_caption(notebook: Any) -> None:
    del notebook.cells[2].metadata["mystnb"]["figure"]


def drop_alt(notebook: Any) -> None:
    notebook.cells[2].metadata["mystnb"]["image"]["alt"] = " "


ERROR = new_output("error", ename="ValueError", evalue="no", traceback=["ValueError: no"])
STDERR = new_output("stream", name="stderr", text="UserWarning: old\n")

UNHYGIENIC: dict[str, tuple[Change, str]] = {
    "cleared": (clear, "execution counts are [None, None]"),
    "cleared outputs": (clear_outputs, "no cell has an output"),
    "skipped count": (skip_count, "execution counts are [1, 3]"),
    "empty cell": (add_cell(new_code_cell("", execution_count=3)), "cell 3: no source"),
    "stored error": (add_output(1, ERROR), "cell 1: stored error ValueError"),
    "no announced error": (set_tags(1, "raises-exception"), "cell 1: tagged raises-exception"),
    "stderr": (add_output(1, STDERR), "cell 1: stored stderr 'UserWarning: old"),
    "unknown tag": (set_tags(1, "nbval-skip"), "cell 1: tag nbval-skip is not allowed"),
    "marker": (
        set_source(1, "# NBVAL_IGNORE_OUTPUT\nprint(0.75)"),
        "cell 1: comment # NBVAL_IGNORE_OUTPUT is not allowed",
    ),
    "ignored cells": (ignore_many, "9 cells are not compared, more than 8"),
    "no caption": (drop_caption, "cell 2: a figure without caption"),
    "no alt": (drop_alt, "cell 2: a figure without alt text"),
    "path": (set_source(0, "See /home/me/notes."), "cell 0: absolute path /home/"),
    "path in output": (
        add_output(2, new_output("display_data", data={"text/plain": "</tmp/x>"})),
        "cell 2: absolute path /tmp/",
    ),
    "emoji": (set_source(0, "Done \U0001f680"), "cell 0: emoji \U0001f680"),
    "image file": (set_source(0, "![a cat](cat.png)"), "cell 0: image file ![a cat](cat.png"),
}


@pytest.mark.parametrize("name", UNHYGIENIC)
def test_hygiene_finds(name: str, tmp_path: Path) -> None:
    change, words = UNHYGIENIC[name]
    notebook = page()
    change(notebook)
    problems = book_checks.hygiene(saved(clean(notebook), tmp_path / "page.ipynb"))
    assert len(problems) == 1 or name == "cleared"
    assert problems[0].startswith("page.ipynb: ")
    assert words in problems[0]


def spoil_id(notebook: Any) -> None:
    notebook.cells[1].id = "mine"


def repeat_id(notebook: Any) -> None:
    notebook.cells[1].id = notebook.cells[0].id


def foreign_kernel(notebook: Any) -> None:
    notebook.metadata.kernelspec = {"name": "conda", "display_name": "conda", "language": "python"}


def timed(notebook: Any) -> None:
    notebook.cells[1].metadata["execution"] = {"iopub.status.busy": "2026-01-01T00:00:00Z"}


def long_traceback(notebook: Any) -> None:
    notebook.cells[1].metadata["tags"] = ["raises-exception"]
    traceback = ["-----", "Traceback", "ValueError: no"]
    notebook.cells[1].outputs.append(nbformat.from_dict({**ERROR, "traceback": traceback}))


UNTIDY: dict[str, tuple[Change, str]] = {
    "changed id": (spoil_id, "cell 1: id is not what tools/notebook.py saves"),
    "repeated id": (repeat_id, "cell 1: id is not what"),
    "kernelspec": (foreign_kernel, "kernelspec is"),
    "timing": (timed, "cell 1: metadata is not what"),
    "editor": (lambda notebook: notebook.metadata.update(toc={}), "notebook metadata is not what"),
    "old format": (lambda notebook: notebook.update(nbformat_minor=6), "nbformat_minor is not"),
    "traceback": (long_traceback, "cell 1: outputs is not what"),
}


@pytest.mark.filterwarnings("ignore:Non-unique cell id")
@pytest.mark.parametrize("name", UNTIDY)
def test_tidiness_finds(name: str, tmp_path: Path) -> None:
    change, words = UNTIDY[name]
    notebook = page()
    change(notebook)
    path = tmp_path / "page.ipynb"
    path.write_text(nbformat.writes(notebook))
    assert words in "\n".join(book_checks.hygiene(path))


def test_hygiene_finds_missing_and_huge_files(tmp_path: Path) -> None:
    path = tmp_path / "page.ipynb"
    assert book_checks.hygiene(path) == ["page.ipynb: does not exist"]
    notebook = page()
    add_output(1, new_output("stream", name="stdout", text="x" * 1_500_000))(notebook)
    (problem,) = book_checks.hygiene(saved(clean(notebook), path))
    assert "more than 1500000" in problem


def test_cells_that_are_not_compared_are_listed(tmp_path: Path) -> None:
    notebook = page()
    set_tags(1, "nbval-ignore-output")(notebook)
    path = saved(notebook, tmp_path / "page.ipynb")
    assert book_checks.ignored_cells(path) == ['page.ipynb cell 1: print(0.75, "75%")']


INVENTED = {
    "The loss is 0.76.": "0.76",
    "The loss is 0.7.": "0.7",
    "It rose by 74%.": "74%",
    "It rose by 12.5 percent.": "12.5%",
    "| a | 1.5x |\n|---|---|": "1.5",
    "```{exercise} Predict\n:label: ex-9.9\nIs it 0.5?\n```": "0.5",
    "````{note}\n```python\nx = 1.5\n```\nIt is 2.5.\n````": "2.5",
    "From 0.75 to **0.80**": "0.80",
}


@pytest.mark.parametrize("text", INVENTED)
def test_numbers_that_no_cell_shows_are_found(text: str, tmp_path: Path) -> None:
    notebook = page()
    notebook.cells[0].source = text
    path = saved(notebook, tmp_path / "page.ipynb")
    assert book_checks.number_problems(path) == [
        f"page.ipynb cell 0: no cell shows {INVENTED[text]}"
    ]


@pytest.mark.parametrize(
    "text",
    [
        "The loss is 0.75, which is 75 %, or 75 percent.",
        "Seven of 10, in 3 steps.",
        "Use `dropout=0.1` or {ref}`part 0.5 <x>`.",
        "Since $\\sqrt{2} = 1.41$ and\n$$\n1.5 + 1.5\n$$",
        "```python\nx = 0.5\n```",
        "```\n0.5\n```",
        "```{math}\n0.5\n```",
        "```{figure} x\n:width: 33.3%\n:alt: 0.5\n```",
        "[a link](https://example.org/1.5) and https://example.org/2.5",
        "See section 3.2 and section 3.2.1 of version 2.6.",
        '<img width="33.3%">',
    ],
)
def test_other_numbers_are_left_alone(text: str, tmp_path: Path) -> None:
    notebook = page()
    notebook.cells[0].source = text
    assert book_checks.number_problems(saved(notebook, tmp_path / "page.ipynb")) == []


@pytest.mark.parametrize(
    "words",
    [
        "a Powerful idea",
        "this is crucial",
        "seamlessly",
        "we leverage",
        "let us delve",
        "unlocks",
        "state-of-the-art",
        "It is important to note",
        "Let's dive in",
        "TODO",
        "/home/ada/book",
        "/tmp/figure.png",
        "C:\\Users\\ada",
    ],
)
@pytest.mark.parametrize("suffix", [".ipynb", ".md", ".py"])
def test_forbidden_words_are_found(words: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"page{suffix}"
    if suffix == ".ipynb":
        saved(new_notebook(cells=[new_markdown_cell(words)]), path)
    else:
        path.write_text(words)
    assert len(book_checks.prose_problems(path)) == 1


def test_ordinary_words_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("The helper works in this framework; users/home, at home/work.")
    assert book_checks.prose_problems(path) == []


def test_pages_outside_the_table_of_contents_are_found(tmp_path: Path) -> None:
    (tmp_path / "book").mkdir()
    (tmp_path / "_toc.yml").write_text(
        "root: book/index\nparts: [{chapters: [{file: book/one}, {file: book/two}]}]"
    )
    for name in ("index.md", "one.ipynb", "three.md"):
        (tmp_path / "book" / name).touch()
    assert book_checks.toc_problems(tmp_path) == [
        "two.ipynb: in _toc.yml, but does not exist",
        "three.md: not in _toc.yml",
    ]


LIBRARY = '''"""A module."""

from __future__ import annotations

from typing import TYPE_CHECKING, overload

from torch import Tensor, nn

if TYPE_CHECKING:
    from mha_lib.other import Other

LIMIT = 3


@overload
def double(x: int) -> int: ...
@overload
def double(x: Tensor) -> Tensor: ...
def double(x):
    """Twice x.

    Long explanation.
    """
    return 2 * x


@final
class Head(nn.Module):
    """One head.

    More.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Same.

        More.
        """
        return x
'''
BOOK = '''# mha_lib/one.py
from torch import Tensor, nn

LIMIT = 3

def double(x):
    """Twice x."""
    return 2 * x

@final
class Head(nn.Module):
    """One head."""

    def forward(self, x: Tensor) -> Tensor:
        """Same."""
        return x
'''


def code_problems(tmp_path: Path, *sources: str) -> list[str]:
    """What the check says about a library of one module and a notebook of these cells."""
    package = tmp_path / "mha_lib"
    package.mkdir()
    (package / "one.py").write_text(LIBRARY)
    (package / "_checks.py").write_text("def check(): ...\n")
    (package / "__init__.py").write_text("VERSION = 1\n")
    notebook = new_notebook(cells=[new_code_cell(source) for source in sources])
    return code_checks.code_problems(package, [saved(notebook, tmp_path / "page.ipynb")])


def test_equal_code_passes(tmp_path: Path) -> None:
    draft = "%matplotlib inline\ndef double_draft(x):\n    return x + x"
    assert code_problems(tmp_path, draft, BOOK, "assert double(2) == 4") == []


UNEQUAL: dict[str, tuple[str, str, list[str]]] = {
    "code": ("2 * x", "x * 2", ["double differs", "-    return 2 * x\n+    return x * 2"]),
    "signature": ("x: Tensor) -> Tensor", "x: Tensor) -> object", ["Head differs"]),
    "docstring": ('"""Twice x."""', '"""Twice y."""', ["double differs"]),
    "no docstring": ('        """Same."""\n', "", ["Head differs"]),
    "decorator": ("@final\n", "", ["Head differs"]),
    "constant": ("LIMIT = 3", "LIMIT = 4", ["LIMIT differs"]),
    "missing": ("LIMIT = 3\n", "", ["LIMIT is shown in no notebook"]),
    "more": ("LIMIT = 3", "LIMIT = 3\nMORE = 4", ["one.py has no MORE"]),
    "statement": ("LIMIT = 3", "LIMIT = 3\nassert LIMIT", ["one.py has no assert LIMIT"]),
    "import": (
        "import Tensor, nn",
        "import Size, nn",
        ["does not import it so: from torch import Size"],
    ),
    "module": ("# mha_lib/one.py", "# mha_lib/two.py", ["shows no module two.py"]),
    "hidden module": ("# mha_lib/one.py", "# mha_lib/_checks.py", ["shows no module _checks.py"]),
    "syntax": ("return 2 * x", "return 2 *", ["not Python"]),
}


@pytest.mark.parametrize("name", UNEQUAL)
def test_unequal_code_is_found(name: str, tmp_path: Path) -> None:
    old, new, words = UNEQUAL[name]
    problems = code_problems(tmp_path, BOOK.replace(old, new))
    assert all(word in problems[0] for word in words)
    wrong_cell = {"module": 3, "hidden module": 3, "syntax": 3}
    assert len(problems) == 1 + wrong_cell.get(name, 0)


def test_code_that_is_shown_twice_is_found(tmp_path: Path) -> None:
    problems = code_problems(tmp_path, BOOK, "# mha_lib/one.py\nLIMIT = 3")
    assert problems == ["one.py: LIMIT is shown 2 times: page.ipynb cell 0, page.ipynb cell 1"]


def test_a_draft_under_a_public_name_is_found(tmp_path: Path) -> None:
    problems = code_problems(tmp_path, BOOK, "def double(x):\n    return x + x")
    assert problems == ["page.ipynb cell 1: redefines double"]


def test_an_import_before_its_chapter_is_found(tmp_path: Path) -> None:
    package = tmp_path / "mha_lib"
    package.mkdir()
    (package / "one.py").write_text(LIBRARY)
    user = new_notebook(cells=[new_code_cell("from mha_lib import LIMIT, convert")])
    builder = new_notebook(cells=[new_code_cell(BOOK), new_code_cell("from mha_lib import LIMIT")])
    early, home = saved(user, tmp_path / "a.ipynb"), saved(builder, tmp_path / "b.ipynb")
    assert code_checks.import_problems(package, [home, early]) == []
    assert code_checks.import_problems(package, [early, home]) == [
        "a.ipynb cell 0: imports LIMIT, which is not built yet"
    ]


REMOTE = {
    "script": '<script src="https://cdn.example.org/x.js"></script>',
    "protocol-relative": '<script src="//cdn.example.org/x.js"></script>',
    "style sheet": '<link rel="stylesheet" href="https://example.org/x.css">',
    "preload": '<link rel="preload" as="font" href="https://example.org/x.woff2">',
    "icon": '<link rel="shortcut icon" href="http://example.org/x.ico">',
    "image": '<img alt="x" src="https://example.org/x.png">',
    "image set": '<img src="x.png" srcset="https://example.org/x.png 2x">',
    "frame": '<iframe src="https://example.org"></iframe>',
    "style": '<style>@import "https://example.org/x.css";</style>',
    "font": "<style>@font-face { src: url(https://example.org/x.woff2) }</style>",
    "inline style": '<p style="background: url(//example.org/x.png)">',
    "configuration": '<script>window.MathJax = {loader: "https://cdn.example.org/mathjax"}</script>',
    "thebe": '<button class="thebe-launch-button">go</button>',
}
LOCAL = """<script src="_static/x.js"></script><link rel="stylesheet" href="x.css?v=1//2">
<link rel="canonical" href="https://example.org/"><a href="https://example.org">link</a>
<script>const THEBE_JS_URL = "https://unpkg.com/thebe@0.8.2/lib/index.js"; // see https://x.org
</script><img src="data:image/png;base64,//aa.bb"><p>https://example.org</p>
<style>p { background: url(x.png) }</style>"""


@pytest.mark.parametrize("name", REMOTE)
def test_remote_assets_of_pages_are_found(name: str, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(LOCAL)
    assert site_checks.remote_assets(tmp_path) == []
    (tmp_path / "page.html").write_text(LOCAL + REMOTE[name])
    (problem,) = site_checks.remote_assets(tmp_path)
    assert problem.startswith("page.html: ")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("x.css", "@import url('https://example.org/x.css');"),
        ("x.js", 'fetch("https://example.org/x.json")'),
        ("x.js", 'const m = await import("//example.org/x.js")'),
        ("x.svg", '<svg><image href="https://example.org/x.png"/></svg>'),
    ],
)
def test_remote_assets_of_files_are_found(file: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(LOCAL)
    (tmp_path / file).write_text(text)
    (problem,) = site_checks.remote_assets(tmp_path)
    assert problem.startswith(file)


def test_a_site_without_pages_is_found(tmp_path: Path) -> None:
    assert site_checks.remote_assets(tmp_path) == [f"no pages under {tmp_path.name}"]


def exercises() -> Any:
    """A "your turn" notebook of one prediction and one piece of code, as it is committed."""
    check = {"tags": ["check", "raises-exception"]}
    error = {"ename": "AssertionError", "evalue": "no answer", "traceback": ["no answer"]}
    solution = (
        "<details><summary>Solution</summary>\n\n```python\n{}\n```\n\nSo it is.\n\n</details>"
    )
    cells = [
        new_code_cell("numbers = [3, 4]"),
        new_markdown_cell("## Task 1: predict"),
        new_code_cell("total = None", metadata={"tags": ["blank"]}),
        new_code_cell(
            'assert total is not None, "no answer"\n'
            'assert total == sum(numbers), "that is not the sum"\nprint("Task 1: right.")',
            metadata=check,
            outputs=[new_output("error", **error)],
        ),
        new_markdown_cell(solution.format("total = 7")),
        new_markdown_cell("## Task 2: code"),
        new_code_cell("def twice(x):\n    ...", metadata={"tags": ["blank"]}),
        new_code_cell(
            'assert twice(3) is not None, "no answer"\nassert twice(3) != 9, "that is the square"\n'
            'assert twice(3) == 6, "wrong"\nprint("Task 2: right.")',
            metadata=check,
            outputs=[new_output("error", **error)],
        ),
        new_markdown_cell(solution.format("def twice(x):\n    return 2 * x")),
    ]
    return new_notebook(cells=cells)


WRONG = {"Task 2": [("def twice(x):\n    return x * x", "that is the square")]}


def fill_blank(notebook: Any) -> None:
    notebook.cells[2].source = "total = 7"


def drop(number: int) -> Change:
    return lambda notebook: notebook.cells.pop(number)


def untag_blanks(notebook: Any) -> None:
    for number in (2, 6):
        notebook.cells[number].metadata["tags"] = []


def store_other_error(notebook: Any) -> None:
    notebook.cells[3].outputs[0].ename = "NameError"


def silence_check(notebook: Any) -> None:
    notebook.cells[3].outputs[0].evalue = ""


UNFIT: dict[str, tuple[Change, str]] = {
    "filled": (fill_blank, "Task 1: the blank is filled"),
    "no heading": (drop(1), "blank in cell 1: no heading"),
    "no check": (drop(3), "Task 1: no check"),
    "no solution": (drop(8), "Task 2: no solution"),
    "one heading for two": (drop(5), "Task 1 has more than one blank"),
    "no blank": (untag_blanks, "no blank to fill"),
    "other error": (store_other_error, "Task 1: the check of the blank does not stop"),
    "no message": (silence_check, "Task 1: the check of the blank does not stop"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_unfit_exercises_are_found(name: str, tmp_path: Path) -> None:
    notebook = exercises()
    assert exercise_checks.blank_problems(saved(notebook, tmp_path / "turn.ipynb")) == []
    change, words = UNFIT[name]
    change(notebook)
    (problem,) = exercise_checks.blank_problems(saved(notebook, tmp_path / "turn.ipynb"))
    assert words in problem


def test_solutions_that_are_wrong_are_found(tmp_path: Path) -> None:
    notebook = exercises()
    path = saved(notebook, tmp_path / "turn.ipynb")
    assert exercise_checks.solution_problems(path) == []
    notebook.cells[8].source = notebook.cells[8].source.replace("2 * x", "x * x")
    problems = exercise_checks.solution_problems(saved(notebook, path))
    assert problems == [
        "turn.ipynb: cell 7: AssertionError: that is the square",
        "turn.ipynb: Task 2: the solution is not called right",
    ]


def test_wrong_answers_that_are_not_diagnosed_are_found(tmp_path: Path) -> None:
    path = saved(exercises(), tmp_path / "turn.ipynb")
    assert exercise_checks.wrong_answer_problems(path, WRONG) == []
    undiagnosed = {
        "Task 1": [("total = 7", "that is not the sum"), ("total = 8", "that is not the sum")],
        "Task 3": [("x = 1", "no")],
    }
    assert exercise_checks.wrong_answer_problems(path, undiagnosed) == [
        "turn.ipynb: wrong answers for Task 3, which is no task",
        "turn.ipynb: no wrong answer for Task 2",
        "turn.ipynb: Task 1: a wrong answer gives '', which lacks 'that is not the sum'",
    ]


def test_wrong_answers_are_read_from_their_folder(tmp_path: Path) -> None:
    (tmp_path / "your_turn_01.py").write_text('WRONG = {"Task 1": [("x = 1", "no")]}')
    listed = exercise_checks.wrong_answers(tmp_path, Path("book/your_turn_01.ipynb"))
    assert listed == {"Task 1": [("x = 1", "no")]}
    assert exercise_checks.wrong_answers(tmp_path, Path("book/your_turn_09.ipynb")) == {}


CELLS = [
    'import os\nimport matplotlib.pyplot as plt\nprint(repr(os.environ["CUDA_VISIBLE_DEVICES"]))',
    'print(f"{3 / 4:.2f}")',
    "_ = plt.figure(figsize=(2, 1)).gca().plot([0, 1])",
    "_ = plt.figure(figsize=(2, 1)).gca().plot([1, 0])",
    'print("done")',
]
PRINTS, RISING, FALLING, LAST = 1, 2, 3, 4


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project's test set-up, without its tests."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "tests").mkdir()
    for name in ("conftest.py", "pyproject.toml", "tests/__init__.py", "tests/tolerances.py"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "tests" / "expected_skips.txt").write_text("test_skips.py::test_listed\n")
    return folder


@pytest.fixture(scope="module")
def intact(project: Path) -> Any:
    """A small notebook that prints and draws, executed as the book's are, where no GPU is in sight."""
    path = saved(new_notebook(cells=[*map(new_code_cell, CELLS)]), project / "intact.ipynb")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CUDA_VISIBLE_DEVICES", "")
        execute(path)
    return book_checks.read(path)


def run_pytest(
    project: Path, *arguments: str, **environment: str
) -> tuple[int, dict[str, str], str]:
    """The exit status, the failure message of each test by its file and name, and the text."""
    report = project / "report.xml"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}"]
    inherited = {name: value for name, value in os.environ.items() if name != "CI"}
    done = subprocess.run(
        [*command, *arguments],
        cwd=project,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
    )
    failures = {
        f"{case.get('classname')} {case.get('name')}": "".join(
            f"{child.get('message')} {child.text}" for child in case if child.tag != "skipped"
        )
        for case in ET.parse(report).iter("testcase")
    }
    return done.returncode, failures, done.stdout


def tampered(intact: Any) -> Any:
    """A copy with a fault in every cell but the first."""
    cells = copy.deepcopy(intact).cells
    cells[PRINTS].outputs[0].text = "0.76\n"
    cells[RISING].outputs = copy.deepcopy(cells[FALLING].outputs)
    del cells[FALLING].outputs[0].data["image/png"]
    cells[LAST].source += "\nimport warnings\nwarnings.warn('old')"
    return nbformat.from_dict({**intact, "cells": cells})


AFTERWARDS = """import os

def test_the_environment_is_as_before():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"
"""


def test_nbval_finds_tampered_outputs_and_hides_the_gpu(project: Path, intact: Any) -> None:
    saved(tampered(intact), project / "tampered.ipynb")
    (project / "test_afterwards.py").write_text(AFTERWARDS)
    names = "intact.ipynb", "tampered.ipynb", "test_afterwards.py"
    status, failures, text = run_pytest(project, *names, CUDA_VISIBLE_DEVICES="7")
    assert status == pytest.ExitCode.TESTS_FAILED, text
    expected = {
        f"tampered.ipynb Cell {PRINTS}": "0.76",
        f"tampered.ipynb Cell {RISING}": "figure 0 differs",
        f"tampered.ipynb Cell {FALLING}": "0 stored figures, 1 fresh ones",
        f"tampered.ipynb Cell {LAST}": "Unexpected output fields from running code: {'stderr'}",
    }
    assert {test for test, message in failures.items() if message} == expected.keys()
    assert all(words in failures[test] for test, words in expected.items())
    assert "inf grey levels" not in text
    passed = failures.keys() - expected.keys()
    assert {"intact.ipynb Cell 4", "tampered.ipynb Cell 0"} <= passed
    assert "test_afterwards test_the_environment_is_as_before" in passed


@pytest.mark.usefixtures("intact")
def test_a_run_that_demands_cuda_fails_without_it(project: Path) -> None:
    status, failures, text = run_pytest(
        project, "intact.ipynb", CUDA_VISIBLE_DEVICES="", MHA_BOOK_DEVICE="cuda"
    )
    assert status == pytest.ExitCode.TESTS_FAILED, text
    failed = {test: message for test, message in failures.items() if message}
    assert failed.keys() == {"intact.ipynb used CUDA"}
    assert "no CUDA device" in failed["intact.ipynb used CUDA"]


def test_figures_are_compared_by_their_pixels() -> None:
    assert figure_distance(png(90), png(90)) == 0
    assert figure_distance(png(90), png(95)) == 5 > FIGURE_RMS
    rows = np.zeros((4, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(rows).save(file, format="PNG")
    assert figure_distance(png(0), base64.b64encode(file.getvalue()).decode()) == float("inf")


SKIPS = """import pytest

@pytest.mark.skip(reason="no device")
def test_listed(): ...

@pytest.mark.skip(reason="tired")
def test_surprising(): ...
"""


def test_in_ci_a_surprising_skip_fails_the_run(project: Path) -> None:
    (project / "test_skips.py").write_text(SKIPS)
    status, _, text = run_pytest(project, "test_skips.py", CI="true", CUDA_VISIBLE_DEVICES="")
    assert status == pytest.ExitCode.TESTS_FAILED, text
    assert "2 skipped" in text
    assert "test_surprising was skipped, but is not in tests/expected_skips.txt" in text
    assert "test_listed was skipped, but" not in text


def test_skips_are_compared_with_the_list() -> None:
    assert skip_problems({"a"}, {"a", "b"}, {"a", "not collected"}) == []
    assert skip_problems({"a"}, {"a"}, set()) == [
        "a was skipped, but is not in tests/expected_skips.txt"
    ]
    assert skip_problems(set(), {"a"}, {"a"}) == [
        "a is in tests/expected_skips.txt, but was not skipped"
    ]


def test_modules_that_are_skipped_while_imported_count() -> None:
    watch = SkipWatch(set())
    watch.pytest_collectreport(pytest.CollectReport("tests/test_x.py", "skipped", None, []))
    assert watch.skipped == {"tests/test_x.py"}


def test_the_expected_skips_exist() -> None:
    lines = (ROOT / "tests" / "expected_skips.txt").read_text(encoding="utf-8").splitlines()
    listed = [line for line in lines if not line.startswith("#")]
    assert listed
    for line in listed:
        file, _, name = line.partition("::")
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("reference", ["{ref}`there <here>`", "{ref}`there <nowhere>`"])
def test_a_broken_reference_fails_the_build(reference: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT / "book" / "_static", source / "book" / "_static")
    shutil.copytree(ROOT / "tools", source / "tools")
    for name in ("_config.yml", "book/references.bib"):
        shutil.copy(ROOT / name, source / name)
    (source / "_toc.yml").write_text("format: jb-book\nroot: book/index\n")
    (source / "book" / "index.md").write_text(f"(here)=\n# A page\n\nGo {reference}.\n")
    done = site_checks.build_book(source, tmp_path / "out")
    broken = "nowhere" in reference
    assert bool(done.returncode) == broken, done.stderr
    assert ("undefined label: 'nowhere'" in done.stderr) == broken
