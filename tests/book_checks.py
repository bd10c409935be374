"""What must hold for each page of the book. Every check takes a path and returns a list of problems."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat

from tools.notebook import KERNELSPEC, clean
from tools.toc import toc_pages

ALLOWED_TAGS = {
    "blank",
    "check",
    "figures",
    "hide-cell",
    "hide-input",
    "hide-output",
    "nbval-ignore-output",
    "raises-exception",
    "remove-cell",
    "remove-input",
    "rules",
    "verdicts",
}
MOST_IGNORED_CELLS = 8
LARGEST_NOTEBOOK = 1_500_000
NBVAL_MARKER = re.compile(r"#\s*(?:NBVAL|PYTEST_VALIDATE)_\w+")
ABSOLUTE_PATH = re.compile(
    r"(?<![\w.:/~-])/(?:work|home|tmp|root|usr|opt|var|mnt|private|Users)\b/?|\b[A-Z]:\\\w"
)
EMOJI = re.compile("[\U0001f000-\U0001faff\u2600-\u26ff\u2705\u274c\u2728\u2b50\u2b55\ufe0f]")
IMAGE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)|<img\b")

WORDS = re.compile(
    r"\b(?:powerful|crucial\w*|seamless\w*|leverag\w+|delv(?:e[sd]?|ing)|unlock\w*|game.chang\w+"
    r"|state.of.the.art|cutting.edge|it is important to note|let['\u2019]?s dive"
    r"|in this chapter,? we will|lorem ipsum|coming soon|placeholders?|TODO|FIXME|XXX)\b",
    re.IGNORECASE,
)
LEAKS = re.compile(r"(?<![\w/])/(?:home|Users|root|tmp|work)/|\b[A-Z]:\\\\?Users\b")
"""Paths of somebody's machine."""


def read(path: Path) -> Any:
    """The notebook at ``path``."""
    return nbformat.read(path, as_version=4)


def code_cells(notebook: Any) -> Iterator[tuple[int, Any]]:
    """Each code cell with its number on the page."""
    return ((n, cell) for n, cell in enumerate(notebook.cells) if cell.cell_type == "code")


def outputs_of(notebook: Any, kind: str) -> Iterator[tuple[int, Any]]:
    """Each output of one type with the number of its cell."""
    for number, cell in code_cells(notebook):
        for output in cell.outputs:
            if output.output_type == kind:
                yield number, output


def tags_of(cell: Any) -> list[str]:
    """The tags of a cell."""
    return list(cell.metadata.get("tags", []))


def text_of(output: Any) -> str:
    """The text of an output, whatever its type."""
    data = output.get("data", {})
    texts = [text for kind, text in data.items() if kind.startswith("text/")]
    return "\n".join([output.get("text", ""), output.get("evalue", ""), *map(str, texts)])


def hygiene(path: Path) -> list[str]:
    """What is wrong with a notebook as a file, before anyone runs it."""
    if not path.exists():
        return [f"{path.name}: does not exist"]
    if path.stat().st_size > LARGEST_NOTEBOOK:
        return [f"{path.name}: {path.stat().st_size} bytes, more than {LARGEST_NOTEBOOK}"]
    notebook = read(path)
    problems = [
        *format_problems(notebook),
        *execution_problems(notebook),
        *output_problems(notebook),
        *tag_problems(notebook),
        *figure_problems(notebook),
        *tidiness_problems(path),
        *content_problems(notebook),
    ]
    return [f"{path.name}: {problem}" for problem in problems]


def format_problems(notebook: Any) -> list[str]:
    """Is it a valid notebook for the kernel that everybody has?"""
    problems = []
    try:
        nbformat.validate(copy.deepcopy(notebook))
    except nbformat.ValidationError as error:
        problems.append(f"not a valid notebook: {error.message}")
    if notebook.metadata.get("kernelspec") != KERNELSPEC:
        problems.append(f"kernelspec is {notebook.metadata.get('kernelspec')}, not python3")
    return problems


def execution_problems(notebook: Any) -> list[str]:
    """Was it run once, from top to bottom, and saved with its outputs?"""
    problems = [
        f"cell {n}: no source" for n, cell in code_cells(notebook) if not cell.source.strip()
    ]
    counts = [cell.execution_count for _, cell in code_cells(notebook)]
    if counts != list(range(1, len(counts) + 1)):
        problems.append(f"execution counts are {counts}, not 1 to {len(counts)}")
    if not any(cell.outputs for _, cell in code_cells(notebook)):
        problems.append("no cell has an output")
    return problems


