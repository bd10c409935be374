"""Each mask against two loops over its definition: query i stands at offset + i, key j at j."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mha_lib import (
    alibi_bias,
    causal_mask,
    document_mask,
    padding_mask,
    reference_attention,
    sliding_window_mask,
)
from mha_lib.masks import combine_masks
from tests.support import DEVICES, ROUNDED_ONCE, Draw, assert_near, draws
from tests.tolerances import HAND_WRITTEN

LENGTHS = [(0, 0), (1, 1), (4, 4), (3, 5), (5, 3), (2, 0), (0, 2)]
OFFSETS = [-7, -2, 0, 1, 2, 9]
WINDOWS = [1, 2, 3, 20]
INTEGER_DTYPES = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64]


def loops(cell: Callable[[int, int], bool], queries: int, keys: int) -> list[list[bool]]:
    return [[cell(i, j) for j in range(keys)] for i in range(queries)]


def sees_past(offset: int) -> Callable[[int, int], bool]:
    return lambda i, j: j <= offset + i


def in_window(offset: int, window: int, causal: bool) -> Callable[[int, int], bool]:
    if causal:
        return lambda i, j: offset + i - window < j <= offset + i
    return lambda i, j: abs(offset + i - j) < window


def assert_is(mask: Tensor, expected: list[list[bool]], queries: int, keys: int) -> None:
    assert mask.dtype == torch.bool
    assert torch.equal(mask, torch.tensor(expected, dtype=torch.bool).reshape(queries, keys))


@pytest.mark.parametrize(("queries", "keys"), LENGTHS)
@pytest.mark.parametrize("offset", OFFSETS)
def test_causal_mask_is_its_definition(queries: int, keys: int, offset: int) -> None:
    mask = causal_mask(queries, keys, query_offset=offset)
    assert_is(mask, loops(sees_past(offset), queries, keys), queries, keys)


@pytest.mark.parametrize(("queries", "keys"), LENGTHS)
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("causal", [True, False])
def test_sliding_window_mask_is_its_definition(
    queries: int, keys: int, offset: int, window: int, causal: bool
) -> None:
    mask = sliding_window_mask(queries, keys, window, query_offset=offset, causal=causal)
    assert_is(mask, loops(in_window(offset, window, causal), queries, keys), queries, keys)


@pytest.mark.parametrize("window", WINDOWS)
def test_a_causal_window_holds_that_many_keys(window: int) -> None:
    seen = sliding_window_mask(6, 6, window).sum(-1)
    assert seen.tolist() == [min(i + 1, window) for i in range(6)]


def test_equal_lengths_need_no_offset() -> None:
    assert torch.equal(causal_mask(4, 4), causal_mask(4, 4, query_offset=0))
    assert torch.equal(
        sliding_window_mask(4, 4, 2, causal=False),
        sliding_window_mask(4, 4, 2, query_offset=0, causal=False),
    )
    assert torch.equal(alibi_bias(2, 4, 4), alibi_bias(2, 4, 4, query_offset=0))


@pytest.mark.parametrize("dtype", INTEGER_DTYPES, ids=str)
def test_one_offset_a_sample(dtype: torch.dtype) -> None:
    offsets = torch.tensor([0, 3, 120], dtype=dtype)
    builders: list[Callable[[Any], Tensor]] = [
        lambda offset: causal_mask(4, 130, query_offset=offset),
        lambda offset: sliding_window_mask(4, 130, 2, query_offset=offset),
        lambda offset: alibi_bias(3, 4, 130, query_offset=offset),
    ]
    for build in builders:
        together = build(offsets)
        one_by_one = [build(int(offset)) for offset in offsets]
        assert together.ndim == 4
        assert torch.equal(together, torch.stack(one_by_one).view_as(together))


def test_negative_offsets_a_sample() -> None:
    mask = causal_mask(2, 3, query_offset=torch.tensor([-1, -2]))
    assert mask.int().tolist() == [[[[0, 0, 0], [1, 0, 0]]], [[[0, 0, 0], [0, 0, 0]]]]


@pytest.mark.parametrize("dtype", INTEGER_DTYPES, ids=str)
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_mask_is_its_definition(side: str, dtype: torch.dtype) -> None:
    lengths, longest = [0, 3, 10, 100], 200
    mask = padding_mask(torch.tensor(lengths, dtype=dtype), longest, side=side)
    assert mask.shape == (4, 1, 1, longest)
    assert mask.dtype == torch.bool
    for length, row in zip(lengths, mask[:, 0, 0], strict=True):
        real = range(length) if side == "right" else range(longest - length, longest)
        assert row.tolist() == [j in real for j in range(longest)]


def test_padding_mask_of_an_empty_batch() -> None:
    assert padding_mask(torch.zeros(0, dtype=torch.long), 3).shape == (0, 1, 1, 3)
    assert padding_mask(torch.zeros(2, dtype=torch.long), 0).shape == (2, 1, 1, 0)


@pytest.mark.parametrize("dtype", INTEGER_DTYPES, ids=str)
def test_document_mask_is_its_definition(dtype: torch.dtype) -> None:
    ids = [[3, 3, 1, 1, 3], [0, 1, 2, 3, 4]]
    mask = document_mask(torch.tensor(ids, dtype=dtype))
    assert mask.shape == (2, 1, 5, 5)
    assert mask.dtype == torch.bool
    for row, sample in zip(ids, mask[:, 0], strict=True):
        assert sample.tolist() == [[a == b for b in row] for a in row]


def paper_slopes(heads: int) -> list[float]:
    """The recipe of the ALiBi paper's code: a recursion over powers of two, steepest slope first."""
    if heads & (heads - 1) == 0:
        start = 2.0 ** -(2.0 ** -(math.log2(heads) - 3))
        return [start ** (head + 1) for head in range(heads)]
    below = 1 << (heads.bit_length() - 1)
    return paper_slopes(below) + paper_slopes(2 * below)[0::2][: heads - below]


