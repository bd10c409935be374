"""An interactive view of the split into heads and of the way back, right and wrong. Shown in chapter 4 of the book."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from importlib.resources import files
from string import Template
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from mha_lib._checks import _as_int, _check_labels, check_int
from mha_lib.explore import AttentionView

MOST_NUMBERS = 256
STEPS = {
    "packed": "One row is one token. In it the features of the heads lie side by side.",
    "split": "Each row is cut into heads. Read line by line, the numbers have kept their order.",
    "heads first": "Each block is one head, each row in it one token: what attention needs.",
    "merge": "The rows of the heads are laid side by side again: one row is one token.",
}
MISTAKES = {
    "split": "split by view",
    "merge": "merge by reshape",
    "both": "both mistakes",
}
UNDONE = (
    "The second mistake has undone the first: a round trip looks right, "
    "though attention in between has read rows of other tokens and heads."
)


def explore_split(
    tokens: int | Sequence[str] = 4, num_heads: int = 2, head_dim: int = 3
) -> AttentionView:
    """Let the reader follow each number from the packed projection into the heads and back, right and wrong.

    The numbers count the features of a packed projection of shape ``(b, n, h d)`` with one sample. Beside the right
    way stands a wrong one, with the count of the numbers that it puts in another place than their own: a split by
    ``view(b, h, n, d)``, a merge by ``reshape(b, n, h * d)``, or both. Works as :func:`mha_lib.explore_attention`
    does; without JavaScript a table of the lines of code and the counts is left.

    Args:
        tokens: How many tokens, ``n``, or one label for each.
        num_heads: Number of heads, ``h``.
        head_dim: Features of one head, ``d``.

    Returns:
        A view that notebooks display; ``.html`` is the fragment.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A size is below 1, or there are more than 256 numbers to draw.

    Example:
        >>> view = explore_split(["the", "cat", "sat", "down"], num_heads=2, head_dim=3)
        >>> "18 of 24" in view.html, "http" in view.html
        (True, False)
    """
    names = _names(tokens)
    sizes = {
        "n": check_int("tokens", len(names) or tokens, minimum=1),
        "h": check_int("num_heads", num_heads, minimum=1),
        "d": check_int("head_dim", head_dim, minimum=1),
    }
    if sizes["n"] * sizes["h"] * sizes["d"] > MOST_NUMBERS:
        raise ValueError(
            f"tokens * num_heads * head_dim must be at most {MOST_NUMBERS}, so that it can be drawn, "
            f"got {' * '.join(map(str, sizes.values()))}"
        )
    steps = _steps(**sizes)
    payload = {"tokens": names, "sizes": sizes, "mistakes": MISTAKES, "steps": steps}
    template = Template(files("mha_lib").joinpath("explore_split.html").read_text(encoding="utf-8"))
    fragment = template.substitute(payload=html.escape(json.dumps(payload)), rows=_table(steps))
    return AttentionView(fragment)


def _names(tokens: object) -> list[str]:
    """The labels of the tokens; none if only their number is given."""
    if isinstance(tokens, str) or not isinstance(tokens, Sequence):
        _as_int("tokens", tokens, "an int or a sequence of strings")
        return []
    _check_labels("tokens", tokens, len(tokens))
    if not tokens:
        raise ValueError("tokens must hold at least 1 string, got 0")
    return list(tokens)


def _steps(n: int, h: int, d: int) -> list[dict[str, Any]]:
    """The four steps, each with its layout on the right path and on every wrong one."""

    def layout(x: Tensor, code: str, pattern: str, note: str = "") -> dict[str, Any]:
        after = pattern.split(" -> ")[1]
        axes = [axis.strip("()") for axis in re.findall(r"\(.*?\)|\w", after)]
        by_home = rearrange(x, f"{after} -> (b n h d)", n=n, h=h)
        return {
            "code": code,
            "pattern": pattern,
            "axes": list(zip(axes, x.shape, strict=True)),
            "numbers": x.flatten().tolist(),
            "misplaced": int((by_home != packed.flatten()).sum()),
            "note": note,
        }

    def right(name: str, x: Tensor, pattern: str) -> tuple[Tensor, dict[str, Any]]:
        x = rearrange(x, pattern, h=h)
        size = ", h=h" if "(h d) ->" in pattern else ""
        return x, layout(x, f'rearrange({name}, "{pattern}"{size})', pattern)

    packed = torch.arange(n * h * d).view(1, n, h * d)
    start = layout(packed, "packed = projection(x)", "b n e -> b n (h d)")
    _, cut = right("packed", packed, "b n (h d) -> b n h d")
    heads, moved = right("packed", packed, "b n (h d) -> b h n d")
    _, merged = right("heads", heads, "b h n d -> b n (h d)")

    viewed = packed.view(1, h, n, d)
    view = layout(viewed, "packed.view(b, h, n, d)", "(b h n d) -> b h n d")
    _, view_merged = right("heads", viewed, "b h n d -> b n (h d)")
    note = UNDONE if view["misplaced"] else ""
    reshape, as_read = "heads.reshape(b, n, h * d)", "(b n h d) -> b n (h d)"
    merge = layout(heads.reshape(1, n, h * d), reshape, as_read)
    undone = layout(viewed.reshape(1, n, h * d), reshape, as_read, note)
    paths = {
        "split": [start, view, view, view_merged],
        "merge": [start, cut, moved, merge],
        "both": [start, view, view, undone],
    }
    good = [start, cut, moved, merged]
    return [
        {
            "name": name,
            "says": says,
            "right": good[at],
            "wrong": {mistake: path[at] for mistake, path in paths.items()},
        }
        for at, (name, says) in enumerate(STEPS.items())
    ]


def _table(steps: Sequence[dict[str, Any]]) -> str:
    """Rows of HTML: each step, its line of code, and what the mistakes misplace."""
    rows = []
    for step in steps:
        counts = ", ".join(
            f"{MISTAKES[mistake]} {layout['misplaced']} of {len(layout['numbers'])}"
            for mistake, layout in step["wrong"].items()
        )
        cells = f"<td><code>{html.escape(step['right']['code'])}</code></td><td>{counts}</td>"
        rows.append(f'<tr><th scope="row">{step["name"]}</th>{cells}</tr>')
    return "\n".join(rows)
