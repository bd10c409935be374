"""tools/notebook.py: what it saves depends on the notebook's text and results alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tools.notebook import clean, execute


def notebook(*cells: Any) -> Any:
    return new_notebook(cells=list(cells))


def error_output() -> Any:
    return new_output(
        "error",
        ename="AssertionError",
        evalue="the axes are swapped\nlook again",
        traceback=["\x1b[31m-----", "\x1b[31mAssertionError\x1b[39m  Traceback", "/home/me/x.py"],
    )


def messy() -> Any:
    """A notebook as an editor leaves it."""
    stream = [new_output("stream", name=n, text=t) for n, t in (("stdout", "a"), ("stdout", "b"))]
    result = new_output("execute_result", data={"text/plain": "1"}, metadata={"isolated": True})
    found = notebook(
        new_markdown_cell("# Title", metadata={"editable": True}),
        new_code_cell("1", outputs=[*stream, result], execution_count=1),
        new_code_cell(
            "1", outputs=[error_output()], metadata={"tags": ["check"], "scrolled": True}
        ),
    )
    found.metadata = nbformat.from_dict({"language_info": {"version": "3.12"}, "colab": {"a": 1}})
    found.cells[1].metadata["execution"] = {"iopub.status.busy": "2026-01-01"}
    found.cells[1].metadata["mystnb"] = {"image": {"alt": "a line"}}
    return found


def test_ids_come_from_the_text() -> None:
    one, other = clean(messy()), clean(messy())
    ids = [cell.id for cell in one.cells]
    assert ids == [cell.id for cell in other.cells]
    assert len(set(ids)) == 3
    assert ids[2] == f"{ids[1]}-2"


def test_ids_change_with_the_text_and_the_kind() -> None:
    cells = [new_code_cell("x"), new_code_cell("y"), new_markdown_cell("x")]
    assert len({cell.id for cell in clean(notebook(*cells)).cells}) == 3


def test_cleaning_twice_changes_nothing() -> None:
    once = clean(messy())
    assert clean(copy.deepcopy(once)) == once
    nbformat.validate(once)


def test_only_metadata_with_a_meaning_stays() -> None:
    cleaned = clean(messy())
    assert cleaned.metadata.keys() == {"colab", "kernelspec", "language_info"}
    assert cleaned.metadata.kernelspec.name == "python3"
    assert cleaned.metadata.language_info == {"name": "python"}
    assert [cell.metadata for cell in cleaned.cells] == [
        {},
        {"mystnb": {"image": {"alt": "a line"}}},
        {"tags": ["check"]},
    ]
    assert cleaned.cells[1].outputs[1].metadata == {}


def test_pieces_of_a_stream_are_joined() -> None:
    stream, result = clean(messy()).cells[1].outputs
    assert stream.text == "ab"
    assert result.output_type == "execute_result"


def test_errors_keep_their_last_line_only() -> None:
    (error,) = clean(messy()).cells[2].outputs
    assert error.traceback == ["AssertionError: the axes are swapped\nlook again"]
    assert (error.ename, error.evalue) == ("AssertionError", "the axes are swapped\nlook again")


def test_execute_saves_a_clean_notebook(tmp_path: Path) -> None:
    path = tmp_path / "page.ipynb"
    announced = {"tags": ["raises-exception"]}
    cells = [new_code_cell("print(6 * 7)"), new_code_cell("1 / 0", metadata=announced)]
    nbformat.write(notebook(*cells), path)
    assert execute(path) > 0
    saved = nbformat.read(path, as_version=4)
    assert [cell.execution_count for cell in saved.cells] == [1, 2]
    assert saved.cells[0].outputs[0].text == "42\n"
    assert saved.cells[1].outputs[0].traceback == ["ZeroDivisionError: division by zero"]
    text = path.read_text(encoding="utf-8")
    execute(path)
    assert path.read_text(encoding="utf-8") == text


def test_execute_leaves_the_file_alone_when_a_cell_fails(tmp_path: Path) -> None:
    path = tmp_path / "page.ipynb"
    nbformat.write(notebook(new_code_cell("1 / 0")), path)
    before = path.read_text(encoding="utf-8")
    with pytest.raises(CellExecutionError, match="division by zero"):
        execute(path)
    assert path.read_text(encoding="utf-8") == before
