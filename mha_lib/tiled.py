"""Attention in tiles, with the online softmax: the score matrix is never stored. Built in chapter 5 of the book."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from einops import einsum, rearrange, reduce
from torch import Tensor

from mha_lib.masks import combine_masks, position_mask

QUERY_TILE, KEY_TILE = 256, 256
"""Queries and keys of one tile: its scores fit a processor's cache, its matrix products are still large."""


class TileRules(NamedTuple):
    """What attention in tiles must know besides tensors; ``offset`` is None where it is a tensor."""

    causal: bool
    window: int | None
    offset: int | None
    scale: float
    softcap: float | None
    dropout_p: float


class TileTensors(NamedTuple):
    """The tensors of attention in tiles; any axis of mask, bias and sinks but the first may have size 1."""

    query: Tensor  # b k g i d
    key: Tensor  # b k j d
    value: Tensor  # b k j v
    mask: Tensor | None  # b k g i j
    bias: Tensor | None  # b k g i j
    sinks: Tensor | None  # b k g 1 1
    offset: Tensor | None  # b
    row_noise: Tensor | None  # b k g i 1
    column_noise: Tensor | None  # b k 1 1 j


def tiled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    query_offset: int | Tensor = 0,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attention whose memory grows with the length, not with its square, in training too.

    Each tile of queries meets one tile of keys after the other and keeps a running maximum, a running sum and a
    running output. The backward pass computes the weights of each tile again. These are the numbers of
    :func:`mha_lib.reference_attention` in another order. Arguments as in :func:`mha_lib.attention`, not checked here.

    Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018); Dao, "FlashAttention-2" (2023).
    """
    offsets = query_offset if isinstance(query_offset, Tensor) else None
    query = rearrange(query, "b (k g) i d -> b k g i d", k=key.shape[1])
    drops = dropout_p > 0
    tensors = TileTensors(
        query,
        key,
        value,
        _with_all_axes(mask, query),
        _with_all_axes(bias, query),
        None if sinks is None else _with_all_axes(rearrange(sinks, "h -> h 1 1"), query),
        offsets,
        _random_bits(query[..., :1]) if drops else None,
        _random_bits(rearrange(key[..., 0], "b k j -> b k 1 1 j")) if drops else None,
    )
    rules = TileRules(
        causal,
        window,
        None if isinstance(query_offset, Tensor) else query_offset,
        query.shape[-1] ** -0.5 if scale is None else scale,
        softcap,
        dropout_p,
    )
    output: Tensor = _TiledAttention.apply(*tensors, rules)[0]  # type: ignore[no-untyped-call]
    return rearrange(output, "b k g i v -> b (k g) i v")


def _with_all_axes(x: Tensor | None, query: Tensor) -> Tensor | None:
    """Give what broadcasts to ``(b, h, i, j)`` the axes ``b k g i j``, the first of full size."""
    if x is None:
        return None
    x = x[(None,) * (4 - x.ndim)].expand(query.shape[0], -1, -1, -1)
    kv_heads = 1 if x.shape[1] == 1 else query.shape[1]
    return rearrange(x, "b (k g) i j -> b k g i j", k=kv_heads)


def _random_bits(like: Tensor) -> Tensor:
    return torch.randint(-(2**31), 2**31, like.shape, device=like.device, dtype=torch.int32)


class _TiledAttention(torch.autograd.Function):
    """Attention in tiles; beside the output it returns the log of each row's sum."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        sinks: Tensor | None,
        offset: Tensor | None,
        row_noise: Tensor | None,
        column_noise: Tensor | None,
        rules: TileRules,
    ) -> tuple[Tensor, Tensor]:
        """Map the tensors to shapes ``(b, k, g, i, v)`` and ``(b, k, g, i, 1)``."""
        tensors = TileTensors(query, key, value, mask, bias, sinks, offset, row_noise, column_noise)
        tiles = _tiles(tensors.query.shape[-2], QUERY_TILE)
        rows = (_attend_tile(tensors, rules, queries) for queries in tiles)
        output, logsumexp = (torch.cat(parts, dim=-2) for parts in zip(*rows, strict=True))
        return output.to(tensors.query.dtype), logsumexp

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep inputs and results, and no weights."""
        ctx.save_for_backward(*inputs[:-1], *output)
        ctx.rules = inputs[-1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the weights of each tile again, and from them the gradients."""
        *inputs, output, logsumexp = ctx.saved_tensors
        bias = inputs[4] if ctx.needs_input_grad[4] else None
        tensors = TileTensors(*inputs)
        results = _gradients(tensors, ctx.rules, output, logsumexp, grads[0], grads[1], bias)
        return *results, None, None, None, None


