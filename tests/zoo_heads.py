"""Broken attention, first part: heads, projections, orders and shapes."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from torch import Tensor, nn

from tests.zoo_specimen import (
    as_self_attention,
    function,
    specimen,
    without_mask,
)
from tests.zoo_styles import (
    BertAttention,
    BertSelfAttention,
    CausalSelfAttention,
    DotProductAttention,
    EinopsAttention,
    EncoderHead,
    EncoderHeads,
    FlashSelfAttention,
    GPT2Attention,
    Head,
    Heads,
    LabmlAttention,
    LectureAttention,
    LlamaAttention,
    MultiHeadAttention,
    MultiheadAttention,
    MultiHeadedAttention,
    NeoxAttention,
    RaschkaAttention,
    SelfAttention,
    VitAttention,
    attention_function,
    finish,
    project,
    to_heads,
)

# --- output_shape


@specimen("output_shape", 48, 4)
class TokensOfAllSamples(MultiHeadAttention):
    def combine_heads(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(-1, self.d_model)


@specimen("output_shape", 32, 4)
class SequenceFirstOutput(LabmlAttention):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x).transpose(0, 1)


@specimen("output_shape", 36, 3)
class PooledOutput(BertAttention):
    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Any:
        return super().forward(hidden_states, attention_mask)[0].mean(dim=1)


@function("output_shape", 24, 3)
def heads_last(x: Tensor, w: dict[str, Tensor], num_heads: int) -> Tensor:
    q, k, v = project(x, w, num_heads)
    out = F.scaled_dot_product_attention(q, k, v)
    return rearrange(out, "b h n d -> b n h d")


# --- samples_mixed


@specimen("samples_mixed", 32, 4)
class BatchTakenForSequence(LabmlAttention):
    batch_first = False


@specimen("samples_mixed", 48, 4, wrap=lambda module: lambda x: module(x, x, x)[0])
class TorchWithoutBatchFirst(nn.MultiheadAttention):
    """Torch's own, called on (batch, sequence, embedding) without ``batch_first=True``."""


@specimen("samples_mixed", 36, 3, wrap=as_self_attention)
class HeadsBeforeBatch(DotProductAttention):
    def transpose_output(self, x: Tensor) -> Tensor:
        x = x.reshape(self.num_heads, -1, x.shape[1], x.shape[2]).permute(1, 2, 0, 3)
        return x.reshape(x.shape[0], x.shape[1], -1)


@specimen("samples_mixed", 64, 4)
class SoftmaxOverTheBatch(BertSelfAttention):
    def probabilities(self, scores: Tensor, attention_mask: Tensor | None) -> Tensor:
        scores = scores / math.sqrt(self.attention_head_size)
        return nn.functional.softmax(scores, dim=0)


@specimen("samples_mixed", 24, 3)
class HeadSoftmaxDimZero(EncoderHead):
    def weights(self, query: Tensor, key: Tensor) -> Tensor:
        return F.softmax(query @ key.mT / query.size(-1) ** 0.5, dim=0)


# --- tokens_scrambled


@specimen("tokens_scrambled", 48, 4)
class KeysViewedInsteadOfTransposed(CausalSelfAttention):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        b, h, t, d = k.size()
        return (q @ k.contiguous().view(b, h, d, t)) / math.sqrt(d)


@specimen("tokens_scrambled", 32, 4)
class WrongPairTransposed(MultiHeadAttention):
    def combine_heads(self, x: Tensor) -> Tensor:
        batch_size, _, seq_length, _ = x.size()
        return x.transpose(2, 3).contiguous().view(batch_size, seq_length, self.d_model)


@specimen("tokens_scrambled", 48, 3)
class ThreeBeforeTokens(VitAttention):
    def unpack(self, x: Tensor) -> Heads:
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, 3, n, self.num_heads, self.head_dim).permute(1, 0, 3, 2, 4)
        q, k, v = qkv.unbind(0)
        return q, k, v


@specimen("tokens_scrambled", 36, 3)
class FeaturesBeforeTokens(EinopsAttention):
    def gather(self, attn: Tensor, v: Tensor) -> Tensor:
        out = rearrange(attn @ v, "b h n d -> b (h d) n")
        return out.reshape(out.shape[0], out.shape[2], -1)


# --- split_without_transpose


