"""Right attention as other people write it, in a dozen styles; ``zoo.py`` breaks each of them.

Each class is cut at the places where mistakes happen, so that a broken one is a subclass with the wrong lines.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

Heads = tuple[Tensor, Tensor, Tensor]


class CausalSelfAttention(nn.Module):
    """The packed one of nanoGPT: causal, with a buffer that holds the mask."""

    bias: Tensor

    def __init__(
        self,
        n_embd: int,
        n_head: int,
        block_size: int = 128,
        dropout: float = 0.1,
        bias: bool = True,
        std: float | None = None,
    ) -> None:
        super().__init__()
        assert n_embd % n_head == 0
        self.c_attn = self.linear(n_embd, 3 * n_embd, bias)
        self.c_proj = self.linear(n_embd, n_embd, bias)
        self.attn_dropout = nn.Dropout(dropout)
        self.resid_dropout = nn.Dropout(dropout)
        tril = torch.tril(torch.ones(block_size, block_size))
        self.register_buffer("bias", tril.view(1, 1, block_size, block_size))
        self.n_head = n_head
        self.n_embd = n_embd
        self.dropout = dropout
        if std is not None:
            for name, parameter in self.named_parameters():
                if name.endswith("weight"):
                    nn.init.normal_(parameter, mean=0.0, std=std)

    def linear(self, n_in: int, n_out: int, bias: bool) -> nn.Module:
        return nn.Linear(n_in, n_out, bias=bias)

    def qkv(self, x: Tensor) -> Heads:
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        return q, k, v

    def heads(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        return x.view(b, t, self.n_head, c // self.n_head).transpose(1, 2)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))

    def mask(self, att: Tensor) -> Tensor:
        t = att.size(-1)
        return att.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf"))

    def softmax(self, att: Tensor) -> Tensor:
        return F.softmax(att, dim=-1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        att = self.softmax(self.mask(self.scores(q, k)))
        att = self.attn_dropout(att)
        return att @ v

    def merge(self, y: Tensor) -> Tensor:
        b, h, t, d = y.size()
        return y.transpose(1, 2).contiguous().view(b, t, h * d)

    def forward(self, x: Tensor) -> Any:
        q, k, v = (self.heads(part) for part in self.qkv(x))
        y = self.merge(self.attend(q, k, v))
        return self.resid_dropout(self.c_proj(y))


class Conv1D(nn.Module):
    """A Linear with the transposed weight, as GPT-2 has it."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.empty(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        size_out = (*x.size()[:-1], self.nf)
        x = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return x.view(size_out)


class GPT2Attention(CausalSelfAttention):
    """The same with Conv1D, as transformers has it."""

    def linear(self, n_in: int, n_out: int, bias: bool) -> nn.Module:
        return Conv1D(n_out, n_in)