def _attend_tile(tensors: TileTensors, rules: TileRules, queries: slice) -> tuple[Tensor, Tensor]:
    """The output of some queries, and the log of the sum of their exponentiated scores."""
    query, value = tensors.query[..., queries, :], tensors.value
    dtype = torch.promote_types(query.dtype, torch.float32)
    peak = torch.full_like(query[..., :1], -torch.inf, dtype=dtype)
    total = torch.zeros_like(peak)
    summed = peak.new_zeros(*peak.shape[:-1], value.shape[-1])
    if tensors.sinks is not None:
        peak = torch.maximum(peak, tensors.sinks.to(dtype))
        total = total + (tensors.sinks > -torch.inf)
    for keys in _tiles_in_sight(queries, value.shape[-2], rules):
        scores, _ = _scores(tensors, rules, queries, keys)
        highest = torch.maximum(peak, reduce(scores, "b k g i j -> b k g i 1", "max"))
        base = highest.masked_fill(highest == -torch.inf, 0.0)
        weights, fade = torch.exp(scores - base), torch.exp(peak - base)
        total = total * fade + reduce(weights, "b k g i j -> b k g i 1", "sum")
        dropped = _dropped(tensors, rules, queries, keys)
        if dropped is not None:
            weights = weights.masked_fill(dropped, 0.0)
        summed = summed * fade + einsum(
            weights, value[..., keys, :].to(dtype), "b k g i j, b k j v -> b k g i v"
        )
        peak = highest
    empty = total == 0
    logsumexp = (peak + torch.log(total)).masked_fill(empty, torch.inf)
    return summed / (_share_kept(rules) * total.masked_fill(empty, 1.0)), logsumexp


