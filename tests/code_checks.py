"""The book's code is the library's code: what each must show of the other, as lists of problems."""

from __future__ import annotations

import ast
import copy
import difflib
import inspect
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.book_checks import code_cells, read, tags_of

NOT_SHOWN = {"_checks", "__init__"}
FIRST_LINE = re.compile(r"# mha_lib/(\w+)\.py")
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Cell:
    """A code cell of a notebook."""

    place: str
    source: str
    tags: tuple[str, ...]

    @property
    def module(self) -> str | None:
        """The library module that the cell says it is a part of."""
        match = FIRST_LINE.fullmatch(self.source.partition("\n")[0].rstrip())
        return match[1] if match else None

    @property
    def python(self) -> str:
        """The code without the lines that only a notebook understands."""
        lines = self.source.splitlines()
        return "\n".join("" if line.lstrip()[:1] in ("%", "!") else line for line in lines)

    @property
    def tree(self) -> ast.Module:
        """The syntax tree; an empty one where there is none."""
        return ast.Module([], []) if self.error else ast.parse(self.python)

    @property
    def error(self) -> str | None:
        """Why the code cannot be parsed."""
        try:
            ast.parse(self.python)
        except SyntaxError as error:
            return str(error)
        return None


def cells_of(notebook: Path) -> list[Cell]:
    """The code cells of a notebook."""
    return [
        Cell(f"{notebook.name} cell {number}", cell.source, tuple(tags_of(cell)))
        for number, cell in code_cells(read(notebook))
    ]