class FlashSelfAttention(CausalSelfAttention):
    """The same through ``scaled_dot_product_attention``."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dropout_p = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)


class MultiHeadAttention(nn.Module):
    """The one of most tutorials: W_q, W_k, W_v, W_o and a method for each step."""

    def __init__(
        self, d_model: int, num_heads: int, bias: bool = True, xavier: bool = False
    ) -> None:
        super().__init__()
        self.d_model = d_model
        self.num_heads = num_heads
        self.d_k = d_model // num_heads
        self.W_q = nn.Linear(d_model, d_model, bias=bias)
        self.W_k = nn.Linear(d_model, d_model, bias=bias)
        self.W_v = nn.Linear(d_model, d_model, bias=bias)
        self.W_o = nn.Linear(d_model, d_model, bias=bias)
        self.dropout = nn.Dropout(0.1)
        if xavier:
            for parameter in self.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(self.d_k)

    def apply_mask(self, scores: Tensor, mask: Tensor) -> Tensor:
        mask = mask.unsqueeze(1).unsqueeze(2)
        return scores.masked_fill(mask == 0, torch.finfo(scores.dtype).min)

    def scaled_dot_product_attention(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        attn_scores = self.scores(q, k)
        if mask is not None:
            attn_scores = self.apply_mask(attn_scores, mask)
        attn_probs = self.dropout(torch.softmax(attn_scores, dim=-1))
        return torch.matmul(attn_probs, v)

    def split_heads(self, x: Tensor) -> Tensor:
        batch_size, seq_length, _ = x.size()
        return x.view(batch_size, seq_length, self.num_heads, self.d_k).transpose(1, 2)

    def combine_heads(self, x: Tensor) -> Tensor:
        batch_size, _, seq_length, _ = x.size()
        return x.transpose(1, 2).contiguous().view(batch_size, seq_length, self.d_model)

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> Heads:
        return self.W_q(query), self.W_k(key), self.W_v(value)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Any:
        q, k, v = (self.split_heads(x) for x in self.project(query, key, value))
        attn_output = self.scaled_dot_product_attention(q, k, v, mask)
        return self.W_o(self.combine_heads(attn_output))


def clones(module: nn.Module, n: int) -> nn.ModuleList:
    return nn.ModuleList([copy.deepcopy(module) for _ in range(n)])


class MultiHeadedAttention(nn.Module):
    """The one of the Annotated Transformer: a list of four linears."""

    def __init__(self, d_model: int, h: int, dropout: float = 0.1) -> None:
        super().__init__()
        assert d_model % h == 0
        self.d_k = d_model // h
        self.h = h
        self.linears = clones(nn.Linear(d_model, d_model), 4)
        self.attn: Tensor | None = None
        self.dropout = nn.Dropout(p=dropout)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Heads:
        d_k = query.size(-1)
        scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(d_k)
        if mask is not None:
            scores = scores.masked_fill(mask == 0, torch.finfo(scores.dtype).min)
        p_attn = self.dropout(scores.softmax(dim=-1))
        return torch.matmul(p_attn, value), p_attn, scores

    def expand_mask(self, mask: Tensor) -> Tensor:
        return mask.unsqueeze(1).unsqueeze(1)

    def unite(self, x: Tensor) -> Tensor:
        nbatches = x.size(0)
        return x.transpose(1, 2).contiguous().view(nbatches, -1, self.h * self.d_k)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Any:
        if mask is not None:
            mask = self.expand_mask(mask)
        nbatches = query.size(0)
        query, key, value = (
            lin(x).view(nbatches, -1, self.h, self.d_k).transpose(1, 2)
            for lin, x in zip(self.linears, (query, key, value), strict=False)
        )
        x, self.attn, _ = self.attention(query, key, value, mask)
        return self.linears[-1](self.unite(x))


class SelfAttention(nn.Module):
    """The one of a well-known video: values, keys, queries and einsum."""

    def __init__(self, embed_size: int, heads: int) -> None:
        super().__init__()
        self.embed_size = embed_size
        self.heads = heads
        self.head_dim = embed_size // heads
        self.values = nn.Linear(embed_size, embed_size)
        self.keys = nn.Linear(embed_size, embed_size)
        self.queries = nn.Linear(embed_size, embed_size)
        self.fc_out = nn.Linear(embed_size, embed_size)

    def split(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[1], self.heads, self.head_dim)

    def softmax(self, energy: Tensor) -> Tensor:
        return torch.softmax(energy / (self.head_dim ** (1 / 2)), dim=3)

    def fill(self, energy: Tensor, mask: Tensor) -> Tensor:
        mask = mask[:, None, None, :]
        return energy.masked_fill(mask == 0, torch.finfo(energy.dtype).min)

    def project(self, values: Tensor, keys: Tensor, query: Tensor) -> Heads:
        values = self.split(self.values(values))
        keys = self.split(self.keys(keys))
        return values, keys, self.split(self.queries(query))

    def gather(self, attention: Tensor, values: Tensor) -> Tensor:
        n, _, query_len, _ = attention.shape
        return torch.einsum("nhql,nlhd->nqhd", [attention, values]).reshape(
            n, query_len, self.heads * self.head_dim
        )

    def forward(self, values: Tensor, keys: Tensor, query: Tensor, mask: Tensor | None) -> Any:
        values, keys, queries = self.project(values, keys, query)
        energy = torch.einsum("nqhd,nkhd->nhqk", [queries, keys])
        if mask is not None:
            energy = self.fill(energy, mask)
        return self.fc_out(self.gather(self.softmax(energy), values))


class BertSelfAttention(nn.Module):
    """The inner half of BERT's attention in transformers."""

    def __init__(self, hidden_size: int, num_attention_heads: int) -> None:
        super().__init__()
        self.num_attention_heads = num_attention_heads
        self.attention_head_size = hidden_size // num_attention_heads
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)
        self.dropout = nn.Dropout(0.1)

    def transpose_for_scores(self, x: Tensor) -> Tensor:
        new_x_shape = (*x.size()[:-1], self.num_attention_heads, self.attention_head_size)
        return x.view(new_x_shape).permute(0, 2, 1, 3)

    def extended_mask(self, attention_mask: Tensor, like: Tensor) -> Tensor:
        extended = attention_mask[:, None, None, :].to(like.dtype)
        return (1.0 - extended) * torch.finfo(like.dtype).min

    def probabilities(self, scores: Tensor, attention_mask: Tensor | None) -> Tensor:
        scores = scores / math.sqrt(self.attention_head_size)
        if attention_mask is not None:
            scores = scores + self.extended_mask(attention_mask, scores)
        return nn.functional.softmax(scores, dim=-1)

    def context(self, probs: Tensor, value_layer: Tensor) -> Tensor:
        context_layer = torch.matmul(probs, value_layer).permute(0, 2, 1, 3).contiguous()
        return context_layer.view(*context_layer.size()[:-2], -1)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Any:
        query_layer = self.transpose_for_scores(self.query(hidden_states))
        key_layer = self.transpose_for_scores(self.key(hidden_states))
        value_layer = self.transpose_for_scores(self.value(hidden_states))
        scores = torch.matmul(query_layer, key_layer.transpose(-1, -2))
        probs = self.dropout(self.probabilities(scores, attention_mask))
        return self.context(probs, value_layer), probs