def output_problems(notebook: Any) -> list[str]:
    """Errors where none is announced, none where one is, and stderr."""
    problems = []
    for number, cell in code_cells(notebook):
        errors = [output.ename for output in cell.outputs if output.output_type == "error"]
        announced = "raises-exception" in tags_of(cell)
        if errors and not announced:
            problems.append(f"cell {number}: stored error {errors[0]}")
        if announced and not errors:
            problems.append(f"cell {number}: tagged raises-exception, but stores no error")
    for number, output in outputs_of(notebook, "stream"):
        if output.name == "stderr":
            problems.append(f"cell {number}: stored stderr {output.text[:60]!r}")
    return problems


def tag_problems(notebook: Any) -> list[str]:
    """Only known tags; nothing that switches a comparison off unseen."""
    problems = []
    for number, cell in enumerate(notebook.cells):
        for tag in sorted(set(tags_of(cell)) - ALLOWED_TAGS):
            problems.append(f"cell {number}: tag {tag} is not allowed")
    for number, cell in code_cells(notebook):
        if marker := NBVAL_MARKER.search(cell.source):
            problems.append(f"cell {number}: comment {marker[0]} is not allowed")
    ignored = sum("nbval-ignore-output" in tags_of(cell) for cell in notebook.cells)
    if ignored > MOST_IGNORED_CELLS:
        problems.append(f"{ignored} cells are not compared, more than {MOST_IGNORED_CELLS}")
    return problems


def ignored_cells(path: Path) -> list[str]:
    """The cells whose output is not compared: where they stand, and their first line."""
    return [
        f"{path.name} cell {number}: {cell.source.splitlines()[0]}"
        for number, cell in code_cells(read(path))
        if "nbval-ignore-output" in tags_of(cell)
    ]


def figure_problems(notebook: Any) -> list[str]:
    """Each figure needs words for those who do not see it, and a caption."""
    problems = []
    for number, cell in code_cells(notebook):
        kinds = {kind for output in cell.outputs for kind in output.get("data", {})}
        if not any(kind.startswith("image/") for kind in kinds):
            continue
        mystnb = cell.metadata.get("mystnb", {})
        if not str(mystnb.get("image", {}).get("alt", "")).strip():
            problems.append(f"cell {number}: a figure without alt text")
        if not str(mystnb.get("figure", {}).get("caption", "")).strip():
            problems.append(f"cell {number}: a figure without caption")
    return problems


def tidiness_problems(path: Path) -> list[str]:
    """Is the file what tools/notebook.py saves?"""
    text = path.read_text(encoding="utf-8")
    stored = json.loads(text)
    cleaned = json.loads(nbformat.writes(clean(nbformat.reads(text, as_version=4))))
    problems = []
    for number, (old, new) in enumerate(zip(stored["cells"], cleaned["cells"], strict=True)):
        for part in sorted(old.keys() | new.keys()):
            if old.get(part) != new.get(part):
                problems.append(f"cell {number}: {part} is not what tools/notebook.py saves")
    for part in ("metadata", "nbformat", "nbformat_minor"):
        if stored[part] != cleaned[part]:
            problems.append(f"notebook {part} is not what tools/notebook.py saves")
    return problems


def content_problems(notebook: Any) -> list[str]:
    """Paths of somebody's machine, emoji, and images that a lone notebook would lack."""
    problems = []
    for number, cell in enumerate(notebook.cells):
        text = "\n".join([cell.source, *map(text_of, cell.get("outputs", []))])
        if path := ABSOLUTE_PATH.search(text):
            problems.append(f"cell {number}: absolute path {path[0]}")
        if emoji := EMOJI.search(text):
            problems.append(f"cell {number}: emoji {emoji[0]}")
        if cell.cell_type == "markdown" and (image := IMAGE.search(cell.source)):
            problems.append(f"cell {number}: image file {image[0]}")
    return problems


def prose_problems(path: Path) -> list[str]:
    """Words that the book does without, and words about how it was made."""
    problems = []
    for where, text in page_texts(path):
        for pattern in (WORDS, LEAKS):
            problems += [f"{path.name}{where}: {found[0]!r}" for found in pattern.finditer(text)]
    return problems


