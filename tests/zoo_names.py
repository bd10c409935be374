"""Broken attention, fourth part: few mistakes, but the layers are named as in a dozen of public sources."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo_specimen import RIGHT, STYLES, right_one, specimen
from tests.zoo_styles import Heads

SEPARATE = {
    "mingpt": ("query", "key", "value", "proj"),
    "translator": ("q_linear", "k_linear", "v_linear", "out"),
    "jadore": ("w_qs", "w_ks", "w_vs", "fc"),
    "distilbert": ("q_lin", "k_lin", "v_lin", "out_lin"),
    "concat": ("w_q", "w_k", "w_v", "w_concat"),
    "seq2seq": ("fc_q", "fc_k", "fc_v", "fc_o"),
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "letters": ("q", "k", "v", "o"),
    "capitals": ("Q", "K", "V", "O"),
    "llama2c": ("wq", "wk", "wv", "wo"),
    "keras": ("query_dense", "key_dense", "value_dense", "output_dense"),
    "lucidrains": ("to_q", "to_k", "to_v", "to_out"),
}
"""Names of the query, key, value and output layer."""

PACKED = {
    "neox": ("query_key_value", "dense"),
    "mpt": ("Wqkv", "out_proj"),
    "lucid_packed": ("to_qkv", "to_out"),
    "in_proj": ("in_proj", "out_proj"),
    "qkv_proj": ("qkv_proj", "proj"),
    "att_linear": ("qkv_linear", "out_linear"),
}
"""Names of the packed layer and the output layer."""


class NamedAttention(nn.Module):
    """Attention whose layers have the given names; two names mean a packed projection."""

    def __init__(self, dim: int, heads: int, names: tuple[str, ...], bias: bool = True) -> None:
        super().__init__()
        self.n_heads = heads
        self.dim = dim
        self.names = names
        width = 3 * dim if len(names) == 2 else dim
        for name in names[:-1]:
            self.add_module(name, nn.Linear(dim, width, bias=bias))
        self.add_module(names[-1], nn.Linear(dim, dim, bias=bias))
        self.drop = nn.Dropout(0.1)

    def layer(self, name: str, x: Tensor) -> Any:
        return self.get_submodule(name)(x)

    def roles(self, x: Tensor) -> Heads:
        if len(self.names) == 2:
            q, k, v = self.layer(self.names[0], x).chunk(3, dim=-1)
        else:
            q, k, v = (self.layer(name, x) for name in self.names[:3])
        return q, k, v

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_heads, self.dim // self.n_heads)).transpose(1, 2)  # type: ignore[no-untyped-call,no-any-return]

    def merge(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        return F.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1)

    def forward(self, x: Tensor) -> Any:
        q, k, v = (self.split(part) for part in self.roles(x))
        context = self.drop(self.weights(q, k)) @ v
        return self.layer(self.names[-1], self.merge(context))


class PackedByHead(NamedAttention):
    """The rows of the packed layer are ordered heads first, as in GPT-NeoX and BLOOM."""

    def roles(self, x: Tensor) -> Heads:
        packed = self.layer(self.names[0], x)
        q, k, v = packed.view(*x.shape[:2], self.n_heads, 3, -1).unbind(3)
        return q.flatten(2), k.flatten(2), v.flatten(2)


STYLES[PackedByHead] = ("by_head", False)
STYLES[NamedAttention] = ("names", False)


def named(source: str) -> dict[str, Any]:
    """The option that gives the layers the names of a source."""
    return {"names": (SEPARATE | PACKED)[source]}


@specimen("scale_sqrt_embed_dim", 24, 3, options=named("mingpt"))
@specimen("scale_sqrt_embed_dim", 36, 3, options=named("distilbert"), wrap=nn.Sequential)
@specimen("scale_sqrt_embed_dim", 48, 4, options=named("mpt"))
class NamedWideScale(NamedAttention):
    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        return F.softmax(q @ k.mT / math.sqrt(self.dim), dim=-1)


@specimen("scale_missing", 24, 3, options=named("jadore"))
@specimen("scale_missing", 36, 3, options=named("letters") | {"bias": False})
@specimen("scale_missing", 48, 4, options=named("lucid_packed"))
class NamedNoScale(NamedAttention):
    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        return F.softmax(torch.einsum("bhid,bhjd->bhij", q, k), dim=-1)


@specimen("merge_without_transpose", 24, 3, options=named("seq2seq"))
@specimen("merge_without_transpose", 36, 3, options=named("in_proj"))
class NamedViewMerge(NamedAttention):
    def merge(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], -1, self.dim)


@specimen("split_without_transpose", 24, 3, options=named("opt"))
@specimen("split_without_transpose", 36, 3, options=named("att_linear"), wrap=nn.Sequential)
class NamedViewSplit(NamedAttention):
    def split(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], self.n_heads, x.shape[1], -1)


@specimen("heads_dim_major", 24, 3, options=named("concat"))
@specimen("heads_dim_major", 36, 3, options=named("qkv_proj"))
class NamedDimMajor(NamedAttention):
    def split(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], -1, self.n_heads).movedim(-1, 1)


@specimen("single_head", 24, 3, options=named("capitals"))
@specimen("single_head", 36, 3, options=named("keras"))
class NamedSingle(NamedAttention):
    def split(self, x: Tensor) -> Tensor:
        return x.unsqueeze(1)


@specimen("softmax_over_queries", 24, 3, options=named("translator"))
@specimen("softmax_over_queries", 36, 3, options=named("lucidrains"))
class NamedRows(NamedAttention):
    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        return F.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=2)


@specimen("qkv_order_swapped", 24, 3, options=named("in_proj"))
@specimen("qkv_order_swapped", 36, 3, options=named("llama2c"))
class NamedValueFirst(NamedAttention):
    def roles(self, x: Tensor) -> Heads:
        v, k, q = super().roles(x)
        return q, k, v


@specimen("scale_without_sqrt", 48, 4, options=named("neox"))
class ByHeadNoRoot(PackedByHead):
    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        return F.softmax(q @ k.mT / (self.dim // self.n_heads), dim=-1)


@specimen("scale_sqrt_embed_dim", 60, 6, options=named("neox"))
class ByHeadWideScale(PackedByHead, NamedWideScale):
    pass


RIGHT += [right_one(NamedAttention, f"-{name}", named(name)) for name in SEPARATE | PACKED]
RIGHT += [right_one(PackedByHead, options=named("neox"))]