class BertSelfOutput(nn.Module):
    """The output half, without the norm and the sum."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.dropout = nn.Dropout(0.1)

    def forward(self, hidden_states: Tensor) -> Any:
        return self.dropout(self.dense(hidden_states))


class BertAttention(nn.Module):
    """Both halves of BERT's attention."""

    inner: type[BertSelfAttention] = BertSelfAttention

    def __init__(self, hidden_size: int, num_attention_heads: int) -> None:
        super().__init__()
        self.self = self.inner(hidden_size, num_attention_heads)
        self.output = BertSelfOutput(hidden_size)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Any:
        self_outputs = self.self(hidden_states, attention_mask)
        return self.output(self_outputs[0]), self_outputs[1]


class RaschkaAttention(nn.Module):
    """The one of "Build a large language model from scratch": causal, with a buffer of what to hide."""

    mask: Tensor

    def __init__(
        self, d_in: int, num_heads: int, context_length: int = 128, qkv_bias: bool = False
    ) -> None:
        super().__init__()
        self.d_out = d_in
        self.num_heads = num_heads
        self.head_dim = d_in // num_heads
        self.W_query = nn.Linear(d_in, d_in, bias=qkv_bias)
        self.W_key = nn.Linear(d_in, d_in, bias=qkv_bias)
        self.W_value = nn.Linear(d_in, d_in, bias=qkv_bias)
        self.out_proj = nn.Linear(d_in, d_in)
        self.dropout = nn.Dropout(0.1)
        self.register_buffer("mask", self.hidden(context_length))

    def hidden(self, context_length: int) -> Tensor:
        return torch.triu(torch.ones(context_length, context_length), diagonal=1)

    def hide(self, attn_scores: Tensor) -> None:
        num_tokens = attn_scores.shape[-1]
        attn_scores.masked_fill_(self.mask.bool()[:num_tokens, :num_tokens], -torch.inf)

    def weights(self, attn_scores: Tensor) -> Tensor:
        return torch.softmax(attn_scores / self.head_dim**0.5, dim=-1)

    def view(self, x: Tensor) -> Tensor:
        b, num_tokens, _ = x.shape
        return x.view(b, num_tokens, self.num_heads, self.head_dim).transpose(1, 2)

    def combine(self, context_vec: Tensor) -> Tensor:
        b, _, num_tokens, _ = context_vec.shape
        return context_vec.transpose(1, 2).contiguous().view(b, num_tokens, self.d_out)

    def forward(self, x: Tensor) -> Any:
        keys = self.view(self.W_key(x))
        queries = self.view(self.W_query(x))
        values = self.view(self.W_value(x))
        attn_scores = queries @ keys.transpose(2, 3)
        self.hide(attn_scores)
        attn_weights = self.dropout(self.weights(attn_scores))
        return self.out_proj(self.combine(attn_weights @ values))


