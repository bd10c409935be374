"""The attention function: one set of arguments, several ways to compute them. Built in chapter 5 of the book."""

from __future__ import annotations

import importlib.util
import os
from typing import Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from mha_lib._checks import _autocasts, check_attention, check_bool, check_choice, check_positions
from mha_lib.local import block_reach, local_attention
from mha_lib.masks import combine_masks, position_mask
from mha_lib.reference import AttentionOutput, _full_precision, reference_attention
from mha_lib.tiled import QUERY_TILE, tiled_attention

BACKENDS = ("auto", "reference", "tiled", "sdpa", "triton")

LONG = 512
"""Keys from which tiles are taken instead of the formula, for their memory: it grows with n, not with n squared."""

SHORT = 128
"""Keys up to which two matrix products train faster in bfloat16 than PyTorch's fused kernel on a CPU."""


CANNOT = {
    "reference": (),
    "tiled": ("weights",),
    "sdpa": ("weights", "softcap", "sinks"),
    "triton": ("weights", "softcap", "sinks", "bias", "mask", "dropout"),
}
"""What a backend refuses when it is asked for by name."""


class BackendChoice(NamedTuple):
    """Which backend computes a call, and why.

    Attributes:
        backend: ``"reference"``, ``"tiled"``, ``"sdpa"`` or ``"triton"``.
        reason: Why, in a few words.
    """

    backend: str
    reason: str


class AttentionOptions(NamedTuple):
    """The arguments of :func:`attention` that say what is computed."""

    mask: Tensor | None
    bias: Tensor | None
    causal: bool
    window: int | None
    query_offset: int | Tensor | None
    scale: float | None
    softcap: float | None
    sinks: Tensor | None
    dropout_p: float
    return_weights: bool


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = ...,
    bias: Tensor | None = ...,
    causal: bool = ...,
    window: int | None = ...,
    query_offset: int | Tensor | None = ...,
    scale: float | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    dropout_p: float = ...,
    return_weights: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = ...,
    bias: Tensor | None = ...,
    causal: bool = ...,
    window: int | None = ...,
    query_offset: int | Tensor | None = ...,
    scale: float | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    dropout_p: float = ...,
    return_weights: Literal[True],
    backend: str = ...,
) -> AttentionOutput: ...


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = ...,
    bias: Tensor | None = ...,
    causal: bool = ...,
    window: int | None = ...,
    query_offset: int | Tensor | None = ...,
    scale: float | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    dropout_p: float = ...,
    return_weights: bool,
    backend: str = ...,
) -> Tensor | AttentionOutput: ...


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    query_offset: int | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    return_weights: bool = False,
    backend: str = "auto",
) -> Tensor | AttentionOutput:
    """Scaled dot-product attention with masks by position, and a choice of how it is computed.

    The function is that of :func:`mha_lib.reference_attention`; ``causal`` and ``window`` stand for the masks of
    :func:`mha_lib.causal_mask` and :func:`mha_lib.sliding_window_mask`, without their memory where the backend can.
    ``mask``, ``causal`` and ``window`` must all allow. The computation keeps the dtype of ``query``, under autocast
    too; a query that may attend to nothing gets zeros, in the output and in every gradient. Forward-mode derivatives
    (``torch.func.jvp``) exist in the backend ``"reference"`` only.

    Args:
        query: Shape ``(b, h, i, d)``.
        key: Shape ``(b, k, j, d)``.
        value: Shape ``(b, k, j, v)``.
        mask: Boolean, True where a query may attend; broadcasts to ``(b, h, i, j)``.
        bias: Numbers added to the scaled scores; broadcasts to ``(b, h, i, j)``. Minus infinity forbids.
        causal: Whether a query sees only the keys at its own position and before.
        window: How many keys a query sees, itself included; without ``causal``, the keys closer than ``window`` on
            both sides. None for all.
        query_offset: Position of the first query, an int or one integer for each sample, shape ``(b,)``. It must be
            given when ``causal`` or ``window`` is used and the lengths differ.
        scale: Factor of the scores; ``d ** -0.5`` if None.
        softcap: If given, scaled scores become ``softcap * tanh(scores / softcap)``.
        sinks: One logit a query head, shape ``(h,)``; it takes part in the softmax and carries no value.
        dropout_p: Probability with which a weight is dropped. It always acts.
        return_weights: Whether to return the weights of each head too.
        backend: ``"reference"`` writes the formula down; ``"tiled"`` needs memory for a tile of the scores at a
            time; ``"sdpa"`` is PyTorch's fused kernel; ``"triton"`` is this library's kernel for NVIDIA GPUs.
            ``"auto"`` chooses, and :func:`mha_lib.choose_backend` tells what and why.

    Returns:
        Shape ``(b, h, i, v)``, in the dtype of ``query``; with ``return_weights``, ``AttentionOutput(output, weights)``
        with weights of shape ``(b, h, i, j)``, before dropout.

    Raises:
        TypeError: An argument is not a tensor, a number or of the dtype that it must have.
        ValueError: Shapes, dtypes or devices do not fit, a number is out of range, or the backend named cannot do what
            is asked: ``sdpa`` has no weights, softcap and sinks; ``tiled`` no weights; ``triton`` none of these and no
            bias, mask and dropout.

    Source: Vaswani et al., "Attention is all you need" (2017), section 3.2.1.

    Example:
        >>> query, key, value = torch.zeros(1, 4, 2, 8), torch.zeros(1, 2, 3, 8), torch.ones(1, 2, 3, 8)
        >>> attention(query, key, value, causal=True, query_offset=1).shape
        torch.Size([1, 4, 2, 8])
        >>> attention(query, key, value, return_weights=True).weights[0, 0, 0]
        tensor([0.3333, 0.3333, 0.3333])
    """
    asked = AttentionOptions(
        mask, bias, causal, window, query_offset, scale, softcap, sinks, dropout_p, return_weights
    )
    options = _checked(query, key, value, asked, backend)
    return compute_attention(query, key, value, options, backend)


