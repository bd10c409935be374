"""The view of the split: layouts against torch's own, counts against torch's indexing, what the fragment holds."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from torch import Tensor

from mha_lib import merge_heads, split_heads
from mha_lib.explore import AttentionView
from mha_lib.explore_split import explore_split

SIZES = [(4, 2, 3), (3, 3, 2), (2, 4, 1), (5, 1, 3), (1, 3, 2), (7, 2, 5), (4, 4, 4), (1, 1, 1)]
HOSTILE = ['<script>alert("1")</script>', "</script>", "<!--", "'\"&amp;", " ", "\n", "猫", "$rows"]
MOST_BYTES = 60_000

each_size = pytest.mark.parametrize(("n", "h", "d"), SIZES)


class Parts(HTMLParser):
    """The attributes of the view's own element, the text of its table, and how many scripts there are."""

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
        if dict(attrs).get("class") == "mha-split":
            self.found = {name: value or "" for name, value in attrs}

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if "table" in self.stack:
            self.text += data


def payload(*sizes: Any) -> dict[str, Any]:
    """What a reader's browser gets."""
    found: dict[str, Any] = json.loads(Parts(explore_split(*sizes).html).found["data-split"])
    return found


def tensor(layout: dict[str, Any]) -> Tensor:
    return torch.tensor(layout["numbers"]).view([size for _, size in layout["axes"]])


def axes(layout: dict[str, Any]) -> list[str]:
    return [name for name, _ in layout["axes"]]


def expected(n: int, h: int, d: int) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """The layouts without einops: the right path, and each wrong one."""
    packed = torch.arange(n * h * d).view(1, n, h * d)
    cut = packed.view(1, n, h, d)
    heads, viewed = cut.transpose(1, 2), packed.view(1, h, n, d)
    wrong = {
        "split": [packed, viewed, viewed, viewed.transpose(1, 2).reshape(1, n, h * d)],
        "merge": [packed, cut, heads, heads.reshape(1, n, h * d)],
        "both": [packed, viewed, viewed, viewed.reshape(1, n, h * d)],
    }
    return [packed, cut, heads, heads.transpose(1, 2).reshape(1, n, h * d)], wrong


@each_size
def test_layouts_are_those_of_torch(n: int, h: int, d: int) -> None:
    right, wrong = expected(n, h, d)
    steps = payload(n, h, d)["steps"]
    assert [step["name"] for step in steps] == ["packed", "split", "heads first", "merge"]
    for at, step in enumerate(steps):
        torch.testing.assert_close(tensor(step["right"]), right[at])
        assert step["wrong"].keys() == wrong.keys()
        for mistake, path in wrong.items():
            torch.testing.assert_close(tensor(step["wrong"][mistake]), path[at])


@each_size
def test_the_right_path_is_the_library_s(n: int, h: int, d: int) -> None:
    packed, _, heads, merged = (tensor(step["right"]) for step in payload(n, h, d)["steps"])
    assert torch.equal(heads, split_heads(packed, d))
    assert torch.equal(merged, merge_heads(heads))
    assert torch.equal(merged, packed)


@each_size
def test_each_line_of_code_gives_what_stands_beside_it(n: int, h: int, d: int) -> None:
    steps = payload(n, h, d)["steps"]
    before = {"packed": tensor(steps[0]["right"])}
    for path in ("right", *steps[0]["wrong"]):
        layouts = [step["right"] if path == "right" else step["wrong"][path] for step in steps]
        for layout in layouts[1:]:
            given = before | {"b": 1, "n": n, "h": h, "d": d, "rearrange": rearrange}
            got = eval(layout["code"], {}, given)
            assert torch.equal(got, tensor(layout))
            if axes(layout) == ["b", "h", "n", "d"]:
                before["heads"] = got


@each_size
def test_each_pattern_gives_what_stands_beside_it(n: int, h: int, d: int) -> None:
    sizes = {"b": 1, "n": n, "h": h, "d": d}
    for step in payload(n, h, d)["steps"][1:]:
        for layout in (step["right"], *step["wrong"].values()):
            before, after = layout["pattern"].split(" -> ")
            assert re.findall(r"\w", after) == re.findall(r"\w", " ".join(axes(layout)))
            if before in ("(b h n d)", "(b n h d)"):
                counted = torch.tensor(layout["numbers"])
                used = {name: size for name, size in sizes.items() if name in before}
                assert torch.equal(rearrange(counted, layout["pattern"], **used), tensor(layout))


def misplaced(layout: dict[str, Any], n: int, h: int, d: int) -> int:
    """Counted one by one: does what the axes call token, head and dimension hold the number from there?"""
    home = torch.arange(n * h * d).view(n, h, d)
    x = tensor(layout)[0]
    names = axes(layout)[1:]
    count = 0
    for token in range(n):
        for head in range(h):
            for dimension in range(d):
                index = {"n": token, "h": head, "d": dimension, "h d": head * d + dimension}
                place = tuple(index[name] for name in names)
                count += int(x[place] != home[token, head, dimension])
    return count