@pytest.mark.parametrize("heads", range(1, 18))
@pytest.mark.parametrize("offset", [-2, 0, 3])
def test_alibi_bias_is_the_published_recipe(heads: int, offset: int) -> None:
    bias = alibi_bias(heads, 3, 5, query_offset=offset, dtype=torch.float64)
    wanted = [
        [[-slope * abs(offset + i - j) for j in range(5)] for i in range(3)]
        for slope in paper_slopes(heads)
    ]
    assert_near(bias, torch.tensor(wanted, dtype=torch.float64), HAND_WRITTEN)


def test_alibi_slopes_of_the_paper() -> None:
    slopes = -alibi_bias(8, 1, 2, query_offset=0)[:, 0, 1]
    assert slopes.tolist() == [2.0**-power for power in range(1, 9)]


@pytest.mark.parametrize("dtype", ROUNDED_ONCE, ids=str)
def test_alibi_bias_is_rounded_at_the_end(dtype: torch.dtype) -> None:
    bias = alibi_bias(16, 300, 300, dtype=dtype)
    assert bias.dtype == dtype
    assert_near(bias, alibi_bias(16, 300, 300, dtype=torch.float64), ROUNDED_ONCE[dtype])


def test_alibi_bias_has_the_default_dtype() -> None:
    assert alibi_bias(2, 2, 2).dtype == torch.get_default_dtype()


@pytest.mark.parametrize("device", DEVICES)
def test_masks_are_made_where_asked(device: str) -> None:
    offsets, ids = torch.zeros(2, dtype=torch.long), torch.zeros(2, 3, dtype=torch.long)
    made = [
        causal_mask(3, 3, device=device),
        causal_mask(3, 3, query_offset=offsets, device=device),
        causal_mask(3, 3, query_offset=offsets.to(device)),
        sliding_window_mask(3, 3, 2, device=torch.device(device)),
        alibi_bias(2, 3, 3, device=device),
        alibi_bias(2, 3, 3, query_offset=offsets.to(device)),
        padding_mask(offsets.to(device), 3),
        document_mask(ids.to(device)),
    ]
    assert [tensor.device.type for tensor in made] == [device] * len(made)


@pytest.mark.parametrize(
    "shapes",
    [[(4, 5)], [(4, 5), (2, 1, 1, 5)], [(2, 1, 1, 5), (3, 4, 5), (4, 5)], [(1,), (5,)]],
    ids=str,
)
def test_combine_masks_is_logical_and(shapes: list[tuple[int, ...]]) -> None:
    masks = [Draw(seed).mask(*shape) for seed, shape in enumerate(shapes)]
    combined = combine_masks(None, *masks, None)
    assert combined is not None
    whole = np.broadcast_shapes(*shapes)
    assert torch.equal(combined, torch.stack([mask.expand(whole) for mask in masks]).all(0))


def test_combine_masks_of_nothing_is_nothing() -> None:
    assert combine_masks() is None
    assert combine_masks(None, None) is None


def test_every_mask_fits_the_attention_function() -> None:
    for draw in draws():
        batch, heads, n = draw.size(1, 3), draw.size(1, 3), draw.size(1, 6)
        query, key, value = (draw.normal(batch, heads, n, 4) for _ in range(3))
        lengths = torch.tensor([draw.size(1, n) for _ in range(batch)])
        documents = torch.tensor([[draw.size(0, 1) for _ in range(n)] for _ in range(batch)])
        masks = [
            causal_mask(n, n, query_offset=lengths - lengths),
            padding_mask(lengths, n),
            document_mask(documents),
            sliding_window_mask(n, n, 2),
        ]
        bias = alibi_bias(heads, n, n, dtype=torch.float64)
        mask = masks[0] & masks[1] & masks[2] & masks[3]
        together = reference_attention(query, key, value, mask=mask, bias=bias)
        for allowed in masks:
            assert not together.weights.masked_select(~allowed).any()
        visible = mask.any(-1).expand(batch, heads, n)
        assert torch.equal(together.weights.sum(-1) > 0, visible)