def choose_backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    query_offset: int | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    return_weights: bool = False,
    backend: str = "auto",
) -> BackendChoice:
    """Tell which backend :func:`attention` takes for the same arguments, and why.

    The answer depends on shapes, dtype, device and options, on whether a gradient will be asked for, and on whether
    ``torch.compile`` is tracing; the numbers in the tensors do not matter.

    Args:
        query: Shape ``(b, h, i, d)``. This and all others: as in :func:`mha_lib.attention`.
        key: Shape ``(b, k, j, d)``.
        value: Shape ``(b, k, j, v)``.
        mask: Broadcasts to ``(b, h, i, j)``.
        bias: Broadcasts to ``(b, h, i, j)``.
        causal: Whether a query sees only the keys at its own position and before.
        window: How many keys a query sees.
        query_offset: Position of the first query, an int or shape ``(b,)``.
        scale: Factor of the scores.
        softcap: Bound of the scores.
        sinks: Shape ``(h,)``.
        dropout_p: Probability with which a weight is dropped.
        return_weights: Whether the weights are returned too.
        backend: If not ``"auto"``, that is the answer, or the error.

    Returns:
        ``BackendChoice(backend, reason)``.

    Raises:
        TypeError: As :func:`mha_lib.attention`.
        ValueError: As :func:`mha_lib.attention`.

    Example:
        >>> query = torch.zeros(1, 4, 1024, 8)
        >>> choose_backend(query, query, query, softcap=50.0).backend
        'tiled'
    """
    asked = AttentionOptions(
        mask, bias, causal, window, query_offset, scale, softcap, sinks, dropout_p, return_weights
    )
    options = _checked(query, key, value, asked, backend)
    return _choose(query, *_keys_in_sight(query, key, value, options), backend)


