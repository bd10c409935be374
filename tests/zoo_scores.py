"""Broken attention, second part: scores, softmax, masks and positions."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mha_lib import RotaryEmbedding
from tests.zoo_specimen import as_masked, as_self_attention, function, specimen, without_mask
from tests.zoo_styles import (
    BertSelfAttention,
    CausalSelfAttention,
    EinopsAttention,
    EncoderHead,
    FlashSelfAttention,
    GPT2Attention,
    Head,
    Heads,
    LabmlAttention,
    Lens,
    LlamaAttention,
    LocalEinopsAttention,
    MistralAttention,
    MultiHeadAttention,
    MultiheadAttention,
    MultiHeadedAttention,
    NeoxAttention,
    RaschkaAttention,
    RotaryLlama,
    RotaryNeox,
    SelfAttention,
    VitAttention,
    attention_function,
    finish,
    project,
    rotate_half,
)

SMALL_INIT = {"std": 0.02}

# --- scale_sqrt_embed_dim


@specimen("scale_sqrt_embed_dim", 48, 4, options=SMALL_INIT)
@specimen("scale_sqrt_embed_dim", 96, 6, options={"bias": False})
class PackedWideScale(CausalSelfAttention):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1)) / math.sqrt(self.n_embd)


@specimen("scale_sqrt_embed_dim", 64, 4, wrap=without_mask)
class VideoWideScale(SelfAttention):
    def softmax(self, energy: Tensor) -> Tensor:
        return torch.softmax(energy / (self.embed_size ** (1 / 2)), dim=3)


@specimen("scale_sqrt_embed_dim", 36, 3)
class EinopsWideScale(EinopsAttention):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads)
        self.scale = dim**-0.5


@specimen("scale_sqrt_embed_dim", 32, 4)
class LectureScaleByInputWidth(Head):
    def __init__(self, n_embd: int, head_size: int) -> None:
        super().__init__(n_embd, head_size)
        self.c = n_embd

    def affinities(self, q: Tensor, k: Tensor) -> Any:
        return q @ k.transpose(-2, -1) * self.c**-0.5


# --- scale_missing


@specimen("scale_missing", 48, 4)
class TextbookNoScale(MultiHeadAttention):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.matmul(q, k.transpose(-2, -1))


@specimen("scale_missing", 60, 6)
class VitNoScale(VitAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        attn = (q @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.attn_drop(attn) @ v


@specimen("scale_missing", 32, 4)
class LectureNoScale(Head):
    def affinities(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.transpose(-2, -1)


@specimen("scale_missing", 64, 4)
class SdpaScaleOne(FlashSelfAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)


@specimen("scale_missing", 36, 3)
class LensNoScale(Lens):
    def pattern(self, q: Tensor, k: Tensor) -> Tensor:
        return self.causal(torch.einsum("bqhd,bkhd->bhqk", q, k)).softmax(dim=-1)


# --- scale_without_sqrt


@specimen("scale_without_sqrt", 48, 4)
class DividedByHeadDim(GPT2Attention):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1)) / k.size(-1)


@specimen("scale_without_sqrt", 36, 3)
class ScaledTwice(VitAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q * self.scale
        return F.scaled_dot_product_attention(q, k, v)


@specimen("scale_without_sqrt", 64, 4, wrap=as_self_attention)
class TextbookNoRoot(MultiHeadAttention):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.matmul(q, k.transpose(-2, -1)) / self.d_k


@specimen("scale_without_sqrt", 32, 4)
class ScaleOnQueryAndKey(EinopsAttention):
    def similarity(self, q: Tensor, k: Tensor) -> Any:
        return super().similarity(q, k * self.scale)


# --- scale_inverted


@specimen("scale_inverted", 32, 4)
class LectureTimesRoot(Head):
    def affinities(self, q: Tensor, k: Tensor) -> Any:
        return q @ k.transpose(-2, -1) * k.shape[-1] ** 0.5


@specimen("scale_inverted", 48, 3)
class EinopsTimesRoot(EinopsAttention):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads)
        self.scale = (dim // heads) ** 0.5


@specimen("scale_inverted", 64, 4)
class RaschkaTimesRoot(RaschkaAttention):
    def weights(self, attn_scores: Tensor) -> Tensor:
        return torch.softmax(attn_scores * self.head_dim**0.5, dim=-1)


@specimen("scale_inverted", 36, 3)
class SdpaScaleAsDivisor(FlashSelfAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale = math.sqrt(q.size(-1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


# --- scale_wrong


@specimen("scale_wrong", 60, 6)
class RootOfHeads(BertSelfAttention):
    def probabilities(self, scores: Tensor, attention_mask: Tensor | None) -> Tensor:
        return F.softmax(scores / math.sqrt(self.num_attention_heads), dim=-1)


@specimen("scale_wrong", 36, 3)
class EightFromThePaper(LlamaAttention):
    def scores(self, xq: Tensor, keys: Tensor) -> Tensor:
        return torch.matmul(xq, keys.transpose(2, 3)) / 8.0


@specimen("scale_wrong", 48, 4)
class RootOfLength(CausalSelfAttention):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1)) / math.sqrt(k.size(-2))


@specimen("scale_wrong", 54, 6)
class UvaWrongDimension(MultiheadAttention):
    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.size()[1])


@function("scale_wrong", 24, 3)
def three_times_the_width(x: Tensor, w: dict[str, Tensor], num_heads: int) -> Tensor:
    q, k, v = project(x, w, num_heads)
    return finish(F.scaled_dot_product_attention(q, k, v, scale=(3 * x.shape[-1]) ** -0.5), w)


# --- softmax_over_queries


@specimen("softmax_over_queries", 48, 4, options=SMALL_INIT)
class PackedSoftmaxRows(CausalSelfAttention):
    def softmax(self, att: Tensor) -> Tensor:
        return F.softmax(att, dim=-2)


@specimen("softmax_over_queries", 64, 4, wrap=without_mask)
class VideoSoftmaxDimTwo(SelfAttention):
    def softmax(self, energy: Tensor) -> Tensor:
        return torch.softmax(energy / (self.head_dim ** (1 / 2)), dim=2)


@specimen("softmax_over_queries", 36, 3)
class LabmlSoftmaxDimZero(LabmlAttention):
    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__(d_model, heads)
        self.softmax = nn.Softmax(dim=0)


@specimen("softmax_over_queries", 32, 4)
class LectureSoftmaxDimOne(Head):
    def softmax(self, wei: Tensor) -> Tensor:
        return F.softmax(wei, dim=1)


@specimen("softmax_over_queries", 60, 6)
class EinopsSoftmaxRows(EinopsAttention):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads)
        self.attend = nn.Softmax(dim=-2)


@specimen("softmax_over_queries", 40, 4)
class LensSoftmaxRows(Lens):
    def pattern(self, q: Tensor, k: Tensor) -> Tensor:
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / self.d_head**0.5
        return self.causal(scores).softmax(dim=2)


# --- softmax_over_heads


@specimen("softmax_over_heads", 48, 4)
class BertSoftmaxDimOne(BertSelfAttention):
    def probabilities(self, scores: Tensor, attention_mask: Tensor | None) -> Tensor:
        return F.softmax(scores / math.sqrt(self.attention_head_size), dim=1)


@specimen("softmax_over_heads", 36, 3)
class LabmlSoftmaxLast(LabmlAttention):
    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__(d_model, heads)
        self.softmax = nn.Softmax(dim=-1)


@specimen("softmax_over_heads", 64, 4, wrap=without_mask)
class VideoSoftmaxDimOne(SelfAttention):
    def softmax(self, energy: Tensor) -> Tensor:
        return torch.softmax(energy / (self.head_dim ** (1 / 2)), dim=1)


@function("softmax_over_heads", 24, 3, bias=True)
def heads_last_in_the_scores(x: Tensor, w: dict[str, Tensor], num_heads: int) -> Tensor:
    q, k, v = project(x, w, num_heads)
    weights = torch.einsum("bhid,bhjd->bijh", q, k).div(q.shape[-1] ** 0.5).softmax(dim=-1)
    return finish(torch.einsum("bijh,bhjd->bhid", weights, v), w)


# --- softmax_overflows


@specimen("softmax_overflows", 48, 4)
class PackedNaiveSoftmax(CausalSelfAttention):
    def softmax(self, att: Tensor) -> Tensor:
        att = torch.exp(att)
        return att / att.sum(dim=-1, keepdim=True)


@specimen("softmax_overflows", 36, 3)
class EncoderNaiveSoftmax(EncoderHead):
    def weights(self, query: Tensor, key: Tensor) -> Any:
        scores = torch.bmm(query, key.transpose(1, 2)) / query.size(-1) ** 0.5
        exp = scores.exp()
        return exp / exp.sum(-1, keepdim=True)


@function("softmax_overflows", 24, 4)
def naive_softmax(x: Tensor, w: dict[str, Tensor], num_heads: int) -> Tensor:
    q, k, v = project(x, w, num_heads)
    e = torch.exp(torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(q.shape[-1]))
    out = torch.einsum("bhij,bhjd->bhid", e, v) / e.sum(-1)[..., None]
    return finish(out, w)


# --- sees_future


@specimen("sees_future", 48, 4)
class MaskForgotten(CausalSelfAttention):
    def mask(self, att: Tensor) -> Tensor:
        return att


@specimen("sees_future", 36, 3)
class MaskedFillNotKept(RaschkaAttention):
    def hide(self, attn_scores: Tensor) -> None:
        num_tokens = attn_scores.shape[-1]
        attn_scores.masked_fill(self.mask.bool()[:num_tokens, :num_tokens], -torch.inf)


@specimen("sees_future", 64, 4)
class CausalOnlyInTraining(FlashSelfAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dropout_p = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=self.training)


@specimen("sees_future", 32, 4)
class LectureDecoderWithoutTril(Head):
    def mask(self, wei: Tensor) -> Tensor:
        return wei


@specimen("sees_future", 60, 6, wrap=as_self_attention, causal=True)
class TextbookNoMaskGiven(MultiHeadAttention):
    """Causal only if its caller gives the mask, and the caller does not."""


@specimen("sees_future", 40, 4)
class LensMasksOneHead(Lens):
    def causal(self, scores: Tensor) -> Tensor:
        future = torch.ones(scores.shape[-2:]).triu(1).bool()
        scores = scores.clone()
        scores[:, 0] = scores[:, 0].masked_fill(future, -torch.inf)
        return scores


# --- ignores_past


@specimen("ignores_past", 48, 4, also=["sees_future"])
class TriuForTril(CausalSelfAttention):
    def mask(self, att: Tensor) -> Tensor:
        keep = torch.triu(torch.ones(att.shape[-2:], device=att.device))
        return att.masked_fill(keep == 0, float("-inf"))


@specimen("ignores_past", 36, 3)
class HeadsAttendToHeads(VitAttention):
    def unpack(self, x: Tensor) -> Heads:
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim)
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        attn = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
        return (self.attn_drop(attn) @ v).transpose(1, 2)


@specimen("ignores_past", 32, 4)
class OnlyTheDiagonal(Head):
    def mask(self, wei: Tensor) -> Tensor:
        t = wei.shape[-1]
        return wei.masked_fill(torch.eye(t, device=wei.device) == 0, float("-inf"))


@specimen("ignores_past", 48, 4, causal=True)
class SdpaOnUntransposedHeads(FlashSelfAttention):
    def heads(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        return x.view(b, t, self.n_head, c // self.n_head)

    def merge(self, y: Tensor) -> Tensor:
        return y.flatten(2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


# --- ignores_future


@specimen("ignores_future", 48, 4, causal=False)
class DecoderBlockAsEncoder(CausalSelfAttention):
    """Right as a decoder; used where both directions are meant."""


@specimen("ignores_future", 36, 3)
class MaskLeftInTheEncoder(EncoderHead):
    def weights(self, query: Tensor, key: Tensor) -> Tensor:
        scores = torch.bmm(query, key.transpose(1, 2)) / query.size(-1) ** 0.5
        tril = torch.tril(torch.ones(scores.shape[-2:], device=scores.device))
        return F.softmax(scores.masked_fill(tril == 0, float("-inf")), dim=-1)


@specimen("ignores_future", 64, 4)
class VitIsCausal(VitAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


# --- causal_off_by_one


@specimen("causal_off_by_one", 48, 4)
class TrilDiagonalOne(CausalSelfAttention):
    def mask(self, att: Tensor) -> Tensor:
        tril = torch.tril(torch.ones(att.shape[-2:], device=att.device), diagonal=1)
        return att.masked_fill(tril == 0, float("-inf"))


@specimen("causal_off_by_one", 36, 3)
class TriuDiagonalTwo(RaschkaAttention):
    def hidden(self, context_length: int) -> Tensor:
        return torch.triu(torch.ones(context_length, context_length), diagonal=2)


@specimen("causal_off_by_one", 64, 4)
class SelfHidden(LlamaAttention):
    def causal(self, scores: Tensor) -> Tensor:
        seqlen = scores.size(-1)
        mask = scores.new_full((seqlen, seqlen), torch.finfo(scores.dtype).min)
        return scores + torch.triu(mask)


@specimen("causal_off_by_one", 40, 4)
class LensHidesItself(Lens):
    def causal(self, scores: Tensor) -> Tensor:
        return scores.masked_fill(torch.ones(scores.shape[-2:]).triu(0).bool(), -torch.inf)


@specimen("causal_off_by_one", 32, 4)
class SdpaStrictlyBefore(FlashSelfAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t = q.size(-2)
        before = torch.ones(t, t, dtype=torch.bool, device=q.device).tril(diagonal=-1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=before)


# --- padding_leaks


@specimen("padding_leaks", 48, 4, takes_mask=True)
class MaskNeverUsed(MultiHeadAttention):
    def apply_mask(self, scores: Tensor, mask: Tensor) -> Tensor:
        return scores


@specimen("padding_leaks", 64, 4, takes_mask=True)
class MaskOnTheQueries(MultiHeadedAttention):
    def expand_mask(self, mask: Tensor) -> Tensor:
        return mask[:, None, :, None]


@specimen("padding_leaks", 36, 3, takes_mask=True)
class BertMaskTooWeak(BertSelfAttention):
    def extended_mask(self, attention_mask: Tensor, like: Tensor) -> Tensor:
        return (1.0 - attention_mask[:, None, None, :].to(like.dtype)) * -1.0


@specimen("padding_leaks", 40, 4, takes_mask=True)
class FillNotKept(EinopsAttention):
    def fill(self, sim: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            sim.masked_fill(rearrange(~mask, "b j -> b 1 1 j"), -torch.finfo(sim.dtype).max)
        return sim


@specimen("padding_leaks", 24, 3, takes_mask=True, wrap=as_masked)
class MaskOfTheFirstSample(SelfAttention):
    def fill(self, energy: Tensor, mask: Tensor) -> Tensor:
        return energy.masked_fill(mask[:1, None, None, :] == 0, torch.finfo(energy.dtype).min)


@function("padding_leaks", 32, 4, bias=True, takes_mask=True)
def values_not_scores(x: Tensor, w: dict[str, Tensor], num_heads: int, mask: Tensor) -> Tensor:
    q, k, v = project(x, w, num_heads)
    out = F.scaled_dot_product_attention(q, k, v)
    return finish(out * mask[:, None, :, None], w)


# --- mask_inverted


@specimen("mask_inverted", 48, 4, takes_mask=True, wrap=as_masked)
class FilledWhereReal(MultiHeadAttention):
    def apply_mask(self, scores: Tensor, mask: Tensor) -> Tensor:
        mask = mask[:, None, None, :]
        return scores.masked_fill(mask, torch.finfo(scores.dtype).min)


@specimen(
    "mask_inverted",
    32,
    4,
    takes_mask=True,
    options={"batch_first": True},
    wrap=lambda module: lambda x, mask: module(x, x, x, key_padding_mask=mask)[0],
)
class TorchKeyPaddingMask(nn.MultiheadAttention):
    """Torch's own, whose key_padding_mask is True where there is nothing."""


