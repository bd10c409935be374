"""Masks say who may attend to whom: boolean, True where a query may attend. A bias is added to the scores instead.

Masks are combined with ``&``. All shapes broadcast to ``(b, h, i, j)``: batch, heads, queries, keys.
Built in chapter 1 of the book.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from mha_lib._checks import (
    check_bool,
    check_floating_dtype,
    check_int,
    check_integers,
    check_lengths,
    check_query_offset,
)


def _distance(
    query_length: int,
    key_length: int,
    query_offset: int | Tensor | None,
    device: torch.device | str | None,
) -> Tensor:
    """Position of each query minus that of each key: ``(i, j)``, or ``(b, 1, i, j)``."""
    query_length = check_int("query_length", query_length, minimum=0)
    key_length = check_int("key_length", key_length, minimum=0)
    offset = check_query_offset(query_offset, query_length, key_length)
    if isinstance(offset, Tensor):
        device = offset.device if device is None else device
        offset = rearrange(offset.to(device), "b -> b 1 1 1")
    queries = rearrange(torch.arange(query_length, device=device), "i -> i 1")
    return offset + queries - torch.arange(key_length, device=device)


def causal_mask(
    query_length: int,
    key_length: int,
    *,
    query_offset: int | Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Let each query see the keys at its own position and before.

    Causal is by position: query ``i`` stands at ``query_offset + i`` and sees key ``j`` where
    ``j <= query_offset + i``.

    Args:
        query_length: Number of queries, ``i``.
        key_length: Number of keys, ``j``.
        query_offset: Position of the first query, an int or one integer for each sample, shape ``(b,)``. May be
            negative. It must be given when the lengths differ, since libraries disagree about what is meant.
        device: Where to make the mask.

    Returns:
        Boolean, shape ``(i, j)``, or ``(b, 1, i, j)`` if ``query_offset`` is a tensor.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A length is negative, or the lengths differ and there is no ``query_offset``.

    Example:
        >>> causal_mask(2, 4, query_offset=2).int()
        tensor([[1, 1, 1, 0],
                [1, 1, 1, 1]], dtype=torch.int32)
    """
    return _distance(query_length, key_length, query_offset, device) >= 0


def sliding_window_mask(
    query_length: int,
    key_length: int,
    window: int,
    *,
    query_offset: int | Tensor | None = None,
    causal: bool = True,
    device: torch.device | str | None = None,
) -> Tensor:
    """Let each query see the ``window`` latest keys, itself included.

    Args:
        query_length: Number of queries, ``i``.
        key_length: Number of keys, ``j``.
        window: At least 1. Causal: the number of keys in sight. Not causal: keys closer than ``window`` on both
            sides are in sight, ``|query_offset + i - j| < window``.
        query_offset: As in :func:`causal_mask`.
        causal: Whether later keys are hidden.
        device: Where to make the mask.

    Returns:
        Boolean, shape ``(i, j)``, or ``(b, 1, i, j)`` if ``query_offset`` is a tensor.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: ``window`` is below 1, a length is negative, or the lengths differ without a ``query_offset``.

    Source: Beltagy et al., "Longformer" (2020), section 3.1.

    Example:
        >>> sliding_window_mask(3, 3, 2).int()
        tensor([[1, 0, 0],
                [1, 1, 0],
                [0, 1, 1]], dtype=torch.int32)
    """
    window = check_int("window", window, minimum=1)
    distance = _distance(query_length, key_length, query_offset, device)
    near = distance.abs() < window
    return near & (distance >= 0) if check_bool("causal", causal) else near


def padding_mask(
    lengths: Tensor | Sequence[int], max_length: int, *, side: str = "right"
) -> Tensor:
    """Hide the padding of samples that are shorter than the batch is long.

    Args:
        lengths: Number of real tokens of each sample, integers of shape ``(b,)``. Their range is not checked while
            torch compiles.
        max_length: Length to which the samples were padded, ``j``.
        side: Where the padding stands, ``"right"`` or ``"left"``.

    Returns:
        Boolean, True for real tokens, shape ``(b, 1, 1, j)``.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A length is outside ``0 .. max_length``, or ``side`` is neither word.

    Example:
        >>> padding_mask(torch.tensor([3, 1]), 3)[:, 0, 0].int()
        tensor([[1, 1, 1],
                [1, 0, 0]], dtype=torch.int32)
    """
    lengths = rearrange(check_lengths(lengths, max_length, side), "b -> b 1 1 1")
    positions = torch.arange(max_length, device=lengths.device)
    return positions < lengths if side == "right" else positions >= max_length - lengths


