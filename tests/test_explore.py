"""The interactive view: what the fragment holds, that nothing in it runs or is fetched, and how large it is."""

from __future__ import annotations

import base64
import html
import json
import re
from html.parser import HTMLParser

import pytest
import torch
from torch import Tensor

from conftest import view_distance, without_weights
from mha_lib import explore_attention
from tests.support import Draw

TOKENS = ["the", "cat", "sat"]
HOSTILE = ['<script>alert("1")</script>', "</script>", "<!--", "'\"&amp;", " ", "\n", "猫", "]]>"]
COMMITTED_BYTES, LARGE_BYTES = 200_000, 1_500_000


class Attributes(HTMLParser):
    """Attributes of the view's own element, the text of its table, and how many scripts there are."""

    def __init__(self, fragment: str) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self.scripts = 0
        self.stack: list[str] = []
        self.text = ""
        self.feed(fragment)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.stack.append(tag)
        self.scripts += tag == "script"
        if dict(attrs).get("class") == "mha-explorer":
            self.found = {name: value or "" for name, value in attrs}

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if "table" in self.stack:
            self.text += data


def weights(*shape: int) -> Tensor:
    return Draw().normal(*shape).softmax(-1).float()


def shown(fragment: str) -> Tensor:
    """The weights that a reader's browser gets."""
    found = Attributes(fragment).found
    steps = torch.tensor(list(base64.b64decode(found["data-weights"])))
    return steps.view(json.loads(found["data-shape"])) / 255


@pytest.mark.parametrize("shape", [(3, 3), (2, 3, 3), (4, 2, 3, 3)])
def test_holds_every_weight_within_half_a_step(shape: tuple[int, ...]) -> None:
    given = weights(*shape)
    kept = shown(explore_attention(given, TOKENS).html)
    assert kept.shape == (1,) * (4 - given.ndim) + given.shape
    torch.testing.assert_close(kept.view_as(given), given, rtol=0, atol=0.5001 / 255)


def test_takes_one_tensor_a_layer() -> None:
    layers = [weights(2, 3, 5) for _ in range(4)]
    keys = list("vwxyz")
    fragment = explore_attention(layers, TOKENS, keys).html
    assert fragment == explore_attention(torch.stack(layers), TOKENS, keys).html
    assert json.loads(Attributes(fragment).found["data-keys"]) == keys


def test_half_precision_and_gradients_are_taken_as_they_come() -> None:
    given = weights(2, 3, 3).bfloat16().requires_grad_()
    torch.testing.assert_close(
        shown(explore_attention(given, TOKENS).html)[0],
        given.detach().float(),
        rtol=0,
        atol=0.5001 / 255,
    )


def test_starts_where_it_is_told() -> None:
    view = explore_attention(weights(2, 3, 3, 3), TOKENS, layer=1, head=2, query=1, view="matrix")
    assert json.loads(Attributes(view.html).found["data-start"]) == {
        "layer": 1,
        "head": 2,
        "at": 1,
        "view": "matrix",
        "scale": "weights",
    }


def test_without_javascript_a_table_is_left() -> None:
    given = torch.tensor([[[0.7, 0.2, 0.1], [0.0, 1.0, 0.0], [0.25, 0.25, 0.5]]])
    text = Attributes(explore_attention(given, TOKENS).html).text
    assert "the 70%, cat 20%, sat 10%" in text
    assert "cat 100%" in text
    assert "cat 100%," not in text


def test_without_javascript_a_picture_is_left() -> None:
    given = torch.tensor([[[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.2, 0.6]]])
    picture = re.search(r"<svg.*?</svg>", explore_attention(given, TOKENS).html, re.DOTALL)
    assert picture
    assert 'viewBox="0 0 3 3"' in picture[0]
    paths = re.findall(r'fill-opacity="(.*?)" d="(.*?)"', picture[0])
    cells = {
        (int(i), int(j)): float(strength)
        for strength, path in paths
        for j, i in re.findall(r"M(\d+) (\d+)h1v1h-1z", path)
    }
    assert cells.keys() == {(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)}
    assert all(abs(cells[i, j] - given[0, i, j]) <= 0.5 / 15 + 0.01 for i, j in cells)


def test_tokens_stay_text() -> None:
    size = len(HOSTILE)
    view = explore_attention(torch.eye(size), HOSTILE, caption="<b>&</b><script>")
    found = Attributes(view.html)
    assert found.scripts == 1
    assert json.loads(found.found["data-queries"]) == HOSTILE
    assert all(token.strip() in found.text for token in HOSTILE)
    assert html.escape("<b>&</b><script>") in view.html
    assert "innerHTML" not in view.html
    assert "insertAdjacentHTML" not in view.html


def test_a_dollar_is_a_dollar() -> None:
    fragment = explore_attention(torch.eye(1), ["$caption"], caption="$rows").html
    assert json.loads(Attributes(fragment).found["data-queries"]) == ["$caption"]
    assert "<p>$rows</p>" in fragment


def test_nothing_is_fetched_and_nothing_has_an_id() -> None:
    fragment = explore_attention(weights(3, 3), TOKENS).html
    assert "http" not in fragment
    assert not re.search(r"""\bsrc=|\bhref=|@import|url\(|fetch\(|import\(|\bid=""", fragment)


def test_same_weights_same_fragment() -> None:
    first, second = (explore_attention(weights(2, 3, 3), TOKENS).html for _ in range(2))
    assert first == second


def test_size() -> None:
    large = explore_attention(weights(12, 12, 64, 64), [f"token{i}" for i in range(64)])
    assert len(large.html.encode()) < LARGE_BYTES
    usual = explore_attention(weights(6, 12, 32, 32), [f"token{i}" for i in range(32)])
    assert len(usual.html.encode()) < COMMITTED_BYTES


def output(fragment: str) -> list[dict[str, dict[str, str]]]:
    return [{"data": {"text/html": fragment, "text/plain": "AttentionView"}}]


def test_notebooks_are_compared_within_one_step() -> None:
    steps = torch.full((2, 3, 3), 100.0)
    stored, near, far = (
        output(explore_attention((steps + shift) / 255, TOKENS).html) for shift in (0, 1, 2)
    )
    assert without_weights(near) == without_weights(stored)
    assert (view_distance(near, stored), view_distance(far, stored)) == (1, 2)
    other = output(explore_attention(steps / 255, ["a", "b", "c"]).html)
    assert without_weights(other) != without_weights(stored)
    assert "data-weights" in stored[0]["data"]["text/html"]
    assert "<path" in stored[0]["data"]["text/html"]
    assert "<path" not in without_weights(stored)[0]["data"]["text/html"]


def test_a_notebook_shows_it() -> None:
    view = explore_attention(weights(3, 3), TOKENS)
    assert view._repr_html_() == view.html
    assert repr(view) == "AttentionView"