def page_texts(path: Path) -> Iterator[tuple[str, str]]:
    """All text of a page, with its place."""
    if path.suffix != ".ipynb":
        yield "", path.read_text(encoding="utf-8")
        return
    for number, cell in enumerate(read(path).cells):
        yield f" cell {number}", "\n".join([cell.source, *map(text_of, cell.get("outputs", []))])


FENCE = re.compile(
    r"\s*(?P<ticks>`{3,}|~{3,}|:{3,})\s*(?:\{(?P<directive>[^}]+)\})?(?P<rest>[^`]*)"
)
CODE_DIRECTIVES = {
    "bibliography",
    "code",
    "code-block",
    "code-cell",
    "eval-rst",
    "literalinclude",
    "math",
    "mermaid",
    "raw",
}
OPTION = re.compile(r"\s*:[\w-]+:(?:\s|$)")
NOT_PROSE = [
    re.compile(r"<!--.*?-->", re.DOTALL),
    re.compile(r"\$\$.*?\$\$", re.DOTALL),
    re.compile(r"\\begin\{(\w+\*?)\}.*?\\end\{\1\}", re.DOTALL),
    re.compile(r"(?:\{[\w:-]+\})?(`+).+?\1", re.DOTALL),
    re.compile(r"(?<!\\)\$(?=\S)(?:[^$\\]|\\.)+?\$", re.DOTALL),
    re.compile(r"\]\([^)]*\)"),
    re.compile(r"<?https?://[^\s>)]+>?"),
    re.compile(r"</?\w+[^>]*>"),
    re.compile(r"^\([\w-]+\)=$", re.MULTILINE),
    re.compile(r"^# \d+(?:\.\d+)+ ", re.MULTILINE),
]
REFERENCE = re.compile(
    r"\b(?:sections?|chapters?|figures?|tables?|equations?|versions?|Python|PyTorch|CUDA|CC BY)\s+\d+(?:\.\d+)+",
    re.IGNORECASE,
)
DECIMAL = re.compile(r"(?<![\w.])\d+\.\d+(?!\.?\d)")
PERCENTAGE = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)\s*(?:%|per ?cent\b)")


def number_problems(path: Path) -> list[str]:
    """Decimal numbers and percentages in the prose that no cell of the notebook shows."""
    notebook = read(path)
    shown = "\n".join(
        text
        for _, cell in code_cells(notebook)
        for text in [cell.source, *map(text_of, cell.outputs)]
    )
    decimals, percentages = set(DECIMAL.findall(shown)), set(PERCENTAGE.findall(shown))
    problems = []
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            prose = REFERENCE.sub(" ", prose_of(cell.source))
            claimed = [
                f"{found}%" for found in PERCENTAGE.findall(prose) if found not in percentages
            ]
            claimed += [
                found
                for found in DECIMAL.findall(PERCENTAGE.sub(" ", prose))
                if found not in decimals
            ]
            problems += [f"{path.name} cell {number}: no cell shows {found}" for found in claimed]
    return problems


def prose_of(markdown: str) -> str:
    """The text without code, math, options, targets and addresses."""
    text = "\n".join(lines_outside_code(markdown))
    for pattern in NOT_PROSE:
        text = pattern.sub(" ", text)
    return text


def lines_outside_code(markdown: str) -> Iterator[str]:
    """Lines outside fences of code; directives such as exercises hold prose, after their options."""
    directives: list[str] = []
    code, in_options = "", False
    for line in markdown.splitlines():
        fence = FENCE.fullmatch(line)
        if code:
            code = "" if closes(line, code) else code
        elif fence is None:
            in_options = in_options and OPTION.match(line) is not None
            if not in_options:
                yield line
        elif directives and closes(line, directives[-1]):
            directives.pop()
        elif fence["directive"] and fence["directive"] not in CODE_DIRECTIVES:
            directives.append(fence["ticks"])
            in_options = True
            yield fence["rest"]
        else:
            code = fence["ticks"]


def closes(line: str, opening: str) -> bool:
    """Does this line end the fence that was opened so?"""
    marks = line.strip()
    return set(marks) == {opening[0]} and len(marks) >= len(opening)


def toc_problems(root: Path) -> list[str]:
    """Pages that the table of contents names and that do not exist, or the other way round."""
    named = set(toc_pages(root))
    there = {path for path in (root / "book").glob("*.*") if path.suffix in (".md", ".ipynb")}
    missing = [f"{path.name}: in _toc.yml, but does not exist" for path in sorted(named - there)]
    return missing + [f"{path.name}: not in _toc.yml" for path in sorted(there - named)]