def library(package: Path) -> dict[str, ast.Module]:
    """The modules that the book shows."""
    paths = (path for path in sorted(package.glob("*.py")) if path.stem not in NOT_SHOWN)
    return {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def shown_parts(tree: ast.Module) -> dict[str, ast.stmt]:
    """Definitions, constants and other statements by name; no imports, texts, typing blocks or overload stubs."""
    parts: dict[str, ast.stmt] = {}
    for node in statements(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) or is_for_types(node) or is_overload(node):
            continue
        if is_text(node):
            continue
        parts[name_of(node)] = node
    return parts


def statements(tree: ast.Module) -> list[ast.stmt]:
    """What stands at the top level, without the docstring."""
    return tree.body[1:] if ast.get_docstring(tree) is not None else tree.body


def name_of(node: ast.stmt) -> str:
    """What a top-level statement defines; for any other statement, its code."""
    if isinstance(node, Definition):
        return node.name
    if isinstance(node, ast.Assign):
        return ", ".join(ast.unparse(target) for target in node.targets)
    return ast.unparse(node.target if isinstance(node, ast.AnnAssign) else node)


def is_text(node: ast.stmt) -> bool:
    """Is it a string that explains the constant above?"""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def is_for_types(node: ast.stmt) -> bool:
    """Is it a block that only a type checker reads?"""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def is_overload(node: ast.AST) -> bool:
    """Is it a stub that only a type checker reads?"""
    decorators = node.decorator_list if isinstance(node, ast.FunctionDef) else []
    return any(ast.unparse(decorator).endswith("overload") for decorator in decorators)


def comparable(node: ast.stmt) -> str:
    """The code, formatted in one way, with the first lines of its docstrings."""
    node = copy.deepcopy(node)
    for part in ast.walk(node):
        if isinstance(part, Definition):
            doc = ast.get_docstring(part)
            if doc is not None:
                part.body[0] = ast.Expr(ast.Constant(inspect.cleandoc(doc).partition("\n")[0]))
            part.body = [child for child in part.body if not is_overload(child)]
    return ast.unparse(ast.fix_missing_locations(node))


def imports_of(tree: ast.Module) -> set[str]:
    """The top-level imports, one string for each imported name; typing blocks count."""
    return {
        ast.unparse(type(node)(**{**vars(node), "names": [alias]}))
        for node in top_level(tree.body)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }


def top_level(nodes: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements, those in typing blocks too."""
    for node in nodes:
        yield from node.body if isinstance(node, ast.If) and is_for_types(node) else [node]


def code_problems(package: Path, notebooks: list[Path]) -> list[str]:
    """Where the finished cells of the notebooks and the library differ."""
    modules = library(package)
    cells = [cell for notebook in notebooks for cell in cells_of(notebook)]
    finished = [cell for cell in cells if cell.module is not None]
    return [
        *(f"{cell.place}: not Python: {cell.error}" for cell in cells if cell.error),
        *(problem for cell in finished for problem in cell_problems(cell, modules)),
        *missing_or_repeated(finished, modules),
        *redefinitions(cells, modules),
    ]


def cell_problems(cell: Cell, modules: dict[str, ast.Module]) -> list[str]:
    """Where one finished cell differs from its module."""
    if cell.module not in modules:
        return [f"{cell.place}: the book shows no module {cell.module}.py"]
    module = modules[cell.module]
    theirs = shown_parts(module)
    problems = [
        f"{cell.place}: {cell.module}.py does not import it so: {line}"
        for line in sorted(imports_of(cell.tree) - imports_of(module))
    ]
    for name, node in shown_parts(cell.tree).items():
        if name not in theirs:
            problems.append(f"{cell.place}: {cell.module}.py has no {name}")
        elif comparable(node) != comparable(theirs[name]):
            difference = "\n".join(unequal_lines(comparable(theirs[name]), comparable(node)))
            problems.append(f"{cell.place}: {name} differs from {cell.module}.py\n{difference}")
    return problems


def unequal_lines(library_code: str, book_code: str) -> Iterator[str]:
    """The lines that differ: - library, + book."""
    lines = difflib.unified_diff(
        library_code.splitlines(), book_code.splitlines(), lineterm="", n=0
    )
    return (line for line in lines if not line.startswith(("---", "+++", "@@")))


def missing_or_repeated(finished: list[Cell], modules: dict[str, ast.Module]) -> list[str]:
    """What the library has and the book does not show exactly once."""
    places: dict[tuple[str, str], list[str]] = defaultdict(list)
    for cell in finished:
        for node in statements(cell.tree):
            places[str(cell.module), name_of(node)].append(cell.place)
    problems = []
    for module, tree in modules.items():
        for name in shown_parts(tree):
            shown = places[module, name]
            if not shown:
                problems.append(f"{module}.py: {name} is shown in no notebook")
            if len(shown) > 1:
                problems.append(
                    f"{module}.py: {name} is shown {len(shown)} times: {', '.join(shown)}"
                )
    return problems


def redefinitions(cells: list[Cell], modules: dict[str, ast.Module]) -> list[str]:
    """Drafts under the name of something public; a blank for the reader to fill may have it."""
    public = {name for tree in modules.values() for name in shown_parts(tree) if name[0] != "_"}
    return [
        f"{cell.place}: redefines {node.name}"
        for cell in cells
        if cell.module is None and "blank" not in cell.tags
        for node in cell.tree.body
        if isinstance(node, Definition) and node.name in public
    ]


LENT = {"RotaryEmbedding", "explore_attention"}
"""Chapter 6 loads models with rotary positions, built in chapter 8; chapter 1 shows a view, built in chapter 3."""


def import_problems(package: Path, notebooks: list[Path]) -> list[str]:
    """Names that a notebook imports from the library before a notebook, itself included, has built them.

    Those of ``LENT`` may come early: the pages that do so say where they are built.
    """
    home = {
        name: index
        for index, notebook in enumerate(notebooks)
        for cell in cells_of(notebook)
        if cell.module is not None
        for name in shown_parts(cell.tree)
    }
    public = {name for tree in library(package).values() for name in shown_parts(tree)}
    return [
        f"{cell.place}: imports {name}, which is not built yet"
        for index, notebook in enumerate(notebooks)
        for cell in cells_of(notebook)
        for name in library_imports(cell.tree)
        if name in public - LENT and home.get(name, len(notebooks)) > index
    ]


def library_imports(tree: ast.Module) -> list[str]:
    """The names that a cell imports from the library."""
    return [
        alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "mha_lib"
        for alias in node.names
    ]