def _checked(
    query: Tensor, key: Tensor, value: Tensor, asked: AttentionOptions, backend: str
) -> AttentionOptions:
    """Check all arguments; the offset of the queries is settled."""
    check_attention(
        query,
        key,
        value,
        mask=asked.mask,
        bias=asked.bias,
        scale=asked.scale,
        softcap=asked.softcap,
        sinks=asked.sinks,
        dropout_p=asked.dropout_p,
    )
    check_bool("return_weights", asked.return_weights)
    offset = check_positions(
        query, key, causal=asked.causal, window=asked.window, query_offset=asked.query_offset
    )
    check_choice("backend", backend, BACKENDS)
    options = _moved(asked, asked.mask, asked.bias, offset)
    refuse(backend, query, value, options)
    return options


def compute_attention(
    query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions, backend: str
) -> Tensor | AttentionOutput:
    """Compute a checked call, in the dtype of ``query``, under autocast too."""
    key, value, options = _keys_in_sight(query, key, value, options)
    chosen = _choose(query, key, value, options, backend).backend
    if not _autocasts(query.device):
        return _compute(chosen, query, key, value, options)
    with _full_precision(query.device):
        return _compute(chosen, query, key, value, options)


def refuse(backend: str, query: Tensor, value: Tensor, options: AttentionOptions) -> None:
    """Raise a ``ValueError`` if the backend that was named cannot do what is asked."""
    refusal = None if backend == "auto" else _refusal(backend, query, value, options)
    if refusal is not None:
        raise ValueError(f"backend {backend!r} {refusal}; backend='auto' finds one that can")


def _refusal(backend: str, query: Tensor, value: Tensor, options: AttentionOptions) -> str | None:
    """What keeps a backend from computing a call, or None."""
    asked = {
        "weights": options.return_weights,
        "softcap": options.softcap is not None,
        "sinks": options.sinks is not None,
        "bias": options.bias is not None,
        "mask": options.mask is not None,
        "dropout": options.dropout_p > 0,
    }
    cannot = [name for name in CANNOT[backend] if asked[name]]
    if cannot:
        return f"cannot do {', '.join(cannot)}"
    return _triton_refusal(query, value) if backend == "triton" else None