@specimen("split_without_transpose", 48, 4)
class ViewSplit(CausalSelfAttention):
    def heads(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        return x.contiguous().view(b, self.n_head, t, c // self.n_head)


@specimen("split_without_transpose", 64, 4, options={"bias": False})
@specimen("split_without_transpose", 32, 4, options={"xavier": True}, wrap=as_self_attention)
class TextbookViewSplit(MultiHeadAttention):
    def split_heads(self, x: Tensor) -> Tensor:
        return x.view(x.size(0), self.num_heads, -1, self.d_k)


@specimen("split_without_transpose", 36, 3)
class EinopsReshapeSplit(EinopsAttention):
    def split(self, t: Tensor) -> Tensor:
        return t.reshape(t.shape[0], self.heads, t.shape[1], -1)


@specimen("split_without_transpose", 60, 6)
class BertViewSplit(BertSelfAttention):
    def transpose_for_scores(self, x: Tensor) -> Tensor:
        return x.view(x.size(0), self.num_attention_heads, x.size(1), self.attention_head_size)


@specimen("split_without_transpose", 48, 4, wrap=as_self_attention)
class HeadsJoinTheBatchByView(DotProductAttention):
    def transpose_qkv(self, x: Tensor) -> Tensor:
        b, n, e = x.shape
        return x.reshape(b * self.num_heads, n, e // self.num_heads)


# --- merge_without_transpose


@specimen("merge_without_transpose", 48, 6)
class ViewMerge(CausalSelfAttention):
    def merge(self, y: Tensor) -> Tensor:
        b, h, t, d = y.size()
        return y.contiguous().view(b, t, h * d)


@specimen("merge_without_transpose", 64, 4)
class AnnotatedViewMerge(MultiHeadedAttention):
    def unite(self, x: Tensor) -> Tensor:
        return x.contiguous().view(x.size(0), -1, self.h * self.d_k)


@specimen("merge_without_transpose", 36, 3)
class UvaReshapeMerge(MultiheadAttention):
    def join(self, values: Tensor) -> Tensor:
        return values.reshape(values.shape[0], values.shape[2], self.embed_dim)


@specimen("merge_without_transpose", 40, 4)
class EinopsFlatMerge(EinopsAttention):
    def gather(self, attn: Tensor, v: Tensor) -> Tensor:
        out = rearrange(einsum(attn, v, "b h i j, b h j d -> b h i d"), "b h i d -> b (h i d)")
        return rearrange(out, "b (n e) -> b n e", n=attn.shape[-1])


@function("merge_without_transpose", 24, 3, bias=True)
def merged_by_flatten(x: Tensor, w: dict[str, Tensor], num_heads: int) -> Tensor:
    q, k, v = project(x, w, num_heads)
    out = F.scaled_dot_product_attention(q, k, v).flatten().reshape(x.shape)
    return F.linear(out, w["out"].to(x), w["out_bias"].to(x))


# --- heads_dim_major


@specimen("heads_dim_major", 48, 4, options={"bias": False})
class DimMajorSplit(CausalSelfAttention):
    def heads(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        return x.view(b, t, c // self.n_head, self.n_head).permute(0, 3, 1, 2)


@specimen("heads_dim_major", 36, 3)
class EinopsDimMajor(EinopsAttention):
    def split(self, t: Tensor) -> Tensor:
        return rearrange(t, "b n (d h) -> b h n d", h=self.heads)

    def gather(self, attn: Tensor, v: Tensor) -> Tensor:
        out = einsum(attn, v, "b h i j, b h j d -> b h i d")
        return rearrange(out, "b h n d -> b n (d h)")


@specimen("heads_dim_major", 64, 4)
class DimMajorMerge(BertSelfAttention):
    def context(self, probs: Tensor, value_layer: Tensor) -> Tensor:
        context_layer = torch.matmul(probs, value_layer).permute(0, 2, 3, 1).contiguous()
        return context_layer.view(*context_layer.size()[:-2], -1)


@specimen("heads_dim_major", 24, 4)
class RaschkaDimMajor(RaschkaAttention):
    def view(self, x: Tensor) -> Tensor:
        b, num_tokens, _ = x.shape
        return x.view(b, num_tokens, self.head_dim, self.num_heads).movedim(-1, 1)


# --- input_sliced_per_head


@specimen("input_sliced_per_head", 32, 4)
class SlicedInput(LectureAttention):
    def __init__(self, n_embd: int, n_head: int) -> None:
        super().__init__(n_embd, n_head)
        self.head_size = n_embd // n_head
        self.heads = nn.ModuleList([Head(self.head_size, self.head_size) for _ in range(n_head)])

    def forward(self, x: Tensor) -> Any:
        d = self.head_size
        outs = [head(x[:, :, i * d : (i + 1) * d]) for i, head in enumerate(self.heads)]
        return self.dropout(self.proj(self.gather(outs)))


@specimen("input_sliced_per_head", 48, 4, wrap=without_mask)
class OneSmallLinearForAllHeads(SelfAttention):
    def __init__(self, embed_size: int, heads: int) -> None:
        super().__init__(embed_size, heads)
        self.values = nn.Linear(self.head_dim, self.head_dim, bias=False)
        self.keys = nn.Linear(self.head_dim, self.head_dim, bias=False)
        self.queries = nn.Linear(self.head_dim, self.head_dim, bias=False)

    def project(self, values: Tensor, keys: Tensor, query: Tensor) -> Heads:
        values = self.values(self.split(values))
        keys = self.keys(self.split(keys))
        return values, keys, self.queries(self.split(query))


@specimen("input_sliced_per_head", 36, 3)
class MappingsPerHead(nn.Module):
    def __init__(self, d: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.d_head = d // n_heads
        q, k, v = ([nn.Linear(self.d_head, self.d_head) for _ in range(n_heads)] for _ in range(3))
        self.q_mappings = nn.ModuleList(q)
        self.k_mappings = nn.ModuleList(k)
        self.v_mappings = nn.ModuleList(v)
        self.out = nn.Linear(d, d)
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, sequences: Tensor) -> Any:
        result = []
        for sequence in sequences:
            seq_result = []
            for head in range(self.n_heads):
                seq = sequence[:, head * self.d_head : (head + 1) * self.d_head]
                q, k = self.q_mappings[head](seq), self.k_mappings[head](seq)
                attention = self.softmax(q @ k.T / self.d_head**0.5)
                seq_result.append(attention @ self.v_mappings[head](seq))
            result.append(torch.hstack(seq_result))
        return self.out(torch.stack(result))


@function("input_sliced_per_head", 24, 3)
def sliced_before_projection(x: Tensor, w: dict[str, Tensor], num_heads: int) -> Tensor:
    outs = []
    d = x.shape[-1] // num_heads
    for i in range(num_heads):
        part = slice(i * d, (i + 1) * d)
        q, k, v = (x[..., part] @ w[name].to(x)[part, part].T for name in ("q", "k", "v"))
        outs.append(torch.softmax(q @ k.mT / d**0.5, dim=-1) @ v)
    return torch.cat(outs, dim=-1) @ w["out"].to(x).T


# --- single_head


@specimen("single_head", 48, 4)
class NoSplitPacked(CausalSelfAttention):
    def heads(self, x: Tensor) -> Tensor:
        return x.unsqueeze(1)


@specimen("single_head", 64, 4, wrap=as_self_attention)
class NoSplitTextbook(MultiHeadAttention):
    def split_heads(self, x: Tensor) -> Tensor:
        return x[:, None]


@specimen("single_head", 30, 3)
class WholeWidthEinops(EinopsAttention):
    def similarity(self, q: Tensor, k: Tensor) -> Any:
        q, k = (rearrange(t, "b h n d -> b 1 n (h d)") for t in (q, k))
        return einsum(q, k, "b h i d, b h j d -> b h i j") * self.scale

    def gather(self, attn: Tensor, v: Tensor) -> Tensor:
        return rearrange(attn @ v, "b h n d -> b n (h d)")


@function("single_head", 24, 4)
def combined_matrices(x: Tensor, w: dict[str, Tensor], num_heads: int) -> Tensor:
    q, k, v = (x @ w[name].to(x).T for name in ("q", "k", "v"))
    a = torch.softmax(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5, dim=-1)
    return (a @ v) @ w["out"].to(x).T


@specimen("single_head", 96, 6)
class SdpaOnThreeDimensions(FlashSelfAttention):
    def forward(self, x: Tensor) -> Any:
        q, k, v = self.qkv(x)
        return self.resid_dropout(self.c_proj(self.attend(q, k, v)))


# --- kv_heads_tiled


@specimen("kv_heads_tiled", 48, 6, options={"n_kv_heads": 2}, num_kv_heads=2)
class LlamaTiled(LlamaAttention):
    def repeat_kv(self, x: Tensor) -> Tensor:
        return x.repeat(1, 1, self.n_rep, 1)


@specimen("kv_heads_tiled", 64, 4, options={"num_kv_heads": 2, "bias": True}, num_kv_heads=2)
class NeoxTiled(NeoxAttention):
    def repeat_kv(self, x: Tensor) -> Tensor:
        return torch.cat([x] * self.groups, dim=1)


@specimen("kv_heads_tiled", 36, 6, options={"n_kv_heads": 3}, num_kv_heads=3)
class LlamaExpandedInFront(LlamaAttention):
    def repeat_kv(self, x: Tensor) -> Tensor:
        bs, slen, n_kv_heads, head_dim = x.shape
        x = x[:, :, None].expand(bs, slen, self.n_rep, n_kv_heads, head_dim)
        return x.reshape(bs, slen, self.n_rep * n_kv_heads, head_dim)


@function("kv_heads_tiled", 32, 4, num_kv_heads=2)
def groups_first(x: Tensor, w: dict[str, Tensor], num_heads: int) -> Tensor:
    q, k, v = (x @ w[name].to(x).T for name in ("q", "k", "v"))
    d = q.shape[-1] // num_heads
    k, v = (repeat(t, "b n (k d) -> b (g k) n d", d=d, g=num_heads // 2) for t in (k, v))
    out = F.scaled_dot_product_attention(to_heads(q, num_heads), k, v)
    return finish(out, w)


# --- qkv_order_swapped


@specimen("qkv_order_swapped", 48, 4)
class KeyFirst(CausalSelfAttention):
    def qkv(self, x: Tensor) -> Heads:
        k, q, v = self.c_attn(x).split(self.n_embd, dim=2)
        return q, k, v


@specimen("qkv_order_swapped", 48, 3)
class ValueBeforeKey(GPT2Attention):
    def qkv(self, x: Tensor) -> Heads:
        query, value, key = self.c_attn(x).split(self.n_embd, dim=2)
        return query, key, value


@specimen("qkv_order_swapped", 36, 3)
class VitUnbindOrder(VitAttention):
    def unpack(self, x: Tensor) -> Heads:
        v, k, q = super().unpack(x)
        return q, k, v


@specimen("qkv_order_swapped", 64, 4, wrap=as_self_attention)
class ArgumentsInWrongOrder(MultiHeadAttention):
    def scaled_dot_product_attention(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        return super().scaled_dot_product_attention(k, q, v, mask)


@specimen("qkv_order_swapped", 60, 6)
class SdpaKeyValueSwapped(NeoxAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, v, k, is_causal=True)


@specimen("qkv_order_swapped", 32, 4)
class LectureRolesSwapped(Head):
    def project(self, x: Tensor) -> Heads:
        k = self.query(x)
        q = self.key(x)
        return q, k, self.value(x)


# --- output_projection_missing


@specimen("output_projection_missing", 48, 4)
class ProjectionNeverCalled(CausalSelfAttention):
    def forward(self, x: Tensor) -> Any:
        q, k, v = (self.heads(part) for part in self.qkv(x))
        return self.resid_dropout(self.merge(self.attend(q, k, v)))


@specimen("output_projection_missing", 36, 3)
class TextbookReturnsTooEarly(MultiHeadAttention):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Any:
        q, k, v = (self.split_heads(x) for x in self.project(query, key, value))
        return self.combine_heads(self.scaled_dot_product_attention(q, k, v, mask))


@specimen("output_projection_missing", 32, 4)
class LectureListOnly(LectureAttention):
    def forward(self, x: Tensor) -> Any:
        return self.dropout(self.gather([h(x) for h in self.heads]))


@function("output_projection_missing", 24, 3)
def only_merged(x: Tensor, w: dict[str, Tensor], num_heads: int) -> Tensor:
    q, k, v = project(x, w, num_heads)
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")


# --- num_heads_wrong


@specimen("num_heads_wrong", 48, 4)
class TwiceTheHeads(RaschkaAttention):
    def __init__(self, d_in: int, num_heads: int) -> None:
        super().__init__(d_in, 2 * num_heads)


@specimen("num_heads_wrong", 48, 6)
class HeadsOfHalfTheNumber(VitAttention):
    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = False) -> None:
        super().__init__(dim, num_heads // 2, qkv_bias)


@specimen("num_heads_wrong", 48, 4)
class HeadDimTakenForHeads(EinopsAttention):
    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__(dim, dim // heads, dropout)


@specimen("num_heads_wrong", 60, 4, options={"bias": False})
class ViewArgumentsSwapped(CausalSelfAttention):
    def heads(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        return x.view(b, t, c // self.n_head, self.n_head).transpose(1, 2)


# --- projection_reused


@specimen("projection_reused", 64, 4, wrap=as_self_attention)
class KeyFromTheQueryLayer(MultiHeadAttention):
    def project(self, query: Tensor, key: Tensor, value: Tensor) -> Heads:
        return self.W_q(query), self.W_q(key), self.W_v(value)


@specimen("projection_reused", 36, 3)
class BertValueFromKey(BertSelfAttention):
    def __init__(self, hidden_size: int, num_attention_heads: int) -> None:
        super().__init__(hidden_size, num_attention_heads)
        self.value = self.key


@specimen("projection_reused", 32, 4)
class LectureValueFromKey(Head):
    def project(self, x: Tensor) -> Heads:
        k = self.key(x)
        q = self.query(x)
        return q, k, self.key(x)


@function("projection_reused", 24, 3)
def loop_variable_overwritten(x: Tensor, w: dict[str, Tensor], num_heads: int) -> Tensor:
    q, k, v = project(x, w, num_heads, names="qkk")
    return finish(F.scaled_dot_product_attention(q, k, v), w)


# --- projection_skipped


@specimen("projection_skipped", 48, 4, wrap=as_self_attention)
class ValueIsTheInput(MultiHeadAttention):
    def project(self, query: Tensor, key: Tensor, value: Tensor) -> Heads:
        return self.W_q(query), self.W_k(key), value


@specimen("projection_skipped", 36, 3)
class QueryIsTheInput(EinopsAttention):
    def project(self, x: Tensor) -> Heads:
        return x, *self.to_kv(x).chunk(2, dim=-1)


@specimen("projection_skipped", 24, 4)
class PackedValueIsTheInput(CausalSelfAttention):
    def qkv(self, x: Tensor) -> Heads:
        q, k, _ = self.c_attn(x).split(self.n_embd, dim=2)
        return q, k, x


@function("projection_skipped", 24, 3)
def keys_not_projected(x: Tensor, w: dict[str, Tensor], num_heads: int) -> Tensor:
    q, k, v = (to_heads(t, num_heads) for t in (x @ w["q"].to(x).T, x, x @ w["v"].to(x).T))
    return finish(F.scaled_dot_product_attention(q, k, v), w)


# --- heads_added


@specimen("heads_added", 32, 4)
class HeadsSummed(LectureAttention):
    def __init__(self, n_embd: int, n_head: int) -> None:
        super().__init__(n_embd, n_head)
        self.proj = nn.Linear(n_embd // n_head, n_embd)

    def gather(self, outputs: list[Tensor]) -> Tensor:
        return torch.stack(outputs).sum(dim=0)


@specimen("heads_added", 48, 4, wrap=without_mask)
class LetterForgottenInEinsum(SelfAttention):
    def __init__(self, embed_size: int, heads: int) -> None:
        super().__init__(embed_size, heads)
        self.fc_out = nn.Linear(self.head_dim, embed_size)

    def gather(self, attention: Tensor, values: Tensor) -> Tensor:
        return torch.einsum("nhql,nlhd->nqd", [attention, values])


@specimen("heads_added", 36, 3)
class HeadsAveragedWide(EncoderHeads):
    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__(embed_dim, num_heads)
        for head in self.heads:
            head.v = nn.Linear(embed_dim, embed_dim)

    def forward(self, hidden_state: Tensor) -> Any:
        x = torch.stack([h(hidden_state) for h in self.heads]).mean(dim=0)
        return self.output_linear(x)


# --- weight_transposed


@specimen("weight_transposed", 48, 4, options={"bias": False}, wrap=as_self_attention)
class MatmulWithLinearWeight(MultiHeadAttention):
    def project(self, query: Tensor, key: Tensor, value: Tensor) -> Heads:
        return query @ self.W_q.weight, key @ self.W_k.weight, value @ self.W_v.weight


@function("weight_transposed", 24, 3)
def numpy_habit(x: Tensor, w: dict[str, Tensor], num_heads: int) -> Tensor:
    q, k, v = (to_heads(x @ w[name].to(x), num_heads) for name in ("q", "k", "v"))
    out = F.scaled_dot_product_attention(q, k, v)
    return rearrange(out, "b h n d -> b n (h d)") @ w["out"].to(x)


@function("weight_transposed", 32, 4, bias=True)
def only_the_output(x: Tensor, w: dict[str, Tensor], num_heads: int) -> Tensor:
    identity = {**w, "out": torch.eye(x.shape[-1]), "out_bias": torch.zeros(x.shape[-1])}
    out = attention_function(x, identity, num_heads)
    return torch.einsum("bne,ef->bnf", out, w["out"].to(x)) + w["out_bias"].to(x)


# --- raises


@specimen("raises", 48, 4)
class ViewOfATransposed(CausalSelfAttention):
    def merge(self, y: Tensor) -> Tensor:
        b, h, t, d = y.size()
        return y.transpose(1, 2).view(b, t, h * d)


@specimen("raises", 32, 4, wrap=as_self_attention)
class KeysNotTransposed(MultiHeadAttention):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.matmul(q, k) / math.sqrt(self.d_k)


@specimen("raises", 36, 3, options={"context_length": 2})
class ContextTooShort(RaschkaAttention):
    def weights(self, attn_scores: Tensor) -> Tensor:
        assert attn_scores.shape[-1] <= self.mask.shape[-1], "Cannot forward, context too long"
        return super().weights(attn_scores)


@specimen("raises", 24, 3)
class BatchSizeHardCoded(BertSelfAttention):
    def transpose_for_scores(self, x: Tensor) -> Tensor:
        return x.view(50, -1, self.num_attention_heads, self.attention_head_size).transpose(1, 2)


@specimen("raises", 48, 4)
class MaskForgottenInTheCall(SelfAttention):
    """Called without the mask that its ``forward`` wants."""

    def forward(self, values: Tensor, keys: Tensor, query: Tensor, mask: Tensor | None) -> Any:
        assert mask is not None
        return super().forward(values, keys, query, mask)


# --- output_type


@specimen("output_type", 48, 4)
class NumpyOutput(CausalSelfAttention):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x).detach().numpy()


@specimen("output_type", 36, 3)
class DictOutput(BertAttention):
    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Any:
        output, probabilities = super().forward(hidden_states, attention_mask)
        return {"last_hidden_state": output, "attentions": probabilities}


@specimen("output_type", 32, 4)
class HeadsAsList(LectureAttention):
    def gather(self, outputs: list[Tensor]) -> Tensor:
        return torch.cat(outputs, dim=-1)

    def forward(self, x: Tensor) -> Any:
        return [h(x) for h in self.heads]


@specimen("output_type", 64, 4)
class HalfOutput(FlashSelfAttention):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x).half()


@function("output_type", 24, 3)
def complex_output(x: Tensor, w: dict[str, Tensor], num_heads: int) -> Tensor:
    return attention_function(x, w, num_heads).to(torch.complex64)


# --- output_changes_between_calls


@specimen("output_changes_between_calls", 48, 4)
class CacheNeverEmptied(NeoxAttention):
    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__(hidden_size, num_heads)
        self.past: list[tuple[Tensor, Tensor]] = []

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        self.past.append((k, v))
        k, v = (torch.cat(parts, dim=2) for parts in zip(*self.past, strict=True))
        mask = torch.ones(q.shape[2], k.shape[2]).tril(k.shape[2] - q.shape[2]).bool()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@specimen("output_changes_between_calls", 32, 4)
class LayerMadeInForward(EncoderHeads):
    def forward(self, hidden_state: Tensor) -> Any:
        x = torch.cat([h(hidden_state) for h in self.heads], dim=-1)
        return nn.Linear(x.shape[-1], x.shape[-1]).to(x)(x)


@specimen("output_changes_between_calls", 36, 3)
class RunningMeanOfKeys(EinopsAttention):
    center: Tensor

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads)
        self.register_buffer("center", torch.zeros(1))

    def similarity(self, q: Tensor, k: Tensor) -> Any:
        self.center = 0.9 * self.center + 0.1 * k.detach().std()
        return super().similarity(q, k) / self.center
