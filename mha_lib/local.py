"""Sliding windows at the cost of what they show: blocks of queries against the keys in reach. Built in chapter 5."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mha_lib.masks import combine_masks, sliding_window_mask

SMALLEST_BLOCK = 32
"""Queries of a block at least; smaller blocks make small matrix products."""

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]


def local_attention(
    attend: Attend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int,
    causal: bool,
    query_offset: int | Tensor = 0,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention in a sliding window: time and memory grow with ``i * window``, not with ``i * j``.

    The queries are cut into blocks. Each block becomes a sample of its own, together with the keys that its queries
    can reach, and any attention does the rest. Arguments as in :func:`mha_lib.attention`, not checked here.

    Args:
        attend: An attention, called as ``attend(query, key, value, mask, bias)``.
        query: Shape ``(b, h, i, d)``.
        key: Shape ``(b, k, j, d)``.
        value: Shape ``(b, k, j, v)``.
        window: As in :func:`mha_lib.sliding_window_mask`.
        causal: Whether later keys are hidden.
        query_offset: As in :func:`mha_lib.causal_mask`.
        mask: Boolean; broadcasts to ``(b, h, i, j)``.
        bias: Numbers; broadcasts to ``(b, h, i, j)``.

    Returns:
        Shape ``(b, h, i, v)``.

    Source: Beltagy et al., "Longformer" (2020), section 3.1.
    """
    batch, queries, keys = query.shape[0], query.shape[2], key.shape[2]
    block = _block_size(window)
    blocks = max(1, -(-queries // block))
    reach = block_reach(window, causal)
    length = (blocks - 1) * block + reach
    start = query_offset - (window - 1)
    if not isinstance(start, Tensor):
        start = min(max(start, -length), keys)

    device = query.device
    rows = rearrange(torch.arange(blocks * block, device=device), "(n i) -> 1 n i 1", i=block)
    columns = rows[:, :, :1] + torch.arange(reach, device=device) + _per_sample(start)
    band = sliding_window_mask(
        block, reach, window, query_offset=window - 1, causal=causal, device=device
    )
    inside = ((columns >= 0) & (columns < keys) & band).expand(batch, -1, -1, -1)
    block_mask = combine_masks(
        rearrange(inside, "b n i j -> (b n) 1 i j"), _cut_blocks(mask, rows, columns, batch)
    )
    query = F.pad(query, (0, 0, 0, blocks * block - queries))
    query = rearrange(query, "b h (n i) d -> (b n) h i d", i=block)
    key, value = (
        rearrange(_span(x, start, length).unfold(2, reach, block), "b k n d j -> (b n) k j d")
        for x in (key, value)
    )
    output = attend(query, key, value, block_mask, _cut_blocks(bias, rows, columns, batch))
    return rearrange(output, "(b n) h i v -> b h (n i) v", b=batch)[:, :, :queries]


def _block_size(window: int) -> int:
    return max(SMALLEST_BLOCK, window // 4)


def block_reach(window: int, causal: bool) -> int:
    """How many keys the queries of one block can reach together."""
    return _block_size(window) + (window - 1) * (1 if causal else 2)


def _per_sample(start: int | Tensor) -> int | Tensor:
    return rearrange(start, "b -> b 1 1 1") if isinstance(start, Tensor) else start


def _span(x: Tensor, start: int | Tensor, length: int) -> Tensor:
    """Positions ``start .. start + length`` of keys or values; what lies outside is hidden by the mask."""
    keys = x.shape[2]
    if not isinstance(start, Tensor):
        return F.pad(x, (0, 0, -start, start + length - keys))
    places = rearrange(start, "b -> b 1") + torch.arange(length, device=x.device)
    return x.take_along_dim(rearrange(places.clamp(0, keys - 1), "b n -> b 1 n 1"), dim=2)


def _cut_blocks(x: Tensor | None, rows: Tensor, columns: Tensor, batch: int) -> Tensor | None:
    """What belongs to the blocks, of a mask or bias that broadcasts to ``(b, h, i, j)``."""
    if x is None:
        return None
    x = x[(None,) * (4 - x.ndim)]
    samples = torch.arange(batch, device=x.device).clamp(max=x.shape[0] - 1)
    cut = x[
        rearrange(samples, "b -> b 1 1 1"),
        :,
        rows.clamp(max=x.shape[2] - 1),
        columns.clamp(0, x.shape[3] - 1),
    ]
    return rearrange(cut, "b n i j h -> (b n) h i j")
