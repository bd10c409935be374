"""Splitting and merging heads, against loops over the indices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mha_lib import merge_heads, split_heads
from tests.support import Draw, draws

B, N, H, D = 2, 3, 4, 5


def test_split_puts_each_number_where_it_belongs() -> None:
    for draw in draws():
        batch, tokens, heads, width = (draw.size(1, 4) for _ in range(4))
        x = draw.normal(batch, tokens, heads * width)
        split = split_heads(x, width)
        assert split.shape == (batch, heads, tokens, width)
        for b, h, n, d in np.ndindex(*split.shape):
            assert split[b, h, n, d] == x[b, n, h * width + d]


def test_merge_puts_each_number_where_it_belongs() -> None:
    for draw in draws():
        batch, heads, tokens, width = (draw.size(1, 4) for _ in range(4))
        x = draw.normal(batch, heads, tokens, width)
        merged = merge_heads(x)
        assert merged.shape == (batch, tokens, heads * width)
        for b, n, column in np.ndindex(*merged.shape):
            assert merged[b, n, column] == x[b, column // width, n, column % width]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int32, torch.bool], ids=str)
def test_merge_undoes_split(dtype: torch.dtype) -> None:
    x = Draw().normal(B, N, H * D).to(dtype)
    split = split_heads(x, D)
    assert split.dtype == dtype
    assert torch.equal(merge_heads(split), x)
    assert torch.equal(split_heads(merge_heads(split), D), split)


def test_split_is_a_view() -> None:
    x = torch.zeros(B, N, H * D)
    split = split_heads(x, D)
    assert split.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    split[1, 2, 0, 4] = 7.0
    assert x[1, 0, 2 * D + 4] == 7.0


def test_split_of_a_slice_is_a_view_too() -> None:
    packed = torch.zeros(B, N, 3 * H * D)
    keys = packed.chunk(3, dim=-1)[1]
    split_heads(keys, D).fill_(1.0)
    assert packed.sum() == B * N * H * D
    assert keys.all()


def test_merge_of_one_head_or_one_token_is_a_view() -> None:
    for shape in ((B, 1, N, D), (B, H, 1, D)):
        x = torch.zeros(shape)
        assert merge_heads(x).untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


@pytest.mark.parametrize("shape", [(0, N, H * D), (B, 0, H * D), (B, N, 0)])
def test_empty_axes(shape: tuple[int, int, int]) -> None:
    split = split_heads(torch.zeros(shape), D)
    assert split.shape == (shape[0], shape[2] // D, shape[1], D)
    assert merge_heads(split).shape == shape


def test_gradients_pass_unchanged() -> None:
    draw = Draw()
    x, upstream = draw.normal(B, N, H * D, grad=True), draw.normal(B, N, H * D)
    (gradient,) = torch.autograd.grad(merge_heads(split_heads(x, D)), x, upstream)
    assert torch.equal(gradient, upstream)