def _triton_refusal(query: Tensor, value: Tensor) -> str | None:
    """Why Triton cannot run here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "is not installed: pip install triton"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if not query.is_cuda:
        return f"needs a CUDA device, got tensors on {query.device.type}"
    if query.dtype == torch.float64:
        return "computes in float32, got float64"
    widest = 128 if query.dtype == torch.float32 else 256
    width = max(query.shape[-1], value.shape[-1])
    if width > widest:
        return f"needs a head_dim of at most {widest} for {query.dtype}, got {width}"
    return None


def _keys_in_sight(
    query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
) -> tuple[Tensor, Tensor, AttentionOptions]:
    """Leave out the keys that no query can see: with a cache and a window, most of them."""
    offset, window, keys = options.query_offset, options.window, key.shape[2]
    positional = options.causal or window is not None
    if not positional or options.return_weights or offset is None or isinstance(offset, Tensor):
        return key, value, options
    first = 0 if window is None else max(0, offset - window + 1)
    ahead = 1 if options.causal or window is None else window
    last = max(first, min(keys, offset + query.shape[2] - 1 + ahead))
    if first == 0 and last == keys:
        return key, value, options
    mask, bias = (
        x if x is None or x.ndim == 0 or x.shape[-1] == 1 else x[..., first:last]
        for x in (options.mask, options.bias)
    )
    options = _moved(options, mask, bias, offset - first)
    return key[:, :, first:last], value[:, :, first:last], options


def _moved(
    options: AttentionOptions, mask: Tensor | None, bias: Tensor | None, query_offset: int | Tensor
) -> AttentionOptions:
    """The same call for keys that start elsewhere; torch 2.6 cannot trace ``_replace``."""
    _, _, causal, window, _, scale, softcap, sinks, dropout_p, return_weights = options
    return AttentionOptions(
        mask, bias, causal, window, query_offset, scale, softcap, sinks, dropout_p, return_weights
    )


def _choose(
    query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions, backend: str
) -> BackendChoice:
    """The backend that was named, or the one that is best; the thresholds are measured in chapter 5 of the book."""
    if query.numel() == 0 or key.shape[2] == 0 or options.dropout_p == 1:
        return BackendChoice("reference", "there is nothing to attend to")
    if backend != "auto":
        return BackendChoice(backend, "the caller named it")
    if options.return_weights:
        return BackendChoice("reference", "only the formula written down has weights to return")
    if options.softcap is not None or options.sinks is not None:
        return BackendChoice(_by_hand(query, key, options), "SDPA has neither softcap nor sinks")
    eager_on_cpu = query.device.type == "cpu" and not torch.compiler.is_compiling()
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    learned = options.bias is not None and options.bias.requires_grad and torch.is_grad_enabled()
    if eager_on_cpu and (options.dropout_p > 0 or learned or value.shape[-1] != query.shape[-1]):
        why = "dropout, learned bias or value width: SDPA is not fused on a CPU"
        return BackendChoice(_by_hand(query, key, options), why)
    if eager_on_cpu and trains:
        if query.dtype == torch.float16:
            why = "SDPA's float16 gradient is slow on a CPU"
            return BackendChoice(_by_hand(query, key, options), why)
        if query.dtype == torch.bfloat16 and _keys_at_once(key, options) <= SHORT:
            return BackendChoice("reference", "SDPA's bfloat16 gradient is slow on a CPU if short")
    if _in_blocks(key, options):
        return BackendChoice(
            "sdpa", "PyTorch's own attention, on blocks of queries and the keys in reach"
        )
    return BackendChoice("sdpa", "PyTorch's own attention can do all that is asked")


def _by_hand(query: Tensor, key: Tensor, options: AttentionOptions) -> str:
    """Tiles where the score matrix is large; a compiled graph would unroll them, and gets the formula."""
    if torch.compiler.is_compiling():
        return "reference"
    large = query.shape[2] >= QUERY_TILE and _keys_at_once(key, options) >= LONG
    return "tiled" if large else "reference"


def _keys_at_once(key: Tensor, options: AttentionOptions) -> int:
    """How many keys one softmax meets: those in reach of a block, where blocks are cut."""
    if options.window is not None and _in_blocks(key, options):
        return block_reach(options.window, options.causal)
    return key.shape[2]


def _in_blocks(key: Tensor, options: AttentionOptions) -> bool:
    """Whether a window is so narrow that cutting blocks pays."""
    if options.window is None or options.return_weights:
        return False
    return 2 * block_reach(options.window, options.causal) <= key.shape[2]


def _compute(
    backend: str, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
) -> Tensor | AttentionOutput:
    """Compute a checked call with the backend that was chosen."""
    mask, bias, causal, window, offset, scale, softcap, sinks, dropout_p, _ = options
    offset = 0 if offset is None else offset
    if backend == "triton":
        from mha_lib.triton_kernel import triton_attention

        return triton_attention(
            query, key, value, causal=causal, window=window, query_offset=offset, scale=scale
        )
    if backend == "tiled":
        return tiled_attention(
            query,
            key,
            value,
            mask=mask,
            bias=bias,
            causal=causal,
            window=window,
            query_offset=offset,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            dropout_p=dropout_p,
        )

    if backend == "sdpa" and _needs_no_mask(options):
        return _fused(query, key, value, None, None, options, causal=causal)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
        if backend == "sdpa":
            return _fused(q, k, v, mask, bias, options)
        return _written_out(q, k, v, mask, bias, options).output

    if window is not None and _in_blocks(key, options):
        return local_attention(
            attend,
            query,
            key,
            value,
            window=window,
            causal=causal,
            query_offset=offset,
            mask=mask,
            bias=bias,
        )
    visible = position_mask(
        query.shape[2],
        key.shape[2],
        causal=causal,
        window=window,
        query_offset=offset,
        device=query.device,
    )
    mask = combine_masks(mask, visible)
    if options.return_weights:
        return _written_out(query, key, value, mask, bias, options)
    return attend(query, key, value, mask, bias)


def _needs_no_mask(options: AttentionOptions) -> bool:
    """Whether the fused kernel's own causal mask, which starts at position 0, is all that is needed, or none."""
    if options.mask is not None or options.bias is not None or options.window is not None:
        return False
    offset = options.query_offset
    return not options.causal or (not isinstance(offset, Tensor) and offset == 0)