@specimen("mask_inverted", 36, 3, takes_mask=True)
class BertWithoutOneMinus(BertSelfAttention):
    def extended_mask(self, attention_mask: Tensor, like: Tensor) -> Tensor:
        return attention_mask[:, None, None, :].to(like.dtype) * torch.finfo(like.dtype).min


@specimen("mask_inverted", 64, 4)
class SdpaTriuAsAllowed(FlashSelfAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t = q.size(-2)
        mask = torch.triu(torch.ones(t, t, dtype=torch.bool, device=q.device), diagonal=1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@specimen("mask_inverted", 60, 6, takes_mask=True)
class EinopsTilde(EinopsAttention):
    def fill(self, sim: Tensor, mask: Tensor | None) -> Tensor:
        return super().fill(sim, None if mask is None else ~mask)


@function("mask_inverted", 24, 3, takes_mask=True)
def mask_of_padding_for_sdpa(
    x: Tensor, w: dict[str, Tensor], num_heads: int, mask: Tensor
) -> Tensor:
    q, k, v = project(x, w, num_heads)
    return finish(F.scaled_dot_product_attention(q, k, v, attn_mask=~mask[:, None, None]), w)


# --- mask_times_zero


@specimen("mask_times_zero", 48, 4)
class ScoresTimesTril(CausalSelfAttention):
    def mask(self, att: Tensor) -> Tensor:
        t = att.size(-1)
        return att * self.bias[:, :, :t, :t]


@specimen("mask_times_zero", 32, 4)
class LectureFillZero(Head):
    def mask(self, wei: Tensor) -> Tensor:
        t = wei.shape[-1]
        return wei.masked_fill(self.tril[:t, :t] == 0, 0)


@specimen("mask_times_zero", 64, 4, takes_mask=True)
class PlusNineInsteadOfMinus(MultiHeadAttention):
    def apply_mask(self, scores: Tensor, mask: Tensor) -> Tensor:
        return scores.masked_fill(mask[:, None, None] == 0, 1e-9)


@specimen("mask_times_zero", 36, 3, takes_mask=True)
class UvaTimesMask(MultiheadAttention):
    def mask(self, attn_logits: Tensor, mask: Tensor | None) -> Tensor:
        return attn_logits if mask is None else attn_logits * mask[:, None, None]


@function("mask_times_zero", 24, 4, takes_mask=True)
def scores_times_mask(x: Tensor, w: dict[str, Tensor], num_heads: int, mask: Tensor) -> Tensor:
    q, k, v = project(x, w, num_heads)
    scores = torch.einsum("bhid,bhjd,bj->bhij", q, k, mask.to(x)) / math.sqrt(q.shape[-1])
    return finish(scores.softmax(dim=-1) @ v, w)


# --- mask_after_softmax


@specimen("mask_after_softmax", 48, 4)
class TrilAfterSoftmax(CausalSelfAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        t = q.size(-2)
        att = F.softmax(self.scores(q, k), dim=-1)
        att = att.masked_fill(self.bias[:, :, :t, :t] == 0, 0.0)
        return self.attn_dropout(att) @ v


@specimen("mask_after_softmax", 36, 3)
class RaschkaWithoutRenormalising(RaschkaAttention):
    def hide(self, attn_scores: Tensor) -> None:
        pass

    def weights(self, attn_scores: Tensor) -> Tensor:
        num_tokens = attn_scores.shape[-1]
        mask_simple = torch.tril(torch.ones(num_tokens, num_tokens, device=attn_scores.device))
        return super().weights(attn_scores) * mask_simple


@specimen("mask_after_softmax", 64, 4, takes_mask=True)
class BertWeightsTimesMask(BertSelfAttention):
    def probabilities(self, scores: Tensor, attention_mask: Tensor | None) -> Tensor:
        probs = super().probabilities(scores, None)
        return probs if attention_mask is None else probs * attention_mask[:, None, None, :]


# --- window_off_by_one, window_ignored


@specimen("window_off_by_one", 48, 4, window=3)
class OneKeyTooMany(MistralAttention):
    def allowed(self, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (j >= i - self.sliding_window)


@specimen("window_off_by_one", 36, 3, window=3)
class OneKeyTooFew(MistralAttention):
    def allowed(self, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i - j < self.sliding_window - 1)


@specimen("window_off_by_one", 32, 4, window=3)
class BandTooWide(LocalEinopsAttention):
    def band(self, n: int) -> Tensor:
        places = torch.arange(n)
        return (rearrange(places, "i -> i 1") - places).abs() <= self.window


@specimen("window_off_by_one", 64, 4, window=4)
class TrilAndTriu(NeoxAttention):
    window = 4

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ones = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device)
        band = ones.tril().triu(-self.window)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=band)


@specimen("window_ignored", 48, 4, window=3)
class WindowNeverRead(MistralAttention):
    def allowed(self, i: Tensor, j: Tensor) -> Tensor:
        return j <= i


@specimen("window_ignored", 36, 3, window=3)
class BandOfOnes(LocalEinopsAttention):
    def band(self, n: int) -> Tensor:
        return torch.ones(n, n, dtype=torch.bool)


@specimen("window_ignored", 64, 4, window=2)
class PackedWithoutWindow(CausalSelfAttention):
    """Right, but without the window that is meant."""


# --- rotary_*


@specimen("rotary_missing", 48, 4, rotary=RotaryEmbedding(12, interleaved=True))
class LlamaForgotRotary(RotaryLlama):
    def positions(self, xq: Tensor, xk: Tensor, xv: Tensor) -> Heads:
        return xq, xk, xv


@specimen("rotary_missing", 36, 3, rotary=RotaryEmbedding(12))
class NeoxForgotRotary(RotaryNeox):
    def positions(self, q: Tensor, k: Tensor, v: Tensor) -> Heads:
        return q, k, v


@specimen("rotary_missing", 64, 4, rotary=RotaryEmbedding(16), causal=False)
class ResultOfRopeDropped(VitAttention):
    def norm(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        for t in (q, k):
            t * torch.arange(t.shape[-2])[:, None].cos() + rotate_half(t)
        return q, k


@specimen("rotary_layout", 48, 4, rotary=RotaryEmbedding(12))
class NeighboursForHalves(RotaryLlama):
    """Right for the weights of Meta, wrong for those of transformers."""


@specimen("rotary_layout", 64, 4, rotary=RotaryEmbedding(16, interleaved=True))
class HalvesForNeighbours(RotaryNeox):
    """Right for the weights of transformers, wrong for those of Meta."""


@specimen("rotary_layout", 32, 4, rotary=RotaryEmbedding(8))
class RotateEveryTwo(RotaryNeox):
    def rope(self, x: Tensor) -> Tensor:
        inv_freq = 10000.0 ** (-torch.arange(0, self.head_dim, 2).double() / self.head_dim)
        freqs = torch.outer(torch.arange(x.shape[-2]).double(), inv_freq)
        emb = torch.repeat_interleave(freqs, 2, dim=-1).to(x.dtype)
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        return x * emb.cos() + turned * emb.sin()


@specimen("rotary_on_values", 48, 4, rotary=RotaryEmbedding(12, interleaved=True))
class LlamaTurnsAll(RotaryLlama):
    def positions(self, xq: Tensor, xk: Tensor, xv: Tensor) -> Heads:
        return self.rotate(xq), self.rotate(xk), self.rotate(xv)


@specimen("rotary_on_values", 36, 3, rotary=RotaryEmbedding(12))
class NeoxTurnsAll(RotaryNeox):
    def positions(self, q: Tensor, k: Tensor, v: Tensor) -> Heads:
        return self.rope(q), self.rope(k), self.rope(v)


@function("rotary_on_values", 32, 4, rotary=RotaryEmbedding(8))
def packed_before_turning(x: Tensor, w: dict[str, Tensor], num_heads: int) -> Tensor:
    qkv = torch.stack(project(x, w, num_heads))
    angles = torch.arange(x.shape[1])[:, None] / 10000 ** (torch.arange(0, 8, 2) / 8)
    cos, sin = angles.cos().to(x), angles.sin().to(x)
    first, second = qkv.chunk(2, dim=-1)
    qkv = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return finish(F.scaled_dot_product_attention(*qkv), w)


@specimen("rotary_on_one_side", 48, 4, rotary=RotaryEmbedding(12, interleaved=True))
class OnlyQueriesTurn(RotaryLlama):
    def positions(self, xq: Tensor, xk: Tensor, xv: Tensor) -> Heads:
        return self.rotate(xq), xk, xv


@specimen(
    "rotary_on_one_side",
    60,
    6,
    options={"num_kv_heads": 2},
    num_kv_heads=2,
    rotary=RotaryEmbedding(10),
)
class OnlyKeysTurn(RotaryNeox):
    def positions(self, q: Tensor, k: Tensor, v: Tensor) -> Heads:
        return q, self.rope(k), v


@function("rotary_on_one_side", 32, 4, causal=False, rotary=RotaryEmbedding(8))
def turned_queries(x: Tensor, w: dict[str, Tensor], num_heads: int) -> Tensor:
    q, k, v = project(x, w, num_heads)
    angles = torch.arange(x.shape[1])[:, None] / 10000 ** (torch.arange(0, 8, 2) / 8)
    angles = torch.cat((angles, angles), dim=-1).to(x)
    q = q * angles.cos() + rotate_half(q) * angles.sin()
    return finish(F.scaled_dot_product_attention(q, k, v), w)


# --- softcap_missing, qk_norm_missing


@specimen("softcap_missing", 48, 4, softcap=5.0)
class PackedWithoutSoftcap(CausalSelfAttention):
    """Right, but without the cap of Gemma that is meant."""


@specimen("softcap_missing", 36, 3, softcap=2.0, causal=False)
class EinopsWithoutSoftcap(EinopsAttention):
    """The same in another style."""


@function("softcap_missing", 24, 3, bias=True, softcap=5.0)
def no_softcap(x: Tensor, w: dict[str, Tensor], num_heads: int) -> Tensor:
    return attention_function(x, w, num_heads)


RMSNorm = functools.partial(nn.RMSNorm, eps=1e-6)


@specimen("qk_norm_missing", 48, 4, options={"qk_norm": RMSNorm}, qk_norm=RMSNorm)
class NormsNeverCalled(VitAttention):
    def norm(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q, k


@specimen("qk_norm_missing", 36, 3, qk_norm=nn.LayerNorm)
class TextbookWithoutNorms(MultiHeadAttention):
    """Right, but without the norms of queries and keys that are meant."""


@specimen("qk_norm_missing", 64, 4, options={"qk_norm": nn.LayerNorm}, qk_norm=nn.LayerNorm)
class OnlyQueriesNormed(VitAttention):
    def norm(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.q_norm(q), k
