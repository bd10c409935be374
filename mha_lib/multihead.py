"""The finished module: four linear layers around the attention function. Built in chapter 5 of the book."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor, nn

from mha_lib._checks import (
    check_bool,
    check_cache,
    check_callable,
    check_choice,
    check_device,
    check_floating_dtype,
    check_inputs,
    check_int,
    check_norm,
    check_numbers,
    check_rotary_module,
    check_scores,
    check_sizes,
)
from mha_lib.attention import BACKENDS, AttentionOptions, compute_attention, refuse
from mha_lib.cache import KVCache
from mha_lib.heads import merge_heads, split_heads
from mha_lib.reference import AttentionOutput


class MultiHeadAttention(nn.Module):
    """Multi-head attention for self-attention, cross-attention and generation.

    Four plain ``nn.Linear`` layers are really called, so hooks, adapters, quantised and sharded layers work:
    ``q_proj`` maps ``embed_dim`` to ``num_heads * head_dim``, ``k_proj`` and ``v_proj`` map ``kdim`` and ``vdim`` to
    ``num_kv_heads * head_dim``, ``out_proj`` maps ``num_heads * head_dim`` to ``embed_dim``. Heads are cut by their
    size, so a module that holds the rows of some heads only computes those.

    The steps: project, norm of each query and key head, rotary, cache, then :func:`mha_lib.attention`, project.

    Args:
        embed_dim: Width of the tokens, ``e``.
        num_heads: Number of query heads, ``h``.
        num_kv_heads: Number of key/value heads, ``k``, which divides ``h``; as many as query heads if None. Query head
            ``q`` reads key/value head ``q // (h / k)``.
        head_dim: Features of one head, ``d``; ``embed_dim / num_heads`` if None, else free.
        kdim: Width of the tokens that keys are made of; ``embed_dim`` if None.
        vdim: Width of the tokens that values are made of; ``embed_dim`` if None.
        bias: Whether the projections add a bias.
        out_bias: Whether ``out_proj`` adds a bias; as ``bias`` if None.
        dropout: Probability with which a weight is dropped, in training only.
        causal: Whether a query sees only the keys at its own position and before.
        window: How many keys a query sees, as in :func:`mha_lib.attention`; None for all.
        rotary: Turns queries and keys, called as ``rotary(x, offset)``, such as :class:`mha_lib.RotaryEmbedding`.
        qk_norm: Makes the norms of query and key heads, called with ``head_dim``, such as ``torch.nn.RMSNorm``.
        scale: Factor of the scores; ``head_dim ** -0.5`` if None.
        softcap: If given, scaled scores become ``softcap * tanh(scores / softcap)``.
        sinks: Whether each query head has a logit that takes part in its softmax and carries no value: a parameter of
            shape ``(h,)``, zeros at first.
        backend: As in :func:`mha_lib.attention`.
        device: Where to make the parameters.
        dtype: Their dtype; torch's default if None.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A size or a number is out of range, or the numbers of heads do not fit.

    Source: Vaswani et al., "Attention is all you need" (2017), section 3.2.2; grouped heads: Ainslie et al., "GQA"
    (2023).

    Example:
        >>> module = MultiHeadAttention(embed_dim=32, num_heads=4, num_kv_heads=2, causal=True)
        >>> module(torch.randn(2, 5, 32)).shape
        torch.Size([2, 5, 32])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        kdim: int | None = None,
        vdim: int | None = None,
        bias: bool = True,
        out_bias: bool | None = None,
        dropout: float = 0.0,
        causal: bool = False,
        window: int | None = None,
        rotary: nn.Module | None = None,
        qk_norm: Callable[[int], nn.Module] | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: bool = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = check_sizes(embed_dim, num_heads, num_kv_heads, head_dim, kdim, vdim)
        self.embed_dim, self.num_heads, self.num_kv_heads, self.head_dim, self.kdim, self.vdim = (
            sizes
        )
        check_numbers(scale=scale, softcap=softcap, dropout=dropout)
        self.dropout, self.scale, self.softcap = dropout, scale, softcap
        self.causal = check_bool("causal", causal)
        self.window = None if window is None else check_int("window", window, minimum=1)
        check_choice("backend", backend, BACKENDS)
        self.backend = backend
        self.rotary = check_rotary_module(rotary, self.head_dim)
        check_device("device", device)
        if device is not None and isinstance(rotary, nn.Module):
            rotary.to(device)
        check_callable("qk_norm", qk_norm, "torch.nn.RMSNorm")
        dtype = check_floating_dtype("dtype", dtype)

        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        check_bool("bias", bias)
        out_bias = bias if out_bias is None else check_bool("out_bias", out_bias)
        self.q_proj = nn.Linear(self.embed_dim, queries, bias=bias, device=device, dtype=dtype)
        self.k_proj = nn.Linear(self.kdim, keys, bias=bias, device=device, dtype=dtype)
        self.v_proj = nn.Linear(self.vdim, keys, bias=bias, device=device, dtype=dtype)
        self.out_proj = nn.Linear(
            queries, self.embed_dim, bias=out_bias, device=device, dtype=dtype
        )
        self.q_norm, self.k_norm = (
            None if qk_norm is None else check_norm(qk_norm(self.head_dim)).to(device, dtype)
            for _ in range(2)
        )
        self.sinks: nn.Parameter | None = None
        if check_bool("sinks", sinks):
            self.sinks = nn.Parameter(torch.zeros(self.num_heads, device=device, dtype=dtype))

    @overload
    def forward(
        self,
        query: Tensor,
        key: Tensor | None = ...,
        value: Tensor | None = ...,
        *,
        mask: Tensor | None = ...,
        bias: Tensor | None = ...,
        cache: KVCache | None = ...,
        return_weights: Literal[False] = ...,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        query: Tensor,
        key: Tensor | None = ...,
        value: Tensor | None = ...,
        *,
        mask: Tensor | None = ...,
        bias: Tensor | None = ...,
        cache: KVCache | None = ...,
        return_weights: Literal[True],
    ) -> AttentionOutput: ...

    @overload
    def forward(
        self,
        query: Tensor,
        key: Tensor | None = ...,
        value: Tensor | None = ...,
        *,
        mask: Tensor | None = ...,
        bias: Tensor | None = ...,
        cache: KVCache | None = ...,
        return_weights: bool,
    ) -> Tensor | AttentionOutput: ...

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        cache: KVCache | None = None,
        return_weights: bool = False,
    ) -> Tensor | AttentionOutput:
        """Attend from ``query`` to ``key`` and ``value``.

        Args:
            query: Shape ``(b, i, e)``.
            key: Shape ``(b, j, kdim)``; None means ``query``: self-attention.
            value: Shape ``(b, j, vdim)``; None means ``key``.
            mask: Boolean, True where a query may attend; broadcasts to ``(b, h, i, j)``. With a cache, ``j`` counts all
                keys, those that this call adds included.
            bias: Numbers added to the scaled scores; broadcasts to ``(b, h, i, j)``.
            cache: Keys and values so far; those of this call are added. Positions start at its length. Use it under
                ``torch.no_grad()``: its memory is written again by the next call.
            return_weights: Whether to return the weights of each head too.

        Returns:
            Shape ``(b, i, e)``; with ``return_weights``, ``AttentionOutput(output, weights)`` with weights of shape
            ``(b, h, i, j)``.

        Raises:
            TypeError: An argument is not a tensor or of the wrong dtype.
            ValueError: Shapes, dtypes or devices do not fit, the cache is full, or the backend cannot do what is
                asked. The cache is then as it was.
        """
        offset = check_cache(cache)
        query, key, value = check_inputs(
            query,
            key,
            value,
            mask=None,
            bias=None,
            return_weights=return_weights,
            embed_dim=self.embed_dim,
            num_heads=self.num_heads,
            parameter=getattr(self.out_proj, "weight", None),
            kdim=self.kdim,
            vdim=self.vdim,
        )
        q = self._prepared(self.q_proj(query), self.q_norm, offset)
        k = self._prepared(self.k_proj(key), self.k_norm, offset)
        v = split_heads(self.v_proj(value), self.head_dim)
        options = AttentionOptions(
            mask,
            bias,
            self.causal,
            self.window,
            offset,
            self.scale,
            self.softcap,
            _local(self.sinks),
            self.dropout if self.training else 0.0,
            return_weights,
        )
        check_scores(mask, bias, options.sinks, q, k, v, past=offset)
        refuse(self.backend, q, v, options)
        if cache is not None:
            k, v = cache.append(k, v)
        attended = compute_attention(q, k, v, options, self.backend)
        if isinstance(attended, AttentionOutput):
            return AttentionOutput(self._merged(attended.output), attended.weights)
        return self._merged(attended)

    if TYPE_CHECKING:
        __call__ = forward

    def _merged(self, attended: Tensor) -> Tensor:
        output: Tensor = self.out_proj(merge_heads(attended))
        return output

    def _prepared(self, x: Tensor, norm: nn.Module | None, offset: int) -> Tensor:
        """Queries or keys: split, normed and turned, in the dtype that the projection gave them."""
        heads = split_heads(x, self.head_dim)
        if norm is None and self.rotary is None:
            return heads
        if norm is not None:
            heads = norm(heads)
        if self.rotary is not None:
            heads = self.rotary(heads, offset)
        return heads.to(x.dtype)

    def extra_repr(self) -> str:
        """What ``print`` shows besides the layers."""
        shown = f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}"
        options = {
            "dropout": self.dropout or None,
            "causal": self.causal or None,
            "window": self.window,
            "scale": self.scale,
            "softcap": self.softcap,
        }
        given = (f", {name}={value}" for name, value in options.items() if value is not None)
        return shown + "".join(given)


def _local(sinks: Tensor | None) -> Tensor | None:
    """The sinks of the heads that this process computes, where heads are spread over several."""
    to_local = getattr(sinks, "to_local", None)
    return sinks if to_local is None else to_local()
