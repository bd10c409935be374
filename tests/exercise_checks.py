"""The "your turn" notebooks: blanks, checks that diagnose, and solutions that pass them."""

from __future__ import annotations

import ast
import copy
import re
import runpy
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

from tests.book_checks import read, tags_of
from tools.notebook import CELL_TIMEOUT_SECONDS

HEADING = re.compile(r"^##\s+(Task \d+)\b", re.MULTILINE)
SOLUTION = re.compile(r"<details>.*?^```python\n(.*?)^```.*?</details>", re.DOTALL | re.MULTILINE)
WrongAnswers = dict[str, list[tuple[str, str]]]


@dataclass(frozen=True)
class Task:
    """One exercise: where its blank and its checks stand, and what fills the blank."""

    name: str
    blank: int
    checks: list[int]
    solution: str | None

    def is_code(self, notebook: Any) -> bool:
        """Does the blank ask for code, and not for a prediction?"""
        nodes = ast.parse(notebook.cells[self.blank].source).body
        return any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in nodes)


def tasks_of(notebook: Any) -> list[Task]:
    """The exercises in order; each reaches to the next blank."""
    cells = notebook.cells
    blanks = [n for n, cell in enumerate(cells) if "blank" in tags_of(cell)]
    tasks = []
    for start, end in zip(blanks, [*blanks, len(cells)][1:], strict=True):
        above = "\n".join(cell.source for cell in cells[:start] if cell.cell_type == "markdown")
        below = "\n".join(cell.source for cell in cells[start:end] if cell.cell_type == "markdown")
        headings, solution = HEADING.findall(above), SOLUTION.search(below)
        tasks.append(
            Task(
                name=headings[-1] if headings else f"blank in cell {start}",
                blank=start,
                checks=[n for n in range(start, end) if "check" in tags_of(cells[n])],
                solution=solution[1].rstrip("\n") if solution else None,
            )
        )
    return tasks


def blank_problems(path: Path) -> list[str]:
    """Is each exercise whole, is it blank, and does its check say so?"""
    notebook = read(path)
    tasks = tasks_of(notebook)
    problems = [] if tasks else ["no blank to fill"]
    names = [task.name for task in tasks]
    problems += [
        f"{name} has more than one blank" for name in sorted(set(names)) if names.count(name) > 1
    ]
    for task in tasks:
        problems += [f"{task.name}: {problem}" for problem in task_problems(notebook, task)]
    return [f"{path.name}: {problem}" for problem in problems]


def task_problems(notebook: Any, task: Task) -> Iterator[str]:
    """What one exercise lacks."""
    if not HEADING.match(f"## {task.name}"):
        yield "no heading such as '## Task 1: ...'"
    if not re.search(r"\.\.\.|\bNone\b", notebook.cells[task.blank].source):
        yield "the blank is filled"
    if task.solution is None:
        yield "no solution"
    if not task.checks:
        yield "no check"
    for number in task.checks:
        errors = [out for out in notebook.cells[number].outputs if out.output_type == "error"]
        if [error.ename for error in errors] != ["AssertionError"] or not errors[0].evalue:
            yield "the check of the blank does not stop at an assertion with a message"


def with_sources(notebook: Any, order: list[tuple[int, str | None]]) -> Any:
    """A notebook of these cells, some with another source, none with outputs."""
    cells = []
    for number, source in order:
        cell = copy.deepcopy(notebook.cells[number])
        cell.source = cell.source if source is None else source
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        cells.append(cell)
    return nbformat.from_dict({**notebook, "cells": cells})


def run(notebook: Any) -> None:
    """Execute in an empty folder; errors are stored and do not stop it."""
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            notebook,
            timeout=CELL_TIMEOUT_SECONDS,
            kernel_name="python3",
            allow_errors=True,
            resources={"metadata": {"path": folder}},
        ).execute()


def error_of(cell: Any) -> str:
    """The error that a cell stopped with; empty if it did not."""
    errors = [out for out in cell.get("outputs", []) if out.output_type == "error"]
    return f"{errors[0].ename}: {errors[0].evalue}" if errors else ""


def printed(cell: Any) -> str:
    """What a cell wrote."""
    return "".join(out.text for out in cell.outputs if out.output_type == "stream")


def solution_problems(path: Path) -> list[str]:
    """Fill every blank with its solution and run the notebook: each check must say "right"."""
    notebook = read(path)
    tasks = tasks_of(notebook)
    answers = {task.blank: task.solution for task in tasks}
    filled = with_sources(notebook, [(n, answers.get(n)) for n in range(len(notebook.cells))])
    run(filled)
    problems = [] if tasks else ["no blank to fill"]
    problems += [
        f"cell {number}: {error}"
        for number, cell in enumerate(filled.cells)
        if (error := error_of(cell))
    ]
    problems += [
        f"{task.name}: the solution is not called right"
        for task in tasks
        if f"{task.name}: right" not in "".join(printed(filled.cells[n]) for n in task.checks)
    ]
    return [f"{path.name}: {problem}" for problem in problems]


def wrong_answers(folder: Path, notebook: Path) -> WrongAnswers:
    """The typical mistakes that are listed for a notebook."""
    path = folder / f"{notebook.stem}.py"
    found: WrongAnswers = runpy.run_path(str(path))["WRONG"] if path.exists() else {}
    return found


def wrong_answer_problems(path: Path, wrong: WrongAnswers) -> list[str]:
    """Fill in each wrong answer, then the solution: the check must name the mistake, then pass."""
    notebook = read(path)
    tasks = tasks_of(notebook)
    known = {task.name for task in tasks}
    problems = [
        f"wrong answers for {name}, which is no task" for name in sorted(wrong.keys() - known)
    ]
    problems += [
        f"no wrong answer for {task.name}"
        for task in tasks
        if task.is_code(notebook) and not wrong.get(task.name)
    ]
    order, expected = wrong_run(notebook, tasks, wrong)
    tried = with_sources(notebook, order)
    run(tried)
    for place, (name, words) in expected.items():
        error = error_of(tried.cells[place])
        if not error.startswith("AssertionError") or words not in error:
            problems.append(f"{name}: a wrong answer gives {error!r}, which lacks {words!r}")
    return [f"{path.name}: {problem}" for problem in problems]


def wrong_run(
    notebook: Any, tasks: list[Task], wrong: WrongAnswers
) -> tuple[list[tuple[int, str | None]], dict[int, tuple[str, str]]]:
    """The cells to run, wrong answers and their checks before each solution, and what the checks must say."""
    order: list[tuple[int, str | None]] = []
    expected: dict[int, tuple[str, str]] = {}
    by_blank = {task.blank: task for task in tasks}
    for number in range(len(notebook.cells)):
        task = by_blank.get(number)
        for answer, words in wrong.get(task.name, []) if task else []:
            assert task is not None
            order.append((number, answer))
            expected[len(order)] = (task.name, words)
            order += [(check, None) for check in task.checks]
        order.append((number, task.solution if task else None))
    return order, expected
