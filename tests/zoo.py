"""A zoo of broken attention, for the doctor: each specimen is written as people write it who did not know better.

The specimens take the right code of ``zoo_styles.py``, which imitates a dozen of public sources, and replace a line or
two by wrong ones. They stand in ``zoo_heads.py``, ``zoo_scores.py``, ``zoo_numbers.py`` and ``zoo_names.py``; here are
those with two mistakes.

``SPECIMENS`` is all of them, ``RIGHT`` the styles without a mistake.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mha_lib import RotaryEmbedding
from tests import zoo_names
from tests.zoo_heads import (
    AnnotatedViewMerge,
    EinopsFlatMerge,
    KeyFirst,
    KeyFromTheQueryLayer,
    LlamaTiled,
    NeoxTiled,
    RaschkaDimMajor,
    TextbookReturnsTooEarly,
    ViewMerge,
    ViewSplit,
)
from tests.zoo_numbers import FunctionalDropout
from tests.zoo_scores import (
    FilledWhereReal,
    MaskForgotten,
    MaskOnTheQueries,
    NeoxForgotRotary,
    NeoxTurnsAll,
    PackedWideScale,
    ScoresTimesTril,
    TextbookNoRoot,
    TextbookNoScale,
    TrilDiagonalOne,
)
from tests.zoo_specimen import RIGHT, SPECIMENS, Specimen, as_self_attention, function, specimen
from tests.zoo_styles import BertSelfAttention, EncoderHead, to_heads

__all__ = ["RIGHT", "SPECIMENS", "Specimen", "zoo_names"]


@specimen("split_without_transpose", 48, 4, also=["merge_without_transpose"])
class ViewTwice(ViewSplit, ViewMerge):
    pass


@specimen(
    "kv_heads_tiled",
    48,
    6,
    also=["scale_missing"],
    options={"n_kv_heads": 3},
    num_kv_heads=3,
)
class TiledWithoutScale(LlamaTiled):
    def scores(self, xq: Tensor, keys: Tensor) -> Tensor:
        return torch.matmul(xq, keys.transpose(2, 3))


@specimen("projection_reused", 48, 4, also=["scale_sqrt_embed_dim"], wrap=as_self_attention)
class ReusedAndWideScale(KeyFromTheQueryLayer):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(self.d_model)


@specimen("heads_dim_major", 48, 4, also=["scale_missing"])
class DimMajorWithoutScale(RaschkaDimMajor):
    def weights(self, attn_scores: Tensor) -> Tensor:
        return torch.softmax(attn_scores, dim=-1)


@specimen("qkv_order_swapped", 48, 4, also=["scale_sqrt_embed_dim"])
class OrderAndWideScale(KeyFirst):
    def scores(self, q: Tensor, k: Tensor) -> Any:
        return (q @ k.transpose(-2, -1)) * self.n_embd**-0.5


@function("weight_transposed", 24, 3, also=["scale_missing"])
def transposed_without_scale(x: Tensor, w: dict[str, Tensor], num_heads: int) -> Tensor:
    q, k, v = (to_heads(x @ w[name].to(x), num_heads) for name in ("q", "k", "v"))
    a = torch.softmax(q @ k.mT, dim=-1)
    return rearrange(a @ v, "b h n d -> b n (h d)") @ w["out"].to(x)


@specimen("output_projection_missing", 36, 3, also=["scale_missing"])
class TooEarlyAndUnscaled(TextbookReturnsTooEarly):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.matmul(q, k.transpose(-2, -1))


@specimen("merge_without_transpose", 64, 4, also=["scale_sqrt_embed_dim"])
class FlatMergeAndWideScale(EinopsFlatMerge):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads)
        self.scale = dim**-0.5


@specimen("sees_future", 48, 4, also=["dropout_in_eval"])
class NoMaskAndDropout(MaskForgotten, FunctionalDropout):
    pass


@specimen("softmax_over_queries", 36, 3, also=["scale_missing"])
class RowsUnscaled(EncoderHead):
    def weights(self, query: Tensor, key: Tensor) -> Tensor:
        return F.softmax(query @ key.mT, dim=1)


@specimen("merge_without_transpose", 48, 4, also=["scale_sqrt_embed_dim"])
class MergeAndWideScale(ViewMerge, PackedWideScale):
    pass


@specimen("mask_inverted", 48, 4, also=["scale_missing"], takes_mask=True)
class InvertedUnscaled(FilledWhereReal, TextbookNoScale):
    pass


@specimen("padding_leaks", 64, 4, also=["merge_without_transpose"], takes_mask=True)
class LeakAndMerge(MaskOnTheQueries, AnnotatedViewMerge):
    pass


@specimen("causal_off_by_one", 48, 4, also=["dropout_in_eval"])
class OffByOneAndDropout(TrilDiagonalOne, FunctionalDropout):
    pass


@specimen(
    "rotary_on_values",
    48,
    6,
    also=["kv_heads_tiled"],
    options={"num_kv_heads": 2},
    num_kv_heads=2,
    rotary=RotaryEmbedding(8),
)
class TurnedAndTiled(NeoxTurnsAll, NeoxTiled):
    pass


@specimen("rotary_missing", 48, 4, also=["sees_future"], rotary=RotaryEmbedding(12))
class NeitherRotaryNorCausal(NeoxForgotRotary):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


@specimen("parameter_without_gradient", 48, 4, also=["scale_without_sqrt"])
class UnusedLayerAndNoRoot(TextbookNoRoot):
    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__(d_model, num_heads)
        self.norm = nn.LayerNorm(d_model)


@specimen("mask_times_zero", 48, 4, also=["dropout_in_eval"])
class TimesTrilAndDropout(ScoresTimesTril, FunctionalDropout):
    pass


@specimen("softmax_over_heads", 48, 4, also=["scale_missing"])
class BertHeadsUnscaled(BertSelfAttention):
    def probabilities(self, scores: Tensor, attention_mask: Tensor | None) -> Tensor:
        return F.softmax(scores, dim=1)