def _gradients(
    tensors: TileTensors,
    rules: TileRules,
    output: Tensor,
    logsumexp: Tensor,
    grad_output: Tensor,
    grad_logsumexp: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The gradients of query, key, value, mask (it has none), bias if it is given, and sinks."""
    query, key, value, sinks = tensors.query, tensors.key, tensors.value, tensors.sinks
    grad_output = grad_output.to(logsumexp.dtype)
    pull = reduce(grad_output * output, "b k g i v -> b k g i 1", "sum") - grad_logsumexp
    grad_output = grad_output / _share_kept(rules)
    key_tiles = list(_tiles(key.shape[-2], KEY_TILE))
    grad_query, grad_bias = [], []
    grad_key = [torch.zeros_like(key[..., keys, :], dtype=pull.dtype) for keys in key_tiles]
    grad_value = [torch.zeros_like(value[..., keys, :], dtype=pull.dtype) for keys in key_tiles]
    for queries in _tiles(query.shape[-2], QUERY_TILE):
        row = logsumexp[..., queries, :], pull[..., queries, :], grad_output[..., queries, :]
        grad_rows = torch.zeros_like(query[..., queries, :], dtype=pull.dtype)
        grad_bias_rows = []
        in_sight = key_tiles if bias is not None else _tiles_in_sight(queries, key.shape[-2], rules)
        for keys in in_sight:
            tile = _tile_gradients(tensors, rules, queries, keys, *row)
            column = keys.start // KEY_TILE
            grad_rows = grad_rows + tile[0]
            grad_key[column] = grad_key[column] + tile[1]
            grad_value[column] = grad_value[column] + tile[2]
            if bias is not None:
                grad_bias_rows.append(_sum_over_shared_axes(tile[3], bias))
        grad_query.append(grad_rows)
        if bias is not None:
            grad_bias.append(_join(grad_bias_rows, bias, dim=-1))
    grad_sinks = None
    if sinks is not None:
        weights = torch.exp(sinks - logsumexp)
        grad_sinks = -reduce(weights * pull, "b k g i 1 -> b k g 1 1", "sum").to(sinks.dtype)
    return (
        torch.cat(grad_query, dim=-2).to(query.dtype),
        torch.cat(grad_key, dim=-2).to(key.dtype),
        torch.cat(grad_value, dim=-2).to(value.dtype),
        None,
        None if bias is None else _join(grad_bias, bias, dim=-2).to(bias.dtype),
        grad_sinks,
    )


def _tile_gradients(
    tensors: TileTensors,
    rules: TileRules,
    queries: slice,
    keys: slice,
    logsumexp: Tensor,
    pull: Tensor,
    grad_output: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What one tile adds to the gradients of query, key and value, and the gradient of its biased scores."""
    query = tensors.query[..., queries, :].to(pull.dtype)
    key, value = (x[..., keys, :].to(pull.dtype) for x in (tensors.key, tensors.value))
    scores, slope = _scores(tensors, rules, queries, keys)
    weights = torch.exp(scores - logsumexp)
    dropped = _dropped(tensors, rules, queries, keys)
    kept = weights if dropped is None else weights.masked_fill(dropped, 0.0)
    grad_value = einsum(kept, grad_output, "b k g i j, b k g i v -> b k j v")
    grad_weights = einsum(grad_output, value, "b k g i v, b k j v -> b k g i j")
    if dropped is not None:
        grad_weights = grad_weights.masked_fill(dropped, 0.0)
    grad_biased = weights * (grad_weights - pull)
    grad_scores = grad_biased * (rules.scale if slope is None else rules.scale * slope)
    grad_query = einsum(grad_scores, key, "b k g i j, b k j d -> b k g i d")
    grad_key = einsum(grad_scores, query, "b k g i j, b k g i d -> b k j d")
    return grad_query, grad_key, grad_value, grad_biased


def _scores(
    tensors: TileTensors, rules: TileRules, queries: slice, keys: slice
) -> tuple[Tensor, Tensor | None]:
    """The scores of a tile, softcap, bias and masks applied, and the slope of the softcap if there is one."""
    dtype = torch.promote_types(tensors.query.dtype, torch.float32)
    query, key = tensors.query[..., queries, :].to(dtype), tensors.key[..., keys, :].to(dtype)
    scores = einsum(query * rules.scale, key, "b k g i d, b k j d -> b k g i j")
    slope = None
    if rules.softcap is not None:
        capped = torch.tanh(scores / rules.softcap)
        scores, slope = rules.softcap * capped, 1 - capped.square()
    if tensors.bias is not None:
        scores = scores + _cut(tensors.bias, queries, keys).to(dtype)
    mask = None if tensors.mask is None else _cut(tensors.mask, queries, keys)
    mask = combine_masks(mask, _tile_mask(tensors, rules, queries, keys))
    return scores if mask is None else scores.masked_fill(~mask, -torch.inf), slope


def _tile_mask(
    tensors: TileTensors, rules: TileRules, queries: slice, keys: slice
) -> Tensor | None:
    """The positions of a tile that may attend: ``(i, j)``, ``(b, 1, 1, i, j)``, or None for all."""
    offset = tensors.offset if rules.offset is None else rules.offset
    assert offset is not None
    mask = position_mask(
        queries.stop - queries.start,
        keys.stop - keys.start,
        causal=rules.causal,
        window=rules.window,
        query_offset=offset + queries.start - keys.start,
        device=tensors.query.device,
    )
    return (
        mask if mask is None or tensors.offset is None else rearrange(mask, "b 1 i j -> b 1 1 i j")
    )


def _dropped(tensors: TileTensors, rules: TileRules, queries: slice, keys: slice) -> Tensor | None:
    """What dropout drops: a hash of one random number a row and one a column, so that backward finds it again."""
    if tensors.row_noise is None or tensors.column_noise is None:
        return None
    bits = (tensors.row_noise[..., queries, :] ^ tensors.column_noise[..., keys]).mul_(0x2C1B3C6D)
    bits = bits.bitwise_xor_(bits >> 15).mul_(0x297A2D39)
    highest = round((rules.dropout_p - 0.5) * 2**32) - 1
    return bits <= max(highest, -(2**31))


def _share_kept(rules: TileRules) -> float:
    """How many of the weights dropout keeps; never zero, since outputs are divided by it."""
    return max(1 - rules.dropout_p, 2**-32)


def _tiles(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _tiles_in_sight(queries: slice, key_length: int, rules: TileRules) -> Iterator[slice]:
    """The tiles of keys that some of the queries may see."""
    for keys in _tiles(key_length, KEY_TILE):
        if rules.offset is not None:
            newest = rules.offset + queries.stop - 1 - keys.start
            oldest = rules.offset + queries.start - (keys.stop - 1)
            if rules.causal and newest < 0:
                continue
            if rules.window is not None and (oldest >= rules.window or newest <= -rules.window):
                continue
        yield keys


def _cut(x: Tensor, queries: slice, keys: slice) -> Tensor:
    """The part of a mask or bias that belongs to a tile."""
    x = x if x.shape[-2] == 1 else x[..., queries, :]
    return x if x.shape[-1] == 1 else x[..., keys]


def _sum_over_shared_axes(x: Tensor, bias: Tensor) -> Tensor:
    """Sum over the axes that ``bias`` has once for all."""
    shared = [axis for axis, size in enumerate(bias.shape) if size == 1]
    return x.sum(shared, keepdim=True) if shared else x


def _join(parts: list[Tensor], bias: Tensor, dim: int) -> Tensor:
    """Put the gradients of tiles side by side, or add them where ``bias`` is shared."""
    return torch.cat(parts, dim) if bias.shape[dim] > 1 else torch.stack(parts).sum(0)
