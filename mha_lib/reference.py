"""Attention itself, written to be read: the definition that everything else in the library is held to."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, repeat
from torch import Tensor

from mha_lib._checks import check_attention


class AttentionOutput(NamedTuple):
    """What attention returns when its weights are asked for.

    Attributes:
        output: The attended values.
        weights: The attention weights of each head, before dropout, shape ``(b, h, i, j)``.
    """

    output: Tensor
    weights: Tensor


def reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
) -> AttentionOutput:
    """Scaled dot-product attention, one softmax for each head and query.

    Computes ``softmax(query @ key.T * scale + bias) @ value`` for each head, over the keys that ``mask`` allows,
    in float32 at least, under autocast too. A query that may attend to nothing gets zeros, in the output and in
    every gradient.

    Letters: ``b`` batch, ``h`` query heads, ``k`` key/value heads (``h`` is a multiple of ``k``; query head ``q``
    reads key/value head ``q // (h / k)``), ``i`` queries, ``j`` keys, ``d`` head dimension, ``v`` value width.

    Args:
        query: Shape ``(b, h, i, d)``.
        key: Shape ``(b, k, j, d)``.
        value: Shape ``(b, k, j, v)``.
        mask: Boolean, True where a query may attend; broadcasts to ``(b, h, i, j)``.
        bias: Numbers added to the scaled scores; broadcasts to ``(b, h, i, j)``. Minus infinity forbids.
        scale: Factor of the scores; ``d ** -0.5`` if None.
        softcap: If given, scaled scores become ``softcap * tanh(scores / softcap)``.
        sinks: One logit a query head, shape ``(h,)``; it takes part in the softmax and carries no value.
        dropout_p: Probability with which a weight is dropped. It always acts.

    Returns:
        ``AttentionOutput(output, weights)`` of shapes ``(b, h, i, v)`` and ``(b, h, i, j)``, in the dtype of
        ``query``.

    Raises:
        TypeError: An argument is not a tensor, a number or of the dtype that it must have.
        ValueError: Shapes, dtypes or devices do not fit, or a number is out of range.

    Source: Vaswani et al., "Attention is all you need" (2017), section 3.2.1. Built in chapter 1 of the book.

    Example:
        >>> import torch
        >>> from mha_lib import reference_attention
        >>> query, key, value = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 3, 4), torch.arange(3.0).view(1, 1, 3, 1)
        >>> output, weights = reference_attention(query, key, value)
        >>> weights[0, 0, 0]
        tensor([0.3333, 0.3333, 0.3333])
        >>> output[0, 0, :, 0]
        tensor([1., 1.])
    """
    check_attention(
        query,
        key,
        value,
        mask=mask,
        bias=bias,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        dropout_p=dropout_p,
    )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    dtype = torch.promote_types(query.dtype, torch.float32)
    group = query.shape[1] // key.shape[1]
    with _full_precision(query.device):
        key = repeat(key.to(dtype), "b k j d -> b (k g) j d", g=group)
        value = repeat(value.to(dtype), "b k j v -> b (k g) j v", g=group)
        scores = einsum(query.to(dtype), key, "b h i d, b h j d -> b h i j") * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if bias is not None:
            scores = scores + bias.to(dtype)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        limited = mask is not None or bias is not None or sinks is not None
        weights = _safe_softmax(scores, sinks) if limited else scores.softmax(dim=-1)
        kept = F.dropout(weights, dropout_p)
        output = einsum(kept, value, "b h i j, b h j v -> b h i v")
    return AttentionOutput(output.to(query.dtype), weights.to(query.dtype))


def _full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Keep autocast from lowering the precision of what is computed inside."""
    if device.type == "meta":
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _safe_softmax(scores: Tensor, sinks: Tensor | None = None) -> Tensor:
    """Softmax over the keys; a row that may attend to nothing gives zeros, forward and backward."""
    if sinks is not None:
        batch, _, queries, _ = scores.shape
        column = repeat(sinks.to(scores.dtype), "h -> b h i 1", b=batch, i=queries)
        scores = torch.cat([scores, column], dim=-1)
    empty = (scores == -torch.inf).all(dim=-1, keepdim=True)
    weights = scores.masked_fill(empty, 0.0).softmax(dim=-1).masked_fill(empty, 0.0)
    return weights if sinks is None else weights[..., :-1]
