"""Draw the book's picture, two heads on one sentence, from the weights that chapter 2 computes.

Usage: python -m tools.picture book/_static/two_heads.svg
"""

from __future__ import annotations

import html
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import nbformat
import torch
from einops import einsum
from torch import Tensor

CHAPTER = Path(__file__).resolve().parent.parent / "book" / "02_simple_implementation.ipynb"
READER = "it"
STEP, LEFT, LINE, SIZE = 76, 48, 166, (780, 262)
COLOURS = {"who": "#0072B2", "how": "#B84A00"}
LEAST = 0.05  # of the weight, to be drawn


def two_heads() -> tuple[list[str], dict[str, list[float]]]:
    """The sentence, and for each head what its reader reads, as the cell of the chapter has it."""
    cells = nbformat.read(CHAPTER, as_version=4).cells
    (cell,) = (cell for cell in cells if "maps.append(weights)" in cell.source)
    names: dict[str, Any] = {"torch": torch, "einsum": einsum, "Tensor": Tensor}
    with redirect_stdout(None):
        exec(cell.source, names)
    sentence: list[str] = names["sentence"]
    rows = (weights[0, sentence.index(READER)].tolist() for weights in names["maps"])
    return sentence, dict(zip(names["heads"], rows, strict=True))


def arcs(name: str, weights: list[float], start: int, side: int) -> list[str]:
    """One head: curves from the reader to what it reads, above (side -1) or below (side 1) the line."""
    drawn = []
    for place, weight in enumerate(weights):
        if weight < LEAST:
            continue
        near, far = (LEFT + STEP * at for at in (start, place))
        edge, peak = LINE + 20 * side, LINE + (34 + 22 * abs(place - start)) * side
        drawn.append(
            f'<path d="M{near} {edge}C{near} {peak} {far} {peak} {far} {edge}" fill="none" '
            f'stroke="{COLOURS[name]}" stroke-width="{1 + 9 * weight:.1f}" stroke-linecap="round"/>'
        )
        top = edge + 0.75 * (peak - edge) + (18 if side > 0 else -10)
        drawn.append(
            f'<text x="{(near + far) / 2:g}" y="{top:g}" fill="{COLOURS[name]}">{weight:.2f}</text>'
        )
    return drawn


def draw(sentence: list[str], heads: dict[str, list[float]]) -> str:
    """The picture as SVG."""
    start = sentence.index(READER)
    sides = dict(zip(heads, (-1, 1), strict=True))
    words = [
        f'<text x="{LEFT + STEP * place}" y="{LINE + 6}" '
        f'font-weight="{700 if place == start else 400}">{html.escape(word)}</text>'
        for place, word in enumerate(sentence)
    ]
    labels = [
        f'<text x="24" y="{LINE + (70 if side > 0 else -118) + 6}" fill="{COLOURS[name]}" font-weight="700" '
        f'style="text-anchor:start">head “{name}”</text>'
        for name, side in sides.items()
    ]
    curves = [line for name in heads for line in arcs(name, heads[name], start, sides[name])]
    read = {name: sentence[weights.index(max(weights))] for name, weights in heads.items()}
    says = ", ".join(f"{READER} reads {word} in head {name}" for name, word in read.items())
    width, height = SIZE
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
            f'font-family="system-ui, sans-serif" font-size="17" style="text-anchor:middle">',
            f"<title>Two heads on one sentence: {says}.</title>",
            f'<rect width="{width}" height="{height}" rx="10" fill="#fff"/>',
            *curves,
            '<g fill="#1a1a1a">',
            *words,
            "</g>",
            *labels,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(draw(*two_heads()), encoding="utf-8")
