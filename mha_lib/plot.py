"""Pictures of attention weights. Needs matplotlib, the extra ``plot``. Shown in chapter 1 of the book."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from einops import rearrange
from torch import Tensor

from mha_lib._checks import check_bool, check_plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_attention(
    weights: Tensor,
    query_tokens: Sequence[str],
    key_tokens: Sequence[str] | None = None,
    *,
    titles: Sequence[str] | None = None,
    annotate: bool = False,
    columns: int = 2,
) -> Figure:
    """Draw attention weights as a heat map, one panel for each head.

    A row is a query: it shows where that token reads. All panels share one colour scale, from 0 (white) to 1 (dark
    blue), so that panels, and pictures, can be compared.

    Args:
        weights: Shape ``(i, j)`` or ``(h, i, j)``, numbers between 0 and 1.
        query_tokens: One label for each query, ``i`` of them.
        key_tokens: One label for each key, ``j`` of them; None means ``query_tokens``.
        titles: One title a panel; None means ``head 0``, ``head 1`` and so on, and no title for a single panel.
        annotate: Whether to write each weight into its cell.
        columns: Panels side by side.

    Returns:
        The figure, which a notebook displays; it is not shown otherwise and belongs to no window.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        TypeError: An argument has the wrong type.
        ValueError: The numbers of labels or titles do not fit ``weights``, or a weight is outside 0 .. 1.

    Example:
        >>> import torch
        >>> figure = plot_attention(torch.eye(2), ["the", "cat"])
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['the', 'cat']
    """
    from matplotlib.figure import Figure

    key_tokens = query_tokens if key_tokens is None else key_tokens
    check_plot(weights, query_tokens, key_tokens, titles, columns)
    check_bool("annotate", annotate)
    panels = weights.detach().float().cpu()
    panels = panels if panels.ndim == 3 else rearrange(panels, "i j -> 1 i j")
    if titles is None:
        titles = [f"head {head}" for head in range(len(panels))] if len(panels) > 1 else [""]

    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    width = 5.2 / columns
    height = 1.0 + (width - 0.6) * len(query_tokens) / len(key_tokens)
    figure = Figure(figsize=(5.2 if columns > 1 else 4.2, rows * height), layout="constrained")
    figure.__dict__["_repr_png_"] = partial(_png, figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, panel, title in zip(grid.flat, panels, titles, strict=False):
        _draw_panel(axes, panel, query_tokens, key_tokens, annotate=annotate)
        axes.set_title(title, parse_math=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for column, axes in enumerate(grid[-1]):
        axes = axes if axes.axison else grid[-2, column]
        axes.set_xlabel("key (is read)")
    for axes in grid[:, 0]:
        axes.set_ylabel("query (reads)")
    return figure


def _png(figure: Figure) -> bytes:
    """What a notebook shows, also before its first use of pyplot."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", bbox_inches="tight")
    return picture.getvalue()


def _draw_panel(
    axes: Axes,
    panel: Tensor,
    query_tokens: Sequence[str],
    key_tokens: Sequence[str],
    *,
    annotate: bool,
) -> None:
    """One heat map; dark cells carry white numbers."""
    axes.imshow(panel.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="equal")
    upright = max(map(len, key_tokens)) <= 2
    axes.set_xticks(
        range(len(key_tokens)), key_tokens, rotation=0 if upright else 90, parse_math=False
    )
    axes.set_yticks(range(len(query_tokens)), query_tokens, parse_math=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if annotate:
        for i, row in enumerate(panel.tolist()):
            for j, weight in enumerate(row):
                colour = "white" if weight > 0.5 else "black"
                axes.text(
                    j, i, f"{weight:.2f}", ha="center", va="center", color=colour, fontsize="small"
                )
