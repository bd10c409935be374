"""Pictures of attention weights: what stands where, one colour scale, and no trace left in pyplot."""

from __future__ import annotations

import copy
import io
import pickle

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import Tensor

from mha_lib import plot_attention
from tests.support import Draw

QUERIES, KEYS = ["the", "cat", "sat"], ["le", "chat", "est", "assis"]
PAGE_INCHES, SMALLEST_POINTS = 5.2, 8


def weights(*heads: int) -> Tensor:
    return Draw().normal(*heads, len(QUERIES), len(KEYS)).softmax(-1).float()


def panels(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.axes if axes.axison]


def texts(labels: list[Text]) -> list[str]:
    return [label.get_text() for label in labels]


def test_labels_say_who_reads_whom() -> None:
    (axes,) = panels(plot_attention(weights(), QUERIES, KEYS))
    assert texts(axes.get_yticklabels()) == QUERIES
    assert texts(axes.get_xticklabels()) == KEYS
    assert list(axes.get_yticks()) == [0, 1, 2]
    assert list(axes.get_xticks()) == [0, 1, 2, 3]
    assert "query" in axes.get_ylabel()
    assert "key" in axes.get_xlabel()


def test_keys_are_the_queries_unless_named() -> None:
    (axes,) = panels(plot_attention(torch.eye(3), QUERIES))
    assert texts(axes.get_xticklabels()) == QUERIES


def test_rows_are_queries_from_top_to_bottom() -> None:
    shown = weights()
    (axes,) = panels(plot_attention(shown, QUERIES, KEYS))
    (image,) = axes.images
    assert np.array_equal(np.asarray(image.get_array()), shown.numpy())
    bottom, top = axes.get_ylim()
    assert bottom > top


@pytest.mark.parametrize("heads", range(1, 8))
@pytest.mark.parametrize("columns", [1, 2, 3])
def test_one_panel_for_each_head(heads: int, columns: int) -> None:
    shown = weights(heads)
    figure = plot_attention(shown, QUERIES, KEYS, columns=columns)
    drawn = panels(figure)
    assert len(drawn) == heads
    for axes, panel in zip(drawn, shown, strict=True):
        assert np.array_equal(np.asarray(axes.images[0].get_array()), panel.numpy())
    titles = [axes.get_title() for axes in drawn]
    assert titles == ([f"head {head}" for head in range(heads)] if heads > 1 else [""])
    bottom = drawn[-min(columns, heads) :]
    assert all("key" in axes.get_xlabel() for axes in bottom)
    assert all("query" in axes.get_ylabel() for axes in drawn[::columns])


def test_titles_of_the_callers() -> None:
    figure = plot_attention(weights(2), QUERIES, KEYS, titles=["syntax", "position"])
    assert [axes.get_title() for axes in panels(figure)] == ["syntax", "position"]
    figure = plot_attention(weights(), QUERIES, KEYS, titles=["one"])
    assert [axes.get_title() for axes in panels(figure)] == ["one"]


def test_all_panels_share_one_colour_scale() -> None:
    shown = weights(3) * torch.tensor([1.0, 0.1, 0.0])[:, None, None]
    images = [axes.images[0] for axes in panels(plot_attention(shown, QUERIES, KEYS))]
    assert {image.get_clim() for image in images} == {(0, 1)}
    assert {image.get_cmap().name for image in images} == {"Blues"}


def test_numbers_in_the_cells() -> None:
    shown = torch.tensor([[0.0, 0.126, 0.874], [1.0, 0.5, 0.51]])
    (axes,) = panels(plot_attention(shown, ["a", "b"], ["c", "d", "e"], annotate=True))
    found = {tuple(map(int, text.get_position())): text for text in axes.texts}
    assert {place: text.get_text() for place, text in found.items()} == {
        (j, i): f"{shown[i, j].item():.2f}" for i in range(2) for j in range(3)
    }
    dark = {place for place, text in found.items() if text.get_color() == "white"}
    assert dark == {(2, 0), (0, 1), (2, 1)}
    (plain,) = panels(plot_attention(shown, ["a", "b"], ["c", "d", "e"]))
    assert not plain.texts


def test_leaves_no_trace_in_pyplot() -> None:
    assert plt.get_backend()
    numbers, settings = plt.get_fignums(), mpl.rcParams.copy()
    figure = plot_attention(weights(2), QUERIES, KEYS)
    assert plt.get_fignums() == numbers
    assert mpl.rcParams == settings
    assert type(figure) is Figure


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_takes_weights_as_attention_returns_them(dtype: torch.dtype) -> None:
    shown = weights(2).to(dtype).requires_grad_()
    (first, _) = panels(plot_attention(shown, QUERIES, KEYS))
    wanted = shown[0].detach().float().numpy()
    assert np.array_equal(np.asarray(first.images[0].get_array()), wanted)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_fits_the_page_and_can_be_read(heads: int) -> None:
    with plt.style.context("mha_lib.book"):
        figure = plot_attention(weights(heads), QUERIES, KEYS, annotate=True)
        figure.draw_without_rendering()
    assert figure.get_figwidth() <= PAGE_INCHES
    written = [text for text in figure.findobj(Text) if isinstance(text, Text) and text.get_text()]
    assert min(float(text.get_fontsize()) for text in written) >= SMALLEST_POINTS
    for axes in panels(figure):
        cell = axes.get_window_extent().width / len(KEYS)
        assert all(text.get_window_extent().width < cell for text in axes.texts)


def test_a_notebook_shows_it_before_its_first_use_of_pyplot() -> None:
    formatters = pytest.importorskip("IPython.core.formatters")
    data, _ = formatters.DisplayFormatter().format(plot_attention(weights(), QUERIES, KEYS))
    assert data["image/png"]


def test_figures_can_be_copied() -> None:
    figure = plot_attention(weights(2), QUERIES, KEYS)
    for twin in (copy.deepcopy(figure), pickle.loads(pickle.dumps(figure))):
        assert len(panels(twin)) == 2


def test_can_be_saved() -> None:
    file = io.BytesIO()
    plot_attention(weights(2), QUERIES, KEYS).savefig(file, format="png", dpi=50)
    assert plt.imread(io.BytesIO(file.getvalue())).std() > 0


def test_the_style_of_the_book_is_installed() -> None:
    with plt.style.context("mha_lib.book"):
        assert plt.rcParams["figure.figsize"][0] == PAGE_INCHES
        assert plt.rcParams["font.size"] >= SMALLEST_POINTS
        cycle = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    assert len(set(cycle)) == len(cycle) >= 6
