"""Broken attention, third part: dropout, numbers and gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tests.zoo_specimen import as_masked, as_self_attention, function, specimen
from tests.zoo_styles import (
    BertSelfAttention,
    CausalSelfAttention,
    EinopsAttention,
    FlashSelfAttention,
    Head,
    Heads,
    LlamaAttention,
    MultiHeadAttention,
    MultiheadAttention,
    NeoxAttention,
    SelfAttention,
    attention_function,
)

# --- dropout_in_eval


@specimen("dropout_in_eval", 48, 4)
class FunctionalDropout(CausalSelfAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        att = self.softmax(self.mask(self.scores(q, k)))
        return F.dropout(att, self.dropout) @ v


@specimen("dropout_in_eval", 64, 4)
class SdpaDropoutAlways(FlashSelfAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout, is_causal=True)


@specimen("dropout_in_eval", 36, 3)
class BertFunctionalDropout(BertSelfAttention):
    def context(self, probs: Tensor, value_layer: Tensor) -> Tensor:
        return super().context(F.dropout(probs, p=0.1), value_layer)


@specimen("dropout_in_eval", 32, 4)
class DropoutMadeInForward(Head):
    def softmax(self, wei: Tensor) -> Tensor:
        weights: Tensor = nn.Dropout(0.2)(F.softmax(wei, dim=-1))
        return weights


@function("dropout_in_eval", 24, 3)
def dropout_of_the_output(x: Tensor, w: dict[str, Tensor], num_heads: int) -> Tensor:
    return F.dropout(attention_function(x, w, num_heads), 0.1)


# --- nan_when_all_masked


@specimen("nan_when_all_masked", 48, 4, takes_mask=True)
class TextbookMinusInfinity(MultiHeadAttention):
    def apply_mask(self, scores: Tensor, mask: Tensor) -> Tensor:
        return scores.masked_fill(mask[:, None, None, :] == 0, float("-inf"))


@specimen("nan_when_all_masked", 36, 3, takes_mask=True)
class EinopsMinusInfinity(EinopsAttention):
    def fill(self, sim: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            sim = sim.masked_fill(~rearrange(mask, "b j -> b 1 1 j"), -torch.inf)
        return sim


@specimen("nan_when_all_masked", 64, 4, takes_mask=True)
class BertAdditiveInfinity(BertSelfAttention):
    def extended_mask(self, attention_mask: Tensor, like: Tensor) -> Tensor:
        bias = torch.zeros(attention_mask.shape, dtype=like.dtype, device=like.device)
        return bias.masked_fill_(attention_mask.logical_not(), float("-inf"))[:, None, None]


# --- not_finite


@specimen("not_finite", 48, 4, takes_mask=True)
class ZeroTimesInfinity(BertSelfAttention):
    def extended_mask(self, attention_mask: Tensor, like: Tensor) -> Tensor:
        return (1.0 - attention_mask[:, None, None, :].to(like.dtype)) * float("-inf")


@specimen("not_finite", 32, 4)
class TriuTimesInfinity(LlamaAttention):
    def causal(self, scores: Tensor) -> Tensor:
        mask = torch.triu(torch.ones(scores.shape[-2:]), diagonal=1) * float("-inf")
        return scores + mask.to(scores)


@specimen("not_finite", 36, 3, wrap=as_self_attention)
class RootOfTheScores(MultiHeadAttention):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.sqrt(torch.matmul(q, k.transpose(-2, -1)))


# --- overflow_in_half


@specimen("overflow_in_half", 48, 4, takes_mask=True)
class MinusOneBillion(MultiHeadAttention):
    def apply_mask(self, scores: Tensor, mask: Tensor) -> Tensor:
        return scores.masked_fill(mask[:, None, None, :] == 0, -1e9)


@specimen("overflow_in_half", 64, 4, takes_mask=True, wrap=as_masked)
class VideoMinusTwenty(SelfAttention):
    def fill(self, energy: Tensor, mask: Tensor) -> Tensor:
        return energy.masked_fill(mask[:, None, None, :] == 0, float("-1e20"))


@specimen("overflow_in_half", 36, 3)
class GPT2MinusTenBillion(CausalSelfAttention):
    def mask(self, att: Tensor) -> Tensor:
        t = att.size(-1)
        return att.masked_fill(self.bias[:, :, :t, :t] == 0, -1e10)


@specimen("overflow_in_half", 32, 4)
class SmallestFloat(Head):
    def mask(self, wei: Tensor) -> Tensor:
        t = wei.shape[-1]
        return wei.masked_fill(self.tril[:t, :t] == 0, torch.finfo(torch.float32).min)


@specimen("overflow_in_half", 60, 6, takes_mask=True)
class UvaNineQuadrillion(MultiheadAttention):
    """As the tutorial has it: -9e15."""


# --- parameter_without_gradient


@specimen("parameter_without_gradient", 48, 4)
class LayerNeverUsed(MultiHeadAttention):
    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__(d_model, num_heads)
        self.fc = nn.Linear(d_model, d_model)


@specimen("parameter_without_gradient", 36, 3)
class KeysDetached(CausalSelfAttention):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return super().scores(q.detach(), k.detach())


@specimen("parameter_without_gradient", 64, 4)
class QueryWithoutGrad(NeoxAttention):
    def positions(self, q: Tensor, k: Tensor, v: Tensor) -> Heads:
        return q.detach(), k, v


@specimen("parameter_without_gradient", 32, 4)
class LectureScoresNoGrad(Head):
    @torch.no_grad()
    def affinities(self, q: Tensor, k: Tensor) -> Any:
        return super().affinities(q, k)


@specimen("parameter_without_gradient", 40, 4)
class DataOfAParameter(EinopsAttention):
    def project(self, x: Tensor) -> Heads:
        k, v = self.to_kv(x).chunk(2, dim=-1)
        return F.linear(x, self.to_q.weight.data), k, v
