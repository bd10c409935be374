"""What the library is compared with: plain PyTorch, written as fast as it gets, and the ways people write attention."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from benchmarks.measure import Effort, UnavailableError, installed
from mha_lib import MultiHeadAttention

Function = Callable[..., Tensor]


class Shape(NamedTuple):
    """Sizes of a self-attention."""

    b: int
    n: int
    e: int
    h: int

    def fit(self, effort: Effort) -> Shape:
        """The sizes to measure: tiny ones if it has to be quick."""
        return Shape(min(self.b, 2), min(self.n, 16), 32, 4) if effort.quick else self

    def __str__(self) -> str:
        return f"b={self.b} n={self.n} e={self.e} h={self.h}"


class PackedFloor(nn.Module):
    """One packed projection, views, SDPA, one projection: about as fast as PyTorch lets one be."""

    def __init__(self, e: int, h: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv_proj, self.out_proj = nn.Linear(e, 3 * e), nn.Linear(e, e)
        self.h, self.dropout = h, dropout

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(b, n, e)`` to ``(b, n, e)``."""
        b, n, e = x.shape
        qkv = self.qkv_proj(x).view(b, n, 3, self.h, e // self.h).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        q, k, v = qkv.unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        output: Tensor = self.out_proj(attended.transpose(1, 2).reshape(b, n, e))
        return output


class SeparateFloor(nn.Module):
    """The floor with three projections in place of the packed one: what four plain layers cost at least."""

    def __init__(self, e: int, h: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(e, e), nn.Linear(e, e), nn.Linear(e, e)
        self.out_proj = nn.Linear(e, e)
        self.h = h

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(b, n, e)`` to ``(b, n, e)``."""
        b, n, e = x.shape
        q = self.q_proj(x).view(b, n, self.h, e // self.h).transpose(1, 2)
        k = self.k_proj(x).view(b, n, self.h, e // self.h).transpose(1, 2)
        v = self.v_proj(x).view(b, n, self.h, e // self.h).transpose(1, 2)
        attended = F.scaled_dot_product_attention(q, k, v)
        output: Tensor = self.out_proj(attended.transpose(1, 2).reshape(b, n, e))
        return output


def torch_peer(shape: Shape, *, training: bool) -> nn.Module:
    """``nn.MultiheadAttention`` without weights; in ``eval`` it takes what PyTorch calls the fast path."""
    peer = nn.MultiheadAttention(shape.e, shape.h, batch_first=True).train(training)
    return Called(peer, lambda x: peer(x, x, x, need_weights=False)[0])


def x_transformers_peer(shape: Shape) -> nn.Module:
    """The attention layer of x-transformers, if it is installed."""
    if not installed("x_transformers"):
        raise UnavailableError("x-transformers is not installed")
    layers = importlib.import_module("x_transformers.x_transformers")
    peer: nn.Module = layers.Attention(
        dim=shape.e, dim_head=shape.e // shape.h, heads=shape.h, flash=True
    )
    return peer


class Called(nn.Module):
    """A module that is called in a certain way."""

    def __init__(self, module: nn.Module, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.module, self.call = module, call

    def forward(self, x: Tensor) -> Tensor:
        """Call it."""
        return self.call(x)


def projected(module: MultiHeadAttention, x: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values of all heads."""
    layers = module.q_proj, module.k_proj, module.v_proj
    return tuple(rearrange(layer(x), "b n (h d) -> b h n d", d=module.head_dim) for layer in layers)


def joined(module: MultiHeadAttention, heads: Tensor) -> Tensor:
    """The output of all heads, projected."""
    output: Tensor = module.out_proj(rearrange(heads, "b h n d -> b n (h d)"))
    return output


def loop_over_heads(module: MultiHeadAttention, x: Tensor) -> Tensor:
    """One head after the other, each with its own rows of the weights."""
    outputs = []
    for start in range(0, module.embed_dim, module.head_dim):
        rows = slice(start, start + module.head_dim)
        q, k, v = (
            F.linear(x, layer.weight[rows], layer.bias[rows])
            for layer in (module.q_proj, module.k_proj, module.v_proj)
        )
        weights = (q @ k.mT * module.head_dim**-0.5).softmax(dim=-1)
        outputs.append(weights @ v)
    output: Tensor = module.out_proj(torch.cat(outputs, dim=-1))
    return output


def batched_heads(module: MultiHeadAttention, x: Tensor) -> Tensor:
    """All heads in two batched matrix products."""
    q, k, v = projected(module, x)
    weights = (q @ k.mT * module.head_dim**-0.5).softmax(dim=-1)
    return joined(module, weights @ v)


def einsum_heads(module: MultiHeadAttention, x: Tensor) -> Tensor:
    """The same two products as einsum."""
    q, k, v = projected(module, x)
    scores = einsum(q, k, "b h i d, b h j d -> b h i j") * module.head_dim**-0.5
    return joined(module, einsum(scores.softmax(dim=-1), v, "b h i j, b h j d -> b h i d"))


def fused_heads(module: MultiHeadAttention, x: Tensor) -> Tensor:
    """PyTorch's fused kernel."""
    q, k, v = projected(module, x)
    return joined(module, F.scaled_dot_product_attention(q, k, v))


LADDER = {
    "loop": (loop_over_heads, "a loop over the heads"),
    "batched": (batched_heads, "all heads in batched matrix products"),
    "einsum": (einsum_heads, "all heads with einsum"),
    "sdpa": (fused_heads, "SDPA"),
}
"""Ways to compute the same function from the same weights."""


def eager_einsum(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention as two einsums, each step an operation of its own."""
    scores = torch.einsum("bhid,bhjd->bhij", query, key) * query.shape[-1] ** -0.5
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(dim=-1), value)


def compiled(modules: Sequence[nn.Module], effort: Effort) -> list[Function]:
    """Modules after ``torch.compile``; where it has to be quick, without generating code."""
    torch.compiler.reset()
    backend = "aot_eager" if effort.quick else "inductor"
    return [
        torch.compile(module, fullgraph=True, dynamic=False, backend=backend) for module in modules
    ]


def parameters(*sources: object) -> list[Tensor]:
    """What to differentiate by: the parameters of modules, and tensors themselves."""
    leaves: list[Tensor] = []
    for source in sources:
        leaves += source.parameters() if isinstance(source, nn.Module) else []
        leaves += [source] if isinstance(source, Tensor) else []
    return leaves