def _written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    options: AttentionOptions,
) -> AttentionOutput:
    return reference_attention(
        query,
        key,
        value,
        mask=mask,
        bias=bias,
        scale=options.scale,
        softcap=options.softcap,
        sinks=options.sinks,
        dropout_p=options.dropout_p,
    )


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    options: AttentionOptions,
    causal: bool = False,
) -> Tensor:
    """PyTorch's fused kernel; it wants neighbouring features, one mask, boolean or added, and a key for each row."""
    if any(x.stride(-1) != 1 for x in (query, key, value)):
        query, key, value = (x.contiguous() for x in (query, key, value))
    group = query.shape[1] // key.shape[1]
    shared = all(size == 1 for x in (mask, bias) if x is not None for size in x.shape[-3:-1])
    folds = group > 1 and shared and not causal
    if folds:
        query = rearrange(query, "b (k g) i d -> b k (g i) d", g=group)
    elif group > 1 and query.is_cuda:
        key, value = (repeat(x, "b k j d -> b (k g) j d", g=group) for x in (key, value))
    mask, empty = _fused_mask(mask, bias, query.dtype, key.shape[2])
    scale = options.scale
    if scale is not None and scale <= 0:  # kernels look for the largest score before they scale it
        query, scale = (-query, -scale) if scale < 0 else (query * 0.0, 1.0)
    # Not the comparison itself: while torch 2.6 traces sizes that vary, that is no bool.
    grouped = True if query.shape[1] != key.shape[1] else False  # noqa: SIM210
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=options.dropout_p,
        is_causal=causal,
        scale=scale,
        enable_gqa=grouped,
    )
    if folds:
        output = rearrange(output, "b k (g i) v -> b (k g) i v", g=group)
    return output if empty is None else output.masked_fill(empty, 0.0)


def _fused_mask(
    mask: Tensor | None, bias: Tensor | None, dtype: torch.dtype, keys: int
) -> tuple[Tensor | None, Tensor | None]:
    """One mask for both, in which every row may attend to something, and the rows that should not."""
    if bias is None:
        if mask is None:
            return None, None
        mask = _along_keys(mask, keys)
        empty = ~mask.any(dim=-1, keepdim=True)
        return mask | empty, empty
    if mask is not None:
        bias = bias.masked_fill(~mask, -torch.inf)
    bias = _along_keys(bias, keys)
    closed = bias == -torch.inf
    empty = closed.all(dim=-1, keepdim=True)
    if bias.dtype != dtype:
        limit = torch.finfo(dtype).max
        bias = bias.to(torch.promote_types(bias.dtype, dtype)).clamp(-limit, limit)
        bias = bias.masked_fill(closed, -torch.inf).to(dtype)
    return bias.masked_fill(empty, 0.0), empty


def _along_keys(x: Tensor, keys: int) -> Tensor:
    """Four axes, and one number for each key, side by side in memory, as the kernels want them."""
    x = x[(None,) * (4 - x.ndim)]
    return (
        x.expand(-1, -1, -1, keys).contiguous() if x.shape[-1] != keys or x.stride(-1) != 1 else x
    )
