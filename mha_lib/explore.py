"""An interactive view of attention weights in one piece of HTML. Shown in chapter 3 of the book."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from string import Template

import torch
from torch import Tensor

from mha_lib._checks import check_choice, check_explored, check_index

VIEWS = ("lines", "matrix")


@dataclass(frozen=True, repr=False)
class AttentionView:
    """What :func:`mha_lib.explore_attention` returns; a notebook shows it by itself.

    Attributes:
        html: A fragment that needs nothing else: no network, no server, no other part of the page.
    """

    html: str

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return "AttentionView"


def explore_attention(
    weights: Tensor | Sequence[Tensor],
    tokens: Sequence[str],
    key_tokens: Sequence[str] | None = None,
    *,
    layer: int = 0,
    head: int = 0,
    query: int = 0,
    view: str = "lines",
    caption: str = "Attention weights",
) -> AttentionView:
    """Let the reader walk through attention weights: layers, heads, tokens, as lines or as a matrix.

    Works in a notebook, in Colab and in a plain page, by mouse and by keyboard, in light and dark. Without JavaScript
    a picture and a table of the first choice are left. Weights are kept as bytes, so what is shown is right to 0.002.

    Args:
        weights: Shape ``(i, j)``, ``(h, i, j)`` or ``(layers, h, i, j)``, numbers between 0 and 1; or one tensor
            ``(h, i, j)`` a layer.
        tokens: One label for each query, ``i`` of them.
        key_tokens: One label for each key, ``j`` of them; None means ``tokens``.
        layer: The layer that is shown first.
        head: The head that is shown first.
        query: The query that is chosen first.
        view: ``"lines"`` or ``"matrix"``, what is shown first.
        caption: A sentence above.

    Returns:
        A view that notebooks display; ``.html`` is the fragment.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The numbers of labels do not fit ``weights``, a weight is outside 0 .. 1, or there is no such layer,
            head or query.

    Example:
        >>> import torch
        >>> view = explore_attention(torch.eye(2), ["the", "cat"])
        >>> "<script>" in view.html, "http" in view.html
        (True, False)
    """
    key_tokens = tokens if key_tokens is None else key_tokens
    stacked = check_explored(weights, tokens, key_tokens, caption)
    shape = stacked.shape
    start = {
        "layer": check_index("layer", layer, shape[0]),
        "head": check_index("head", head, shape[1]),
        "at": check_index("query", query, shape[2]),
        "view": view,
        "scale": "weights",
    }
    check_choice("view", view, VIEWS)
    steps = (stacked.float() * 255).round().to(torch.uint8)
    template = Template(files("mha_lib").joinpath("explore.html").read_text(encoding="utf-8"))
    fragment = template.substitute(
        shape=json.dumps(list(shape)),
        weights=base64.b64encode(bytes(steps.flatten().tolist())).decode(),
        queries=html.escape(json.dumps(list(tokens))),
        keys=html.escape(json.dumps(list(key_tokens))),
        start=html.escape(json.dumps(start)),
        caption=html.escape(caption),
        first=f"layer {layer}, head {head}",
        width=shape[3],
        height=shape[2],
        pixels=min(16 * shape[3], 480),
        picture=_picture(steps[layer, head]),
        rows=_table(steps[layer, head], tokens, key_tokens),
    )
    return AttentionView(fragment)


def _picture(steps: Tensor) -> str:
    """A heat map as SVG, in fifteen shades: cells of the same shade are one path."""
    shades = (steps.int() + 8) // 17
    paths = []
    for shade in range(1, 16):
        cells = (shades == shade).nonzero().tolist()
        outline = "".join(f"M{j} {i}h1v1h-1z" for i, j in cells)
        if cells:
            paths.append(f'<path fill="#2f7fd6" fill-opacity="{shade / 15:.2f}" d="{outline}"/>')
    return "\n".join(paths)


def _table(steps: Tensor, tokens: Sequence[str], key_tokens: Sequence[str], most: int = 3) -> str:
    """Rows of HTML: each query and the keys with the largest weights."""
    values, places = steps.topk(min(most, steps.shape[-1]), dim=-1)
    rows = []
    for token, row, columns in zip(tokens, values.tolist(), places.tolist(), strict=True):
        read = ", ".join(
            f"{key_tokens[j]} {value / 255:.0%}"
            for value, j in zip(row, columns, strict=True)
            if value
        )
        rows.append(
            f'<tr><th scope="row">{html.escape(token)}</th><td>{html.escape(read)}</td></tr>'
        )
    return "\n".join(rows)
