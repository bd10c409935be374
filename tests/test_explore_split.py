"""The view of the split into heads: its layouts are those of torch and einops, its counts are counted twice."""

from __future__ import annotations

import html
import json
import re
from typing import Any

import pytest
import torch

from mha_lib import explore_split, merge_heads, split_heads

SHAPES = [(4, 2, 3), (2, 2, 2), (5, 3, 2), (1, 4, 3), (6, 1, 4), (3, 4, 1), (7, 3, 4)]


def payload(n: int, h: int, d: int) -> dict[str, Any]:
    """What the script of the view reads."""
    found = re.search(r'data-[a-z]+="([^"]*)"', explore_split(n, h, d).html)
    assert found is not None
    data: dict[str, Any] = json.loads(html.unescape(found[1]))
    return data


@pytest.mark.parametrize(("n", "h", "d"), SHAPES)
def test_the_right_way_is_the_librarys(n: int, h: int, d: int) -> None:
    packed = torch.arange(n * h * d).view(1, n, h * d)
    heads = split_heads(packed, d)
    layouts = [step["right"]["numbers"] for step in payload(n, h, d)["steps"]]
    expected = [packed, heads.transpose(1, 2), heads, merge_heads(heads)]
    assert layouts == [x.flatten().tolist() for x in expected]


@pytest.mark.parametrize(("n", "h", "d"), SHAPES)
def test_the_wrong_ways_are_what_torch_does(n: int, h: int, d: int) -> None:
    packed = torch.arange(n * h * d).view(1, n, h * d)
    viewed, heads = packed.view(1, h, n, d), split_heads(packed, d).contiguous()
    steps = payload(n, h, d)["steps"]
    expected = {
        "split": [viewed, merge_heads(viewed)],
        "merge": [heads, heads.reshape(1, n, h * d)],
        "both": [viewed, viewed.reshape(1, n, h * d)],
    }
    for mistake, layouts in expected.items():
        shown = [step["wrong"][mistake]["numbers"] for step in steps[2:]]
        assert shown == [x.flatten().tolist() for x in layouts]


@pytest.mark.parametrize(("n", "h", "d"), SHAPES)
def test_misplaced_numbers_are_counted(n: int, h: int, d: int) -> None:
    packed = torch.arange(n * h * d).view(1, n, h * d)
    heads = split_heads(packed, d).contiguous()
    view = int((packed.view(1, h, n, d) != heads).sum())
    reshape = int((heads.reshape(1, n, h * d) != packed).sum())
    _, _, first, merge = payload(n, h, d)["steps"]
    assert all(step["right"]["misplaced"] == 0 for step in (first, merge))
    assert first["wrong"]["split"]["misplaced"] == first["wrong"]["both"]["misplaced"] == view
    assert first["wrong"]["merge"]["misplaced"] == 0
    assert merge["wrong"]["merge"]["misplaced"] == reshape
    assert merge["wrong"]["both"]["misplaced"] == 0
    assert (view == 0) == (n == 1 or h == 1)


def test_the_view_is_small_repeats_and_asks_nobody() -> None:
    fragment = explore_split(6, 4, 5).html
    assert fragment == explore_split(6, 4, 5).html
    assert len(fragment) < 60_000
    assert "http" not in fragment.replace("http://www.w3.org/2000/svg", "")


def test_labels_are_text() -> None:
    fragment = explore_split(["<script>alert(1)</script>", '"&'], 2, 2).html
    assert "<script>alert" not in fragment
    assert "&lt;script&gt;alert(1)" in fragment


def test_a_sequence_of_labels_says_how_many_tokens_there_are() -> None:
    assert "12 of 24" not in explore_split(["a", "b", "c", "d"], 1, 6).html
    shapes = json.loads(
        html.unescape(re.findall(r'data-[a-z]+="([^"]*)"', explore_split(["a", "b"]).html)[0])
    )["sizes"]
    assert shapes == {"n": 2, "h": 2, "d": 3}