class VitAttention(nn.Module):
    """The one of timm: qkv, permute, q_norm and k_norm, proj."""

    def __init__(
        self, dim: int, num_heads: int, qkv_bias: bool = True, qk_norm: Any = nn.Identity
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.q_norm = qk_norm(self.head_dim)
        self.k_norm = qk_norm(self.head_dim)
        self.attn_drop = nn.Dropout(0.1)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.1)
        for linear in (self.qkv, self.proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)

    def unpack(self, x: Tensor) -> Heads:
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        return q, k, v

    def norm(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.q_norm(q), self.k_norm(k)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        attn = (q * self.scale) @ k.transpose(-2, -1)
        attn = self.attn_drop(attn.softmax(dim=-1))
        return attn @ v

    def forward(self, x: Tensor) -> Any:
        b, n, c = x.shape
        q, k, v = self.unpack(x)
        q, k = self.norm(q, k)
        x = self.attend(q, k, v).transpose(1, 2).reshape(b, n, c)
        return self.proj_drop(self.proj(x))


class EinopsAttention(nn.Module):
    """The one of lucidrains: to_qkv, einops, to_out; query and key/value packed as ``to_q`` and ``to_kv``."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(dim, dim * 2, bias=False)
        self.attend = nn.Softmax(dim=-1)
        self.dropout = nn.Dropout(dropout)
        self.to_out = nn.Sequential(nn.Linear(dim, dim), nn.Dropout(dropout))

    def split(self, t: Tensor) -> Tensor:
        return rearrange(t, "b n (h d) -> b h n d", h=self.heads)

    def similarity(self, q: Tensor, k: Tensor) -> Any:
        return einsum(q, k, "b h i d, b h j d -> b h i j") * self.scale

    def fill(self, sim: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return sim
        mask = rearrange(mask, "b j -> b 1 1 j")
        return sim.masked_fill(~mask, -torch.finfo(sim.dtype).max)

    def gather(self, attn: Tensor, v: Tensor) -> Tensor:
        out = einsum(attn, v, "b h i j, b h j d -> b h i d")
        return rearrange(out, "b h n d -> b n (h d)")

    def project(self, x: Tensor) -> Heads:
        k, v = self.to_kv(x).chunk(2, dim=-1)
        return self.to_q(x), k, v

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        q, k, v = (self.split(t) for t in self.project(x))
        sim = self.fill(self.similarity(q, k), mask)
        attn = self.dropout(self.attend(sim))
        return self.to_out(self.gather(attn, v))


class LocalEinopsAttention(EinopsAttention):
    """The same in a window that looks both ways."""

    window = 3

    def band(self, n: int) -> Tensor:
        places = torch.arange(n)
        return (rearrange(places, "i -> i 1") - places).abs() < self.window

    def similarity(self, q: Tensor, k: Tensor) -> Any:
        sim = super().similarity(q, k)
        return sim.masked_fill(~self.band(q.shape[-2]).to(q.device), -torch.inf)


class MultiheadAttention(nn.Module):
    """The one of the UvA tutorial: qkv_proj whose rows are ordered heads first."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.qkv_proj = nn.Linear(embed_dim, 3 * embed_dim)
        self.o_proj = nn.Linear(embed_dim, embed_dim)
        for linear in (self.qkv_proj, self.o_proj):
            nn.init.xavier_uniform_(linear.weight)
            linear.bias.data.fill_(0)

    def separate(self, qkv: Tensor) -> Heads:
        batch_size, seq_length, _ = qkv.size()
        qkv = qkv.reshape(batch_size, seq_length, self.num_heads, 3 * self.head_dim)
        q, k, v = qkv.permute(0, 2, 1, 3).chunk(3, dim=-1)
        return q, k, v

    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.size()[-1])

    def mask(self, attn_logits: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return attn_logits
        return attn_logits.masked_fill(mask[:, None, None] == 0, -9e15)

    def softmax(self, attn_logits: Tensor) -> Tensor:
        return F.softmax(attn_logits, dim=-1)

    def join(self, values: Tensor) -> Tensor:
        batch_size, _, seq_length, _ = values.size()
        return values.permute(0, 2, 1, 3).reshape(batch_size, seq_length, self.embed_dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        q, k, v = self.separate(self.qkv_proj(x))
        attention = self.softmax(self.mask(self.logits(q, k), mask))
        return self.o_proj(self.join(torch.matmul(attention, v)))


class LlamaAttention(nn.Module):
    """The one of Llama: wq, wk, wv, wo, grouped heads."""

    def __init__(self, dim: int, n_heads: int, n_kv_heads: int | None = None) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.n_kv_heads = n_kv_heads or n_heads
        self.n_rep = n_heads // self.n_kv_heads
        self.head_dim = dim // n_heads
        self.wq = nn.Linear(dim, n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(dim, self.n_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(dim, self.n_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(n_heads * self.head_dim, dim, bias=False)

    def freqs_cis(self, seqlen: int) -> Tensor:
        freqs = 1.0 / (10000.0 ** (torch.arange(0, self.head_dim, 2).double() / self.head_dim))
        freqs = torch.outer(torch.arange(seqlen).double(), freqs)
        return torch.polar(torch.ones_like(freqs), freqs)

    def rotate(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.double().reshape(*x.shape[:-1], -1, 2))
        freqs = self.freqs_cis(x.shape[1])[None, :, None, :]
        return torch.view_as_real(pairs * freqs).flatten(3).type_as(x)

    def positions(self, xq: Tensor, xk: Tensor, xv: Tensor) -> Heads:
        return xq, xk, xv

    def repeat_kv(self, x: Tensor) -> Tensor:
        bs, slen, n_kv_heads, head_dim = x.shape
        x = x[:, :, :, None, :].expand(bs, slen, n_kv_heads, self.n_rep, head_dim)
        return x.reshape(bs, slen, n_kv_heads * self.n_rep, head_dim)

    def scores(self, xq: Tensor, keys: Tensor) -> Tensor:
        return torch.matmul(xq, keys.transpose(2, 3)) / math.sqrt(self.head_dim)

    def causal(self, scores: Tensor) -> Tensor:
        seqlen = scores.size(-1)
        mask = torch.full((seqlen, seqlen), float("-inf"), device=scores.device)
        return scores + torch.triu(mask, diagonal=1).type_as(scores)

    def forward(self, x: Tensor) -> Any:
        bsz, seqlen, _ = x.shape
        xq = self.wq(x).view(bsz, seqlen, self.n_heads, self.head_dim)
        xk = self.wk(x).view(bsz, seqlen, self.n_kv_heads, self.head_dim)
        xv = self.wv(x).view(bsz, seqlen, self.n_kv_heads, self.head_dim)
        xq, xk, xv = self.positions(xq, xk, xv)
        keys = self.repeat_kv(xk).transpose(1, 2)
        values = self.repeat_kv(xv).transpose(1, 2)
        scores = self.causal(self.scores(xq.transpose(1, 2), keys))
        scores = F.softmax(scores.float(), dim=-1).type_as(xq)
        output = torch.matmul(scores, values)
        output = output.transpose(1, 2).contiguous().view(bsz, seqlen, -1)
        return self.wo(output)


class RotaryLlama(LlamaAttention):
    """The same with its rotary positions: neighbours as complex numbers."""

    def positions(self, xq: Tensor, xk: Tensor, xv: Tensor) -> Heads:
        return self.rotate(xq), self.rotate(xk), xv


class MistralAttention(LlamaAttention):
    """The same with a sliding window."""

    sliding_window = 3

    def allowed(self, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (j > i - self.sliding_window)

    def causal(self, scores: Tensor) -> Tensor:
        places = torch.arange(scores.size(-1), device=scores.device)
        allowed = self.allowed(places[:, None], places[None, :])
        return scores.masked_fill(~allowed, float("-inf"))


def rotate_half(x: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((-x2, x1), dim=-1)


class NeoxAttention(nn.Module):
    """The one of transformers' Llama: q_proj ... o_proj, grouped heads, SDPA."""

    def __init__(
        self, hidden_size: int, num_heads: int, num_kv_heads: int | None = None, bias: bool = False
    ) -> None:
        super().__init__()
        num_kv_heads = num_kv_heads or num_heads
        self.head_dim = hidden_size // num_heads
        self.groups = num_heads // num_kv_heads
        self.q_proj = nn.Linear(hidden_size, num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * self.head_dim, hidden_size, bias=bias)

    def rope(self, x: Tensor) -> Tensor:
        inv_freq = 10000.0 ** (-torch.arange(0, self.head_dim, 2).double() / self.head_dim)
        freqs = torch.outer(torch.arange(x.shape[-2]).double(), inv_freq)
        emb = torch.cat((freqs, freqs), dim=-1).to(x.dtype)
        return x * emb.cos() + rotate_half(x) * emb.sin()

    def positions(self, q: Tensor, k: Tensor, v: Tensor) -> Heads:
        return q, k, v

    def repeat_kv(self, x: Tensor) -> Tensor:
        return torch.repeat_interleave(x, self.groups, dim=1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def forward(self, hidden_states: Tensor) -> Any:
        hidden_shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (
            proj(hidden_states).view(hidden_shape).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k, v = self.positions(q, k, v)
        attn_output = self.attend(q, self.repeat_kv(k), self.repeat_kv(v))
        attn_output = attn_output.transpose(1, 2).reshape(*hidden_states.shape[:-1], -1)
        return self.o_proj(attn_output), None


class RotaryNeox(NeoxAttention):
    """The same with its rotary positions: the halves of a head are pairs."""

    def positions(self, q: Tensor, k: Tensor, v: Tensor) -> Heads:
        return self.rope(q), self.rope(k), v


class Head(nn.Module):
    """One head of the lecture "Let's build GPT"."""

    tril: Tensor

    def __init__(self, n_embd: int, head_size: int, block_size: int = 128) -> None:
        super().__init__()
        self.key = nn.Linear(n_embd, head_size, bias=False)
        self.query = nn.Linear(n_embd, head_size, bias=False)
        self.value = nn.Linear(n_embd, head_size, bias=False)
        self.register_buffer("tril", torch.tril(torch.ones(block_size, block_size)))
        self.dropout = nn.Dropout(0.2)

    def affinities(self, q: Tensor, k: Tensor) -> Any:
        return q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5

    def mask(self, wei: Tensor) -> Tensor:
        t = wei.shape[-1]
        return wei.masked_fill(self.tril[:t, :t] == 0, float("-inf"))

    def softmax(self, wei: Tensor) -> Tensor:
        return F.softmax(wei, dim=-1)

    def project(self, x: Tensor) -> Heads:
        return self.query(x), self.key(x), self.value(x)

    def forward(self, x: Tensor) -> Any:
        q, k, v = self.project(x)
        wei = self.dropout(self.softmax(self.mask(self.affinities(q, k))))
        return wei @ v


class LectureAttention(nn.Module):
    """All heads of the lecture, in a list."""

    head: type[nn.Module] = Head

    def __init__(self, n_embd: int, n_head: int) -> None:
        super().__init__()
        head_size = n_embd // n_head
        self.heads = nn.ModuleList([self.head(n_embd, head_size) for _ in range(n_head)])
        self.proj = nn.Linear(n_embd, n_embd)
        self.dropout = nn.Dropout(0.2)

    def gather(self, outputs: list[Tensor]) -> Tensor:
        return torch.cat(outputs, dim=-1)

    def forward(self, x: Tensor) -> Any:
        out = self.gather([h(x) for h in self.heads])
        return self.dropout(self.proj(out))


class EncoderHead(nn.Module):
    """One head of "Natural language processing with transformers": q, k, v and no mask."""

    def __init__(self, embed_dim: int, head_dim: int) -> None:
        super().__init__()
        self.q = nn.Linear(embed_dim, head_dim)
        self.k = nn.Linear(embed_dim, head_dim)
        self.v = nn.Linear(embed_dim, head_dim)

    def weights(self, query: Tensor, key: Tensor) -> Tensor:
        scores = torch.bmm(query, key.transpose(1, 2)) / query.size(-1) ** 0.5
        return F.softmax(scores, dim=-1)

    def forward(self, hidden_state: Tensor) -> Tensor:
        query, key, value = self.q(hidden_state), self.k(hidden_state), self.v(hidden_state)
        return torch.bmm(self.weights(query, key), value)


class EncoderHeads(nn.Module):
    """All heads of that book."""

    head: type[nn.Module] = EncoderHead

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        head_dim = embed_dim // num_heads
        self.heads = nn.ModuleList([self.head(embed_dim, head_dim) for _ in range(num_heads)])
        self.output_linear = nn.Linear(embed_dim, embed_dim)

    def forward(self, hidden_state: Tensor) -> Any:
        x = torch.cat([h(hidden_state) for h in self.heads], dim=-1)
        return self.output_linear(x)


class DotProductAttention(nn.Module):
    """The one of "Dive into deep learning": the heads join the batch, then ``bmm``."""

    def __init__(self, num_hiddens: int, num_heads: int, bias: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.W_q = nn.Linear(num_hiddens, num_hiddens, bias=bias)
        self.W_k = nn.Linear(num_hiddens, num_hiddens, bias=bias)
        self.W_v = nn.Linear(num_hiddens, num_hiddens, bias=bias)
        self.W_o = nn.Linear(num_hiddens, num_hiddens, bias=bias)
        self.dropout = nn.Dropout(0.1)

    def transpose_qkv(self, x: Tensor) -> Tensor:
        x = x.reshape(x.shape[0], x.shape[1], self.num_heads, -1).permute(0, 2, 1, 3)
        return x.reshape(-1, x.shape[2], x.shape[3])

    def transpose_output(self, x: Tensor) -> Tensor:
        x = x.reshape(-1, self.num_heads, x.shape[1], x.shape[2]).permute(0, 2, 1, 3)
        return x.reshape(x.shape[0], x.shape[1], -1)

    def dot_product(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        d = queries.shape[-1]
        scores = torch.bmm(queries, keys.transpose(1, 2)) / math.sqrt(d)
        return torch.bmm(self.dropout(nn.functional.softmax(scores, dim=-1)), values)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Any:
        queries = self.transpose_qkv(self.W_q(queries))
        keys = self.transpose_qkv(self.W_k(keys))
        values = self.transpose_qkv(self.W_v(values))
        output = self.dot_product(queries, keys, values)
        return self.W_o(self.transpose_output(output))


class PrepareForMultiHeadAttention(nn.Module):
    """Project and split, as labml does it."""

    def __init__(self, d_model: int, heads: int, d_k: int, bias: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(d_model, heads * d_k, bias=bias)
        self.heads = heads
        self.d_k = d_k

    def forward(self, x: Tensor) -> Any:
        head_shape = x.shape[:-1]
        return self.linear(x).view(*head_shape, self.heads, self.d_k)


class LabmlAttention(nn.Module):
    """The one of labml: the sequence comes first, scores are ``i j b h``."""

    batch_first = True

    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        self.d_k = d_model // heads
        self.heads = heads
        self.query = PrepareForMultiHeadAttention(d_model, heads, self.d_k, bias=True)
        self.key = PrepareForMultiHeadAttention(d_model, heads, self.d_k, bias=True)
        self.value = PrepareForMultiHeadAttention(d_model, heads, self.d_k, bias=True)
        self.softmax = nn.Softmax(dim=1)
        self.output = nn.Linear(d_model, d_model)
        self.scale = 1 / math.sqrt(self.d_k)

    def forward(self, x: Tensor) -> Any:
        x = x.transpose(0, 1) if self.batch_first else x
        seq_len, batch_size, _ = x.shape
        query, key, value = self.query(x), self.key(x), self.value(x)
        scores = torch.einsum("ibhd,jbhd->ijbh", query, key) * self.scale
        attn = self.softmax(scores)
        out = torch.einsum("ijbh,jbhd->ibhd", attn, value).reshape(seq_len, batch_size, -1)
        out = self.output(out)
        return out.transpose(0, 1) if self.batch_first else out


class Lens(nn.Module):
    """The one of interpretability: raw parameters for each head, nothing but einsum."""

    def __init__(self, d_model: int, n_heads: int, std: float = 0.1) -> None:
        super().__init__()
        d_head = d_model // n_heads
        self.W_Q = nn.Parameter(torch.randn(n_heads, d_model, d_head) * std)
        self.W_K = nn.Parameter(torch.randn(n_heads, d_model, d_head) * std)
        self.W_V = nn.Parameter(torch.randn(n_heads, d_model, d_head) * std)
        self.W_O = nn.Parameter(torch.randn(n_heads, d_head, d_model) * std)
        self.b_O = nn.Parameter(torch.randn(d_model) * std)
        self.d_head = d_head

    def matrices(self) -> dict[str, Tensor]:
        """What ``weights`` of the doctor expects."""
        roles = {"q": self.W_Q, "k": self.W_K, "v": self.W_V}
        weights = {role: rearrange(w, "h e d -> (h d) e") for role, w in roles.items()}
        weights["out"] = rearrange(self.W_O, "h d e -> e (h d)")
        return {name: w.detach() for name, w in {**weights, "out_bias": self.b_O}.items()}

    def pattern(self, q: Tensor, k: Tensor) -> Tensor:
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / self.d_head**0.5
        return self.causal(scores).softmax(dim=-1)

    def causal(self, scores: Tensor) -> Tensor:
        future = torch.ones(scores.shape[-2:], device=scores.device).triu(1).bool()
        return scores.masked_fill(future, -torch.inf)

    def forward(self, x: Tensor) -> Tensor:
        q = torch.einsum("bpm,hmd->bphd", x, self.W_Q)
        k = torch.einsum("bpm,hmd->bphd", x, self.W_K)
        v = torch.einsum("bpm,hmd->bphd", x, self.W_V)
        z = torch.einsum("bhqk,bkhd->bqhd", self.pattern(q, k), v)
        return torch.einsum("bqhd,hdm->bqm", z, self.W_O) + self.b_O


def matrices(
    embed_dim: int, kv_dim: int | None = None, *, bias: bool = False, seed: int = 0
) -> dict[str, Tensor]:
    """Random matrices in the orientation of ``nn.Linear``, for the functions."""
    generator = torch.Generator().manual_seed(seed)
    rows = {"q": embed_dim, "k": kv_dim or embed_dim, "v": kv_dim or embed_dim, "out": embed_dim}
    weights = {
        name: torch.randn(size, embed_dim, generator=generator) * embed_dim**-0.5
        for name, size in rows.items()
    }
    if bias:
        weights |= {
            f"{name}_bias": torch.randn(size, generator=generator) * 0.2
            for name, size in rows.items()
        }
    return weights


def to_heads(x: Tensor, num_heads: int) -> Tensor:
    return rearrange(x, "b n (h d) -> b h n d", h=num_heads)


def project(x: Tensor, w: dict[str, Tensor], num_heads: int, names: str = "qkv") -> Heads:
    q, k, v = (
        to_heads(F.linear(x, w[name].to(x), bias_of(w, name, x)), num_heads) for name in names
    )
    return q, k, v


def bias_of(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor | None:
    return w[f"{name}_bias"].to(x) if f"{name}_bias" in w else None


def finish(out: Tensor, w: dict[str, Tensor]) -> Tensor:
    out = rearrange(out, "b h n d -> b n (h d)")
    return F.linear(out, w["out"].to(out), bias_of(w, "out", out))


def attention_function(x: Tensor, w: dict[str, Tensor], num_heads: int) -> Tensor:
    """Attention as one function over a dictionary of matrices."""
    q, k, v = project(x, w, num_heads)
    a = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1)
    return finish(a @ v, w)
