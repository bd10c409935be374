"""Flash attention as three GPU kernels in Triton: one for the output, two for the gradients.

A kernel runs once for each tile of rows and reads the other side tile by tile, so that no score leaves the chip. What
``causal``, ``window`` and ``query_offset`` allow is a band, ``low <= key - query <= high``; None leaves a side open.
Tiles outside of the band are skipped, and only those on its edges are masked. Exponentials are powers of two.

This module needs ``triton``; nothing imports it before the backend is asked for. Built in chapter 5 of the book.

Sources: Dao, "FlashAttention-2" (2023), algorithms 1 and 2; Triton's tutorial on fused attention.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from einops import rearrange, repeat
from torch import Tensor

_LN2: tl.constexpr = tl.constexpr(math.log(2))


@triton.jit
def _load(
    matrix, start, length, stride, WIDTH: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr
):
    """Read a tile of rows; zeros stand where the matrix has none."""
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, PADDED)[None, :]
    pointers = matrix + tl.cast(start, tl.int64) * stride + rows.to(tl.int64) * stride + columns
    return tl.load(pointers, mask=(start + rows < length) & (columns < WIDTH), other=0.0)


@triton.jit
def _store(
    matrix, tile, start, length, stride, WIDTH: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr
):  # fmt: skip
    """Write a tile of rows."""
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, PADDED)[None, :]
    pointers = matrix + tl.cast(start, tl.int64) * stride + rows.to(tl.int64) * stride + columns
    tile = tile.to(matrix.dtype.element_ty)
    tl.store(pointers, tile, mask=(start + rows < length) & (columns < WIDTH))


@triton.jit
def _products(left, right):
    """The dot product of each row of one tile with each row of the other."""
    return tl.dot(left, tl.trans(right), input_precision="ieee")


@triton.jit
def _add_product(total, left, right):
    """``total + left @ right``, multiplied in the dtype of the right tile, added up in that of the total."""
    left = left.to(right.dtype)
    return tl.dot(left, right, total, input_precision="ieee", out_dtype=total.dtype)


@triton.jit
def _shifted(bound, offsets, batch, i, j):
    """One side of the band, where each sample has an offset of its own."""
    return tl.minimum(tl.maximum(bound + tl.load(offsets + batch), -i), j).to(tl.int32)


@triton.jit
def _tiles(
    PART: tl.constexpr, row, low, high, length, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Columns that some row of a tile sees; part 1: tiles that all rows see whole, 0 and 2: before and after."""
    first, inner, last, end = 0, 0, length // COLUMNS * COLUMNS, length
    if low is not None:
        first = tl.maximum(row + low, 0) // COLUMNS * COLUMNS
        inner = tl.cdiv(tl.maximum(row + ROWS - 1 + low, 0), COLUMNS) * COLUMNS
    if high is not None:
        last = tl.minimum(last, tl.maximum(row + high + 1, 0) // COLUMNS * COLUMNS)
        end = tl.minimum(end, tl.maximum(row + ROWS + high, 0))
    last = tl.maximum(inner, last)
    if PART == 0:
        return first, tl.minimum(inner, end)
    elif PART == 1:
        return inner, last
    else:
        return last, end


@triton.jit
def _mask(scores, queries, keys, low, high, j):
    """Minus infinity where a key does not exist or is outside of the band."""
    seen = (keys < j) & (queries >= 0)
    if low is not None:
        seen &= keys - queries >= low
    if high is not None:
        seen &= keys - queries <= high
    return tl.where(seen, scores, float("-inf"))


@triton.jit(do_not_specialize=["i", "j", "low", "high"])
def _forward_kernel(
    query, key, value, output, logsumexp, offsets,
    query_b, query_h, query_i, key_b, key_k, key_j, value_b, value_k, value_j,
    output_b, output_h, output_i,
    h, group, i, j, low, high, scale,
    D: tl.constexpr, V: tl.constexpr, PADDED_D: tl.constexpr, PADDED_V: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head: their outputs, and the logarithms in base 2 of their sums."""
    count = tl.cdiv(i, QUERIES)
    # Under a causal mask the last queries have the most to do: they start first.
    row = (count - 1 - tl.program_id(0) % count) * QUERIES
    pair = (tl.program_id(0) // count).to(tl.int64)
    batch, head = pair // h, pair % h
    if low is not None and offsets is not None:
        low = _shifted(low, offsets, batch, i, j)
    if high is not None and offsets is not None:
        high = _shifted(high, offsets, batch, i, j)
    query += batch * query_b + head * query_h
    key += batch * key_b + head // group * key_k
    value += batch * value_b + head // group * value_k
    output += batch * output_b + head * output_h

    dtype: tl.constexpr = logsumexp.dtype.element_ty
    rows = row + tl.arange(0, QUERIES)
    queries = _load(query, row, i, query_i, D, QUERIES, PADDED_D)
    mixed = tl.zeros([QUERIES, PADDED_V], dtype)
    top = tl.full([QUERIES], float("-inf"), dtype)
    total = tl.zeros([QUERIES], dtype)
    for part in tl.static_range(0 if low is not None else 1, 3):
        first, end = _tiles(part, row, low, high, j, QUERIES, KEYS)
        for column in range(first, end, KEYS):
            scores = _products(queries, _load(key, column, j, key_j, D, KEYS, PADDED_D))
            if part != 1:
                columns = column + tl.arange(0, KEYS)
                scores = _mask(scores, rows[:, None], columns[None, :], low, high, j)
            highest = tl.maximum(top, tl.max(scores, 1) * scale)
            shift = tl.where(highest == float("-inf"), 0.0, highest)
            weights = tl.exp2(scores * scale - shift[:, None])
            fade = tl.exp2(top - shift)
            total = total * fade + tl.sum(weights, 1)
            values = _load(value, column, j, value_j, V, KEYS, PADDED_V)
            mixed = _add_product(mixed * fade[:, None], weights, values)
            top = highest

    # An empty row gives zeros; its infinity makes the weights zero in the backward pass.
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    _store(output, mixed / total[:, None], row, i, output_i, V, QUERIES, PADDED_V)
    logarithm = tl.where(empty, float("inf"), top + tl.log2(total))
    tl.store(logsumexp + pair * i + rows, logarithm, mask=rows < i)


@triton.jit(do_not_specialize=["i", "j", "low", "high"])
def _query_gradient_kernel(
    query, key, value, output, d_output, logsumexp, delta, d_query, offsets,
    query_b, query_h, query_i, key_b, key_k, key_j, value_b, value_k, value_j,
    output_b, output_h, output_i, d_output_b, d_output_h, d_output_i, d_query_b, d_query_h, d_query_i,
    h, group, i, j, low, high, scale,
    D: tl.constexpr, V: tl.constexpr, PADDED_D: tl.constexpr, PADDED_V: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head: their gradient, and ``delta``, which the next kernel needs too."""
    count = tl.cdiv(i, QUERIES)
    row = (count - 1 - tl.program_id(0) % count) * QUERIES
    pair = (tl.program_id(0) // count).to(tl.int64)
    batch, head = pair // h, pair % h
    if low is not None and offsets is not None:
        low = _shifted(low, offsets, batch, i, j)
    if high is not None and offsets is not None:
        high = _shifted(high, offsets, batch, i, j)
    query += batch * query_b + head * query_h
    key += batch * key_b + head // group * key_k
    value += batch * value_b + head // group * value_k
    output += batch * output_b + head * output_h
    d_output += batch * d_output_b + head * d_output_h
    d_query += batch * d_query_b + head * d_query_h

    dtype: tl.constexpr = logsumexp.dtype.element_ty
    rows = row + tl.arange(0, QUERIES)
    logarithm = tl.load(logsumexp + pair * i + rows, mask=rows < i, other=float("inf"))
    queries = _load(query, row, i, query_i, D, QUERIES, PADDED_D)
    outputs = _load(output, row, i, output_i, V, QUERIES, PADDED_V)
    d_outputs = _load(d_output, row, i, d_output_i, V, QUERIES, PADDED_V)
    mean = tl.sum(outputs.to(dtype) * d_outputs.to(dtype), 1)
    tl.store(delta + pair * i + rows, mean, mask=rows < i)

    gradient = tl.zeros([QUERIES, PADDED_D], dtype)
    for part in tl.static_range(0 if low is not None else 1, 3):
        first, end = _tiles(part, row, low, high, j, QUERIES, KEYS)
        for column in range(first, end, KEYS):
            keys = _load(key, column, j, key_j, D, KEYS, PADDED_D)
            values = _load(value, column, j, value_j, V, KEYS, PADDED_V)
            scores = _products(queries, keys)
            if part != 1:
                columns = column + tl.arange(0, KEYS)
                scores = _mask(scores, rows[:, None], columns[None, :], low, high, j)
            weights = tl.exp2(scores * scale - logarithm[:, None])
            d_scores = weights * (_products(d_outputs, values) - mean[:, None])
            gradient = _add_product(gradient, d_scores, keys)
    _store(d_query, gradient * scale * _LN2, row, i, d_query_i, D, QUERIES, PADDED_D)


@triton.jit(do_not_specialize=["i", "j", "low", "high"])
def _key_gradient_kernel(
    query, key, value, d_output, logsumexp, delta, d_key, d_value, offsets,
    query_b, query_h, query_i, key_b, key_k, key_j, value_b, value_k, value_j,
    d_output_b, d_output_h, d_output_i, d_key_b, d_key_k, d_key_j, d_value_b, d_value_k, d_value_j,
    h, group, i, j, low, high, scale,
    D: tl.constexpr, V: tl.constexpr, PADDED_D: tl.constexpr, PADDED_V: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One tile of keys and values of one head: their gradients from all the query heads that read them."""
    count = tl.cdiv(j, KEYS)
    column = tl.program_id(0) % count * KEYS
    pair = (tl.program_id(0) // count).to(tl.int64)
    batch, kv_head = pair // (h // group), pair % (h // group)
    if low is not None and offsets is not None:
        low = _shifted(low, offsets, batch, i, j)
    if high is not None and offsets is not None:
        high = _shifted(high, offsets, batch, i, j)
    key += batch * key_b + kv_head * key_k
    value += batch * value_b + kv_head * value_k
    d_key += batch * d_key_b + kv_head * d_key_k
    d_value += batch * d_value_b + kv_head * d_value_k

    dtype: tl.constexpr = logsumexp.dtype.element_ty
    columns = column + tl.arange(0, KEYS)
    keys = _load(key, column, j, key_j, D, KEYS, PADDED_D)
    values = _load(value, column, j, value_j, V, KEYS, PADDED_V)
    for_keys, for_values = tl.zeros([KEYS, PADDED_D], dtype), tl.zeros([KEYS, PADDED_V], dtype)
    # Seen from a key, the band is mirrored: -high <= query - key <= -low.
    before = -high if high is not None else None
    after = -low if low is not None else None
    for head in range(kv_head * group, kv_head * group + group):
        query_head = query + batch * query_b + head * query_h
        d_output_head = d_output + batch * d_output_b + head * d_output_h
        numbers = (batch * h + head) * i
        for part in tl.static_range(0 if high is not None else 1, 3):
            first, end = _tiles(part, column, before, after, i, KEYS, QUERIES)
            for row in range(first, end, QUERIES):
                rows = row + tl.arange(0, QUERIES)
                logarithm = tl.load(logsumexp + numbers + rows, mask=rows < i, other=float("inf"))
                mean = tl.load(delta + numbers + rows, mask=rows < i, other=0.0)
                queries = _load(query_head, row, i, query_i, D, QUERIES, PADDED_D)
                d_outputs = _load(d_output_head, row, i, d_output_i, V, QUERIES, PADDED_V)
                scores = _products(keys, queries)
                if part != 1:
                    scores = _mask(scores, rows[None, :], columns[:, None], low, high, j)
                weights = tl.exp2(scores * scale - logarithm[None, :])
                for_values = _add_product(for_values, weights, d_outputs)
                d_scores = weights * (_products(values, d_outputs) - mean[None, :])
                for_keys = _add_product(for_keys, d_scores, queries)
    _store(d_key, for_keys * scale * _LN2, column, j, d_key_j, D, KEYS, PADDED_D)
    _store(d_value, for_values, column, j, d_value_j, V, KEYS, PADDED_V)


class _Launch(NamedTuple):
    """How a kernel is launched: rows of its tile, rows it reads at a time, warps, tiles read ahead."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


def _launches(
    head_dim: int, value_dim: int, dtype: torch.dtype, shared_memory: int
) -> tuple[_Launch, _Launch, _Launch]:
    """Launches of the forward, query gradient and key gradient kernels that a GPU has room for.

    Args:
        head_dim: ``d``, padded.
        value_dim: ``v``, padded.
        dtype: Of the query, key and value.
        shared_memory: Bytes of shared memory that a block may have; 0 in the interpreter.
    """
    width = head_dim + value_dim
    if shared_memory == 0:  # small, so that small inputs have several tiles
        return _Launch(32, 16, 1, 1), _Launch(32, 16, 1, 1), _Launch(32, 16, 1, 1)
    if dtype.itemsize > 2 or shared_memory <= 64 * 1024:  # no tensor cores: registers are the limit
        plain = _Launch(32 if width <= 128 else 16, 16, 4, 1)
        return plain, plain, plain
    rows, columns = (128, 64) if width <= 256 else (64, 32)
    forward = _Launch(rows, 128 if width <= 128 else columns, 8, 3)
    for_queries, for_keys = _Launch(rows, columns, 8, 2), _Launch(rows, 32, 8, 3)
    room = shared_memory // dtype.itemsize
    return (
        _fit(forward, head_dim, width, room),
        _fit(for_queries, width, width, room),
        _fit(for_keys, width, width, room),
    )


def _fit(launch: _Launch, kept: int, read: int, room: int) -> _Launch:
    """Read fewer tiles ahead, then keep fewer rows, until the numbers that are kept and read have room."""
    rows, columns, num_warps, num_stages = launch
    # Without reading ahead, half of what is read stands there a second time, transposed.
    while rows * kept + max(num_stages, 1.5) * columns * read > room and rows > 16:
        rows, num_stages = (rows, num_stages - 1) if num_stages > 1 else (rows // 2, 1)
    return _Launch(rows, columns, num_warps, num_stages)


def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block may have; 0 on the CPU, where only Triton's interpreter runs."""
    if device.type == "cpu":
        return 0
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", 48 * 1024))


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Launch on this device; a compiled graph sees to it by itself."""
    if device.type == "cpu" or torch.compiler.is_compiling():
        return nullcontext()
    return torch.cuda.device(device)


def _sizes(query: Tensor, key: Tensor, value: Tensor) -> dict[str, int]:
    """The sizes that every kernel takes. Tiles are as wide as the next power of two."""
    d, v = query.shape[-1], value.shape[-1]
    return {
        "h": query.shape[1],
        "group": query.shape[1] // key.shape[1],
        "i": query.shape[2],
        "j": key.shape[2],
        "D": d,
        "V": v,
        "PADDED_D": _padded(d),
        "PADDED_V": _padded(v),
    }


def _padded(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())


def _strides(*tensors: Tensor) -> list[int]:
    """The strides of all axes but the last."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def _tile_count(x: Tensor, launch: _Launch) -> tuple[int]:
    """The grid of a kernel: one program for each tile of rows of each head."""
    return (-(-x.shape[2] // launch.rows) * x.shape[0] * x.shape[1],)


def _unit_stride(x: Tensor) -> Tensor:
    """The kernels read whole rows; they take any other stride as it is."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _fold(x: Tensor, dim: int | None, size: int) -> Tensor:
    """Move an axis of vmap into the batch."""
    if dim is None:
        return repeat(x, "b ... -> (s b) ...", s=size)
    return rearrange(x.movedim(dim, 0), "s b ... -> (s b) ...")


def _empty(x: Tensor, rows: int, width: int) -> Tensor:
    """Room for ``(b, h, rows, width)``, laid out so that merging the heads copies nothing."""
    room = x.new_empty(x.shape[0], rows, x.shape[1], width)
    return rearrange(room, "b n h d -> b h n d")


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor | None,
    scale: float,
    low: int | None,
    high: int | None,
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel."""
    query, key, value = _unit_stride(query), _unit_stride(key), _unit_stride(value)
    dtype = torch.promote_types(query.dtype, torch.float32)
    logsumexp = query.new_full(query.shape[:3], torch.inf, dtype=dtype)
    output = _empty(query, query.shape[2], value.shape[3])
    if 0 in key.shape or output.numel() == 0:
        return output.zero_(), logsumexp
    launch, _, _ = _launches(
        _padded(query.shape[3]), _padded(value.shape[3]), query.dtype, _shared_memory(query.device)
    )
    with _on(query.device):
        _forward_kernel[_tile_count(query, launch)](
            query, key, value, output, logsumexp, offsets,
            *_strides(query, key, value, output), **_sizes(query, key, value),
            low=low, high=high, scale=scale, QUERIES=launch.rows, KEYS=launch.columns,
            num_warps=launch.num_warps, num_stages=launch.num_stages,
        )  # fmt: skip
    return output, logsumexp


def _backward(
    d_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    offsets: Tensor | None,
    scale: float,
    low: int | None,
    high: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernel for the queries' gradient, then the one for the keys' and values'."""
    query, key, value = _unit_stride(query), _unit_stride(key), _unit_stride(value)
    output, d_output = _unit_stride(output), _unit_stride(d_output)
    logsumexp = logsumexp.contiguous()
    d_query, d_key, d_value = (_empty(x, *x.shape[2:]) for x in (query, key, value))
    if 0 in key.shape or output.numel() == 0:
        return d_query.zero_(), d_key.zero_(), d_value.zero_()
    _, for_queries, for_keys = _launches(
        _padded(query.shape[3]), _padded(value.shape[3]), query.dtype, _shared_memory(query.device)
    )
    delta = torch.empty_like(logsumexp)
    with _on(query.device):
        _query_gradient_kernel[_tile_count(query, for_queries)](
            query, key, value, output, d_output, logsumexp, delta, d_query, offsets,
            *_strides(query, key, value, output, d_output, d_query), **_sizes(query, key, value),
            low=low, high=high, scale=scale, QUERIES=for_queries.rows, KEYS=for_queries.columns,
            num_warps=for_queries.num_warps, num_stages=for_queries.num_stages,
        )  # fmt: skip
        _key_gradient_kernel[_tile_count(key, for_keys)](
            query, key, value, d_output, logsumexp, delta, d_key, d_value, offsets,
            *_strides(query, key, value, d_output, d_key, d_value), **_sizes(query, key, value),
            low=low, high=high, scale=scale, QUERIES=for_keys.columns, KEYS=for_keys.rows,
            num_warps=for_keys.num_warps, num_stages=for_keys.num_stages,
        )  # fmt: skip
    return d_query, d_key, d_value


class _Gradient(torch.autograd.Function):
    """The backward pass as a function of its own, which vmap can map."""

    forward = staticmethod(_backward)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError("the triton backend of attention can be differentiated once only")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, tuple[int, ...]]:
        return _mapped(_Gradient, info, in_dims, inputs)


class _Attention(torch.autograd.Function):
    """Output and logarithms of the sums; only the output can be differentiated, and only once."""

    forward = staticmethod(_forward)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        query, key, value, offsets, *ctx.band = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(query, key, value, *output, offsets)

    @staticmethod
    def backward(ctx: Any, d_output: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        gradients = _Gradient.apply(d_output, *ctx.saved_tensors, *ctx.band)
        return *gradients, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, tuple[int, ...]]:
        return _mapped(_Attention, info, in_dims, inputs)


def _mapped(
    function: Any, info: Any, in_dims: tuple[Any, ...], inputs: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Apply a function of batches to a batch of batches."""
    folded = [
        _fold(x, dim, info.batch_size) if isinstance(x, Tensor) else x
        for x, dim in zip(inputs, in_dims, strict=True)
    ]
    outputs = function.apply(*folded)
    unfolded = [rearrange(x, "(s b) ... -> s b ...", s=info.batch_size) for x in outputs]
    return tuple(unfolded), (0,) * len(unfolded)


def triton_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    query_offset: int | Tensor = 0,
    scale: float | None = None,
) -> Tensor:
    """Scaled dot-product attention in time O(i j) and memory O(i + j), by the kernels of this module.

    Arguments as in :func:`mha_lib.attention`, which has checked them. The gradient is computed by kernels too;
    ``torch.func.grad`` and ``torch.func.vmap`` work, a second derivative is refused.

    Args:
        query: Shape ``(b, h, i, d)``, ``d`` at most 256.
        key: Shape ``(b, k, j, d)``.
        value: Shape ``(b, k, j, v)``, ``v`` at most 256.
        causal: Whether a query sees only keys at its own position and before.
        window: How many keys a query sees, itself included; if not causal, so many to each side.
        query_offset: Position of the first query, or one for each sample, shape ``(b,)``.
        scale: Factor of the scores; ``d ** -0.5`` if None.

    Returns:
        Shape ``(b, h, i, v)``, in the dtype of ``query``.
    """
    scale = (query.shape[-1] ** -0.5 if scale is None else scale) / math.log(2)
    if query.dtype == torch.float64:  # numbers reach a kernel as float32
        query, scale = query * scale, 1.0
    elif scale <= 0:  # the kernels look for the largest score before they scale it
        query, scale = (-query, -scale) if scale < 0 else (query * 0.0, 1.0)
    low, high = _band(causal, window, query_offset, query.shape[2], key.shape[2])
    offsets = (
        query_offset.to(query.device).contiguous() if isinstance(query_offset, Tensor) else None
    )
    dtype = query.dtype
    if query.device.type == "cpu" and dtype == torch.bfloat16:  # the interpreter's numpy has none
        query, key, value = query.float(), key.float(), value.float()
    output: Tensor = _Attention.apply(query, key, value, offsets, scale, low, high)[0]
    return output.to(dtype)


def _band(
    causal: bool, window: int | None, query_offset: int | Tensor, i: int, j: int
) -> tuple[int | None, int | None]:
    """The band of the keys, ``low <= key - query <= high``; without the offset where each sample has its own."""
    each = isinstance(query_offset, Tensor)
    offset, least, most = (0, -(2**62), 2**62) if each else (int(query_offset), -i, j)

    def clamp(bound: int) -> int:
        return max(least, min(most, bound))

    low = None if window is None else clamp(offset - window + 1)
    if causal:
        return low, clamp(offset)
    return low, None if window is None else clamp(offset + window - 1)