def document_mask(document_ids: Tensor | Sequence[Sequence[int]]) -> Tensor:
    """Let tokens attend only within their own document, where several are packed in one sequence.

    Args:
        document_ids: The document that each token belongs to, integers of shape ``(b, n)``.

    Returns:
        Boolean, shape ``(b, 1, i, j)`` with ``i = j = n``.

    Raises:
        TypeError: ``document_ids`` does not hold integers.
        ValueError: ``document_ids`` has another rank than two.

    Example:
        >>> document_mask(torch.tensor([[7, 7, 9]]))[0, 0].int()
        tensor([[1, 1, 0],
                [1, 1, 0],
                [0, 0, 1]], dtype=torch.int32)
    """
    document_ids = check_integers("document_ids", document_ids, axes="batch sequence")
    return rearrange(document_ids, "b i -> b 1 i 1") == rearrange(document_ids, "b j -> b 1 1 j")


def alibi_bias(
    num_heads: int,
    query_length: int,
    key_length: int,
    *,
    query_offset: int | Tensor | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """A bias that falls linearly with distance, at a slope of its own for each head.

    Adds ``-slope * |query_offset + i - j|``. The slopes are a geometric sequence that starts at
    ``2 ** (-8 / num_heads)``; where ``num_heads`` is no power of two, those of the next smaller power come first
    and every other one of the next larger power fills up.

    Args:
        num_heads: Number of query heads, ``h``.
        query_length: Number of queries, ``i``.
        key_length: Number of keys, ``j``.
        query_offset: As in :func:`causal_mask`.
        device: Where to make the bias.
        dtype: A floating dtype; torch's default if None.

    Returns:
        Shape ``(h, i, j)``, or ``(b, h, i, j)`` if ``query_offset`` is a tensor.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: ``num_heads`` is below 1, a length is negative, or the lengths differ without a ``query_offset``.

    Source: Press et al., "Train short, test long" (2022), section 3.

    Example:
        >>> alibi_bias(2, 1, 3, query_offset=2)
        tensor([[[-0.1250, -0.0625,  0.0000]],
        <BLANKLINE>
                [[-0.0078, -0.0039,  0.0000]]])
    """
    num_heads = check_int("num_heads", num_heads, minimum=1)
    dtype = check_floating_dtype("dtype", dtype)
    distance = _distance(query_length, key_length, query_offset, device)
    slopes = torch.tensor(
        _alibi_slopes(num_heads),
        device=distance.device,
        dtype=torch.promote_types(dtype, torch.float32),
    )
    return (rearrange(slopes, "h -> h 1 1") * -distance.abs()).to(dtype)


def _alibi_slopes(num_heads: int) -> list[float]:
    """The slope of each head, from steep to flat."""
    power = 2 ** (num_heads.bit_length() - 1)
    slopes = [2 ** (-8 * (head + 1) / power) for head in range(power)]
    between = [2 ** (-4 * (head + 1) / power) for head in range(0, 2 * power, 2)]
    return slopes + between[: num_heads - power]


def position_mask(
    query_length: int,
    key_length: int,
    *,
    causal: bool,
    window: int | None,
    query_offset: int | Tensor,
    device: torch.device | str | None = None,
) -> Tensor | None:
    """The mask that ``causal`` and ``window`` ask for, or None where it would hide nothing.

    The last of many queries sees all keys: while a model writes token by token, no mask is needed.

    Args:
        query_length: Number of queries, ``i``.
        key_length: Number of keys, ``j``.
        causal: Whether later keys are hidden.
        window: As in :func:`mha_lib.sliding_window_mask`, or None for all keys.
        query_offset: As in :func:`mha_lib.causal_mask`.
        device: Where to make the mask.

    Returns:
        None, or boolean of shape ``(i, j)``, or ``(b, 1, i, j)`` if ``query_offset`` is a tensor.

    Example:
        >>> position_mask(1, 4, causal=True, window=None, query_offset=3) is None
        True
    """
    if not causal and window is None:
        return None
    if not isinstance(query_offset, Tensor):
        nearest, farthest = query_offset - key_length + 1, query_offset + query_length - 1
        before = not causal or nearest >= 0
        if before and (window is None or (farthest < window and nearest > -window)):
            return None
    if window is None:
        return causal_mask(query_length, key_length, query_offset=query_offset, device=device)
    return sliding_window_mask(
        query_length, key_length, window, query_offset=query_offset, causal=causal, device=device
    )


def combine_masks(*masks: Tensor | None) -> Tensor | None:
    """All masks must allow; None allows everything."""
    combined = None
    for mask in masks:
        if mask is not None:
            combined = mask if combined is None else combined & mask
    return combined
