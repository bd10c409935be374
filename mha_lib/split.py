"""Multi-head attention with one module for each head. Built in chapter 3 of the book."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from mha_lib._checks import check_bool, check_head_dim, check_inputs, check_same_names
from mha_lib.heads import merge_heads
from mha_lib.masks import causal_mask, combine_masks
from mha_lib.reference import AttentionOutput, reference_attention
from mha_lib.simple import SimpleMultiHeadAttention


class AttentionHead(nn.Module):
    """The query, key and value transformations of one head; each reads the whole embedding.

    Args:
        embed_dim: Width of the tokens, ``e``.
        head_dim: Features of the head, ``d``.
        bias: Whether the transformations add a bias.
    """

    def __init__(self, embed_dim: int, head_dim: int, *, bias: bool = True) -> None:
        super().__init__()
        self.q_proj = nn.Linear(embed_dim, head_dim, bias=bias)
        self.k_proj = nn.Linear(embed_dim, head_dim, bias=bias)
        self.v_proj = nn.Linear(embed_dim, head_dim, bias=bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map ``(b, i, e)``, ``(b, j, e)``, ``(b, j, e)`` to ``(b, i, d)``, ``(b, j, d)``, ``(b, j, d)``."""
        return self.q_proj(query), self.k_proj(key), self.v_proj(value)


class SplitMultiHeadAttention(nn.Module):
    """Multi-head attention with an independent query, key and value transformation for each head.

    The same function as :class:`mha_lib.SimpleMultiHeadAttention` with the same weights. Here ``heads[i]`` is a module
    of its own, so one head can be frozen, inspected, removed (with its columns of ``out_proj``) or given its own
    learning rate.

    Args:
        embed_dim: Width of the tokens, ``e``.
        num_heads: Number of heads, ``h``; must divide ``embed_dim``.
        bias: Whether the projections add a bias.
        causal: Whether a query sees only the keys at its own position and before.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A size is below 1, or ``num_heads`` does not divide ``embed_dim``.

    Source: Vaswani et al., "Attention is all you need" (2017), section 3.2.2. Built in chapter 3 of the book.

    Example:
        >>> import torch
        >>> attention = SplitMultiHeadAttention(embed_dim=12, num_heads=3)
        >>> attention(torch.randn(2, 5, 12)).shape
        torch.Size([2, 5, 12])
        >>> attention.heads[0].q_proj.weight.shape
        torch.Size([4, 12])
    """

    def __init__(
        self, embed_dim: int, num_heads: int, *, bias: bool = True, causal: bool = False
    ) -> None:
        super().__init__()
        self.head_dim = check_head_dim(embed_dim, num_heads)
        self.embed_dim = int(embed_dim)
        self.causal = check_bool("causal", causal)
        check_bool("bias", bias)
        self.heads = nn.ModuleList(
            AttentionHead(embed_dim, self.head_dim, bias=bias) for _ in range(num_heads)
        )
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)

    @property
    def num_heads(self) -> int:
        """Number of heads, ``h``."""
        return len(self.heads)

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
        """Attend from ``query`` to ``key`` and ``value``; arguments and result as in ``SimpleMultiHeadAttention``."""
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
        projected = zip(*(head(query, key, value) for head in self.heads), strict=True)
        q, k, v = (rearrange(list(heads), "h b n d -> b h n d") for heads in projected)
        if self.causal:
            causal = causal_mask(query.shape[1], key.shape[1], query_offset=0, device=query.device)
            mask = combine_masks(mask, causal)
        attended = reference_attention(q, k, v, mask=mask, bias=bias)
        output: Tensor = self.out_proj(merge_heads(attended.output))
        return AttentionOutput(output, attended.weights) if return_weights else output

    def fuse(self) -> SimpleMultiHeadAttention:
        """Return the same function with one packed projection: the inverse of ``SimpleMultiHeadAttention.split``.

        The weights are copied, bit for bit, and can all be trained; which of them were frozen is not remembered.

        Raises:
            ValueError: Heads were added or removed, so that they no longer fill ``embed_dim``, or only some of the
                projections have a bias.
        """
        if self.num_heads * self.head_dim != self.embed_dim:
            raise ValueError(
                f"fuse needs heads that fill embed_dim={self.embed_dim}, "
                f"got {self.num_heads} heads of head_dim={self.head_dim}"
            )
        last = self.out_proj.state_dict()
        parts = [
            head.get_submodule(f"{part}_proj").state_dict() for part in "qkv" for head in self.heads
        ]
        check_same_names("fuse", last, *parts)
        state = {f"out_proj.{name}": tensor.clone() for name, tensor in last.items()}
        for name in last:
            state[f"qkv_proj.{name}"] = rearrange(
                [part[name] for part in parts], "r d ... -> (r d) ..."
            )
        with torch.device("meta"):
            module = SimpleMultiHeadAttention(
                self.embed_dim, self.num_heads, bias="bias" in last, causal=self.causal
            )
        module.load_state_dict(state, assign=True)
        return module.train(self.training)