@each_size
def test_misplaced_numbers_are_counted(n: int, h: int, d: int) -> None:
    for step in payload(n, h, d)["steps"]:
        assert step["right"]["misplaced"] == 0
        for layout in (step["right"], *step["wrong"].values()):
            assert layout["misplaced"] == misplaced(layout, n, h, d)


def test_what_the_book_says_of_four_tokens_and_two_heads() -> None:
    steps = payload(4, 2, 3)["steps"]
    counts = {
        mistake: [step["wrong"][mistake]["misplaced"] for step in steps]
        for mistake in ("split", "merge", "both")
    }
    assert counts == {"split": [0, 18, 18, 18], "merge": [0, 0, 0, 18], "both": [0, 18, 18, 0]}
    assert "undone" in steps[3]["wrong"]["both"]["note"]
    assert payload(4, 1, 3)["steps"][3]["wrong"]["both"]["note"] == ""


def test_names_tokens_or_counts_them() -> None:
    named, counted = payload(["a", "b", "c"], 2, 3), payload(3, 2, 3)
    assert (named["tokens"], counted["tokens"]) == (["a", "b", "c"], [])
    assert {**named, "tokens": []} == counted
    assert payload(np.int64(3), np.int64(2), np.int64(3)) == counted
    assert payload() == payload(4, 2, 3)


def test_tokens_stay_text() -> None:
    view = explore_split(HOSTILE, 2, 3)
    parts = Parts(view.html)
    assert parts.scripts == 1
    assert json.loads(parts.found["data-split"])["tokens"] == HOSTILE
    assert html.escape(json.dumps(HOSTILE[0])[1:-1]) in view.html
    assert "innerHTML" not in view.html
    assert "insertAdjacentHTML" not in view.html


def test_without_javascript_a_table_is_left() -> None:
    text = Parts(explore_split().html).text
    assert 'rearrange(packed, "b n (h d) -> b h n d", h=h)' in text
    assert "split by view 18 of 24, merge by reshape 18 of 24, both mistakes 0 of 24" in text


def test_nothing_is_fetched_and_nothing_has_an_id() -> None:
    fragment = explore_split().html
    assert "http" not in fragment
    assert not re.search(r"""\bsrc=|\bhref=|@import|url\(|fetch\(|import\(|\bid=""", fragment)


def test_same_sizes_same_fragment() -> None:
    first, second = (explore_split(["a", "b"], 2, 2) for _ in range(2))
    assert isinstance(first, AttentionView)
    assert first.html == second.html == first._repr_html_()
    assert explore_split(2, 2, 2).html != first.html


@pytest.mark.parametrize("sizes", [(4, 2, 3), (16, 4, 4), (256, 1, 1), (1, 256, 1), (1, 1, 256)])
def test_size(sizes: tuple[int, int, int]) -> None:
    assert len(explore_split(*sizes).html.encode()) < MOST_BYTES


@pytest.mark.parametrize(
    ("changes", "exception", "words"),
    [
        ({"tokens": 1.5}, TypeError, ["tokens", "an int or a sequence of strings", "float 1.5"]),
        ({"tokens": "ab"}, TypeError, ["tokens", "an int or a sequence of strings", "str 'ab'"]),
        ({"tokens": True}, TypeError, ["tokens", "an int or a sequence of strings", "bool True"]),
        ({"tokens": None}, TypeError, ["tokens", "an int or a sequence of strings", "NoneType"]),
        ({"tokens": torch.tensor(3)}, TypeError, ["tokens", "an int or a sequence", "Tensor"]),
        ({"tokens": ["a", 3]}, TypeError, ["tokens", "a sequence of strings", "int 3"]),
        ({"tokens": []}, ValueError, ["tokens", "at least 1 string", "got 0"]),
        ({"tokens": 0}, ValueError, ["tokens", "at least 1", "got 0"]),
        ({"num_heads": "2"}, TypeError, ["num_heads", "an int", "str '2'"]),
        ({"num_heads": 0}, ValueError, ["num_heads", "at least 1", "got 0"]),
        ({"head_dim": 1.5}, TypeError, ["head_dim", "an int", "float 1.5"]),
        ({"head_dim": -5}, ValueError, ["head_dim", "at least 1", "got -5"]),
        (
            {"tokens": 65},
            ValueError,
            ["tokens * num_heads * head_dim", "at most 256", "65 * 2 * 2"],
        ),
    ],
)
def test_refuses(changes: dict[str, Any], exception: type[Exception], words: list[str]) -> None:
    with pytest.raises(exception) as caught:
        explore_split(**{"tokens": 4, "num_heads": 2, "head_dim": 2, **changes})
    assert all(word in str(caught.value) for word in words), str(caught.value)
