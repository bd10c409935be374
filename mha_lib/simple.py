"""Multi-head attention with one projection for all heads. Built in chapter 2 of the book."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mha_lib._checks import check_bool, check_head_dim, check_inputs, check_same_names
from mha_lib.heads import merge_heads, split_heads
from mha_lib.masks import causal_mask, combine_masks
from mha_lib.reference import AttentionOutput, reference_attention

if TYPE_CHECKING:
    from mha_lib.split import SplitMultiHeadAttention


class SimpleMultiHeadAttention(nn.Module):
    """Multi-head attention with one packed projection for all queries, keys and values.

    ``qkv_proj`` maps ``embed_dim`` to ``3 * embed_dim``; its rows are ordered ``(three h d)``: all queries, then all
    keys, then all values, each head by head. The same function, with the same weights, as
    ``torch.nn.MultiheadAttention(batch_first=True)``.

    With other keys or values, ``qkv_proj`` is read and not called, so hooks and adapters on it act in self-attention
    only. The modules of ``split()`` are always called.

    Args:
        embed_dim: Width of the tokens, ``e``.
        num_heads: Number of heads, ``h``; must divide ``embed_dim``.
        bias: Whether the projections add a bias.
        causal: Whether a query sees only the keys at its own position and before.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A size is below 1, or ``num_heads`` does not divide ``embed_dim``.

    Source: Vaswani et al., "Attention is all you need" (2017), section 3.2.2. Built in chapter 2 of the book.

    Example:
        >>> import torch
        >>> attention = SimpleMultiHeadAttention(embed_dim=12, num_heads=3)
        >>> attention(torch.randn(2, 5, 12)).shape
        torch.Size([2, 5, 12])
    """

    def __init__(
        self, embed_dim: int, num_heads: int, *, bias: bool = True, causal: bool = False
    ) -> None:
        super().__init__()
        self.head_dim = check_head_dim(embed_dim, num_heads)
        self.embed_dim, self.num_heads = int(embed_dim), int(num_heads)
        self.causal = check_bool("causal", causal)
        self.qkv_proj = nn.Linear(embed_dim, 3 * embed_dim, bias=check_bool("bias", bias))
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        return_weights: bool = False,
    ) -> Tensor | AttentionOutput:
        """Attend from ``query`` to ``key`` and ``value``.

        Args:
            query: Shape ``(b, i, e)``.
            key: Shape ``(b, j, e)``; None means ``query``: self-attention.
            value: Shape ``(b, j, e)``; None means ``key``.
            mask: Boolean, True where a query may attend; broadcasts to ``(b, h, i, j)``.
            bias: Numbers added to the scaled scores; broadcasts to ``(b, h, i, j)``.
            return_weights: Whether to return the weights of each head too.

        Returns:
            Shape ``(b, i, e)``; with ``return_weights``, ``AttentionOutput(output, weights)`` with weights of shape
            ``(b, h, i, j)``.

        Raises:
            TypeError: An argument is not a tensor or of the wrong dtype.
            ValueError: Shapes, dtypes or devices do not fit.
        """
        query, key, value = check_inputs(
            query,
            key,
            value,
            mask=mask,
            bias=bias,
            return_weights=return_weights,
            embed_dim=self.embed_dim,
            num_heads=self.num_heads,
            parameter=next(self.parameters()),
        )
        q, k, v = (split_heads(x, self.head_dim) for x in self._project(query, key, value))
        if self.causal:
            causal = causal_mask(query.shape[1], key.shape[1], query_offset=0, device=query.device)
            mask = combine_masks(mask, causal)
        attended = reference_attention(q, k, v, mask=mask, bias=bias)
        output: Tensor = self.out_proj(merge_heads(attended.output))
        return AttentionOutput(output, attended.weights) if return_weights else output

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Self-attention needs one matrix product; other sources meet their own third of the same weights."""
        if query is key is value:
            return tuple(rearrange(self.qkv_proj(query), "b n (three e) -> three b n e", three=3))
        weights = self.qkv_proj.weight.chunk(3)
        biases = (None,) * 3 if self.qkv_proj.bias is None else self.qkv_proj.bias.chunk(3)
        return tuple(map(F.linear, (query, key, value), weights, biases))

    def split(self) -> SplitMultiHeadAttention:
        """Return the same function with one module for each head; chapter 3 of the book builds it.

        The weights are copied, bit for bit, and can all be trained; which of them were frozen is not remembered.

        Raises:
            ValueError: Only one of ``qkv_proj`` and ``out_proj`` has a bias.
        """
        from mha_lib.split import SplitMultiHeadAttention

        packed, last = self.qkv_proj.state_dict(), self.out_proj.state_dict()
        check_same_names("split", packed, last)
        state = {f"out_proj.{name}": tensor.clone() for name, tensor in last.items()}
        for name, rows in packed.items():
            heads = rearrange(rows, "(three h d) ... -> h three d ...", three=3, d=self.head_dim)
            for index, head in enumerate(heads):
                for part, tensor in zip("qkv", head, strict=True):
                    state[f"heads.{index}.{part}_proj.{name}"] = tensor.clone()
        with torch.device("meta"):
            module = SplitMultiHeadAttention(
                self.embed_dim, self.num_heads, bias="bias" in last, causal=self.causal
            )
        module.load_state_dict(state, assign=True)
        return module.train(self.training)
