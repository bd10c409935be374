"""Models of transformers with this library's attention: the same logits, and the same text, however it is cut.

Embeddings, norms, perceptrons and heads are the model's own; what is compared is the attention, its positions, its
window, its mask and its cache. Weights and settings are random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mha_lib import KVCache, MultiHeadAttention, convert
from tests.peers import of_transformers
from tests.support import DRAWS, Draw, assert_near
from tests.test_convert import drawn, needs
from tests.tolerances import Tolerance

B, PROMPT, WRITTEN, VOCABULARY, LAYERS = 3, 19, 6, 61, 2
CUTTINGS = 6
PADDING = (0, 4, 9)
"""Tokens of padding on the left of each sample."""

SEEDS = range(1, 2 + DRAWS // 5)
LOGITS = Tolerance(0, 1e-4)
"""float32 through two layers, on logits below 15; 3e-5 is seen. A wrong scale, window or frequency is 1e-2 and more."""

HALF_LOGITS = Tolerance(0, 2**-3)
"""bfloat16 through two layers, relative to the largest logit: some dozen roundings of 2**-9, which sharp weights
enlarge; 0.04 is seen, and as much between transformers' own bfloat16 and float32."""

PADDED = pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])


# Random models


@dataclass(frozen=True)
class Family:
    """A model that writes, and how to draw its settings."""

    load: Callable[..., MultiHeadAttention]
    model: str
    kind: str
    settings: Callable[[Draw], dict[str, Any]]

    def build(self, seed: int) -> Any:
        needs("transformers")
        settings = {
            "vocab_size": VOCABULARY,
            "num_hidden_layers": LAYERS,
            "max_position_embeddings": 64,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": 0,
            **self.settings(Draw(seed)),
        }
        config = f"{self.kind.removesuffix('ForCausalLM').removesuffix('LMHeadModel')}Config"
        model = of_transformers(
            self.model, self.kind, config, settings, implementation="eager"
        ).eval()
        return drawn(model, seed)


def gpt2_settings(draw: Draw, **more: Any) -> dict[str, Any]:
    heads = draw.size(1, 4)
    return {"n_embd": 8 * heads, "n_head": heads, "n_inner": draw.size(8, 40), **more}


def llama_settings(draw: Draw, rope: str = "default", **more: Any) -> dict[str, Any]:
    keys = draw.size(1, 3)
    heads = keys * draw.size(2, 3)
    parameters: dict[str, Any] = {"rope_type": rope, "rope_theta": 10.0 ** draw.size(2, 5)}
    if rope != "default":
        parameters["factor"] = float(draw.size(2, 8))
    if rope == "llama3":
        parameters |= {
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": draw.size(20, 60),
        }
    return {
        "hidden_size": heads * draw.size(4, 8),
        "intermediate_size": draw.size(8, 40),
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "head_dim": 2 * draw.size(2, 6),
        "rope_parameters": parameters,
        **more,
    }


def mistral_settings(draw: Draw) -> dict[str, Any]:
    return llama_settings(draw, sliding_window=draw.size(2, 9))


def sliding_settings(draw: Draw) -> dict[str, Any]:
    layers = ["full_attention", "sliding_attention"]
    return {**mistral_settings(draw), "use_sliding_window": True, "layer_types": layers}


GPT2 = partial(Family, convert.from_gpt2, "gpt2", "GPT2LMHeadModel")
LLAMA = partial(Family, convert.from_llama, "llama", "LlamaForCausalLM")
FAMILIES = {
    "gpt2": GPT2(gpt2_settings),
    "gpt2, scaled by layer": GPT2(partial(gpt2_settings, scale_attn_by_inverse_layer_idx=True)),
    "llama": LLAMA(llama_settings),
    "llama, linear": LLAMA(partial(llama_settings, rope="linear")),
    "llama, llama3": LLAMA(partial(llama_settings, rope="llama3")),
    "llama, bias": LLAMA(partial(llama_settings, attention_bias=True)),
    "mistral": Family(convert.from_llama, "mistral", "MistralForCausalLM", mistral_settings),
    "qwen2": Family(convert.from_llama, "qwen2", "Qwen2ForCausalLM", llama_settings),
    "qwen2, sliding layer": Family(
        convert.from_llama, "qwen2", "Qwen2ForCausalLM", sliding_settings
    ),
}
FAMILY = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
SEED = pytest.mark.parametrize("seed", SEEDS)


# The same models on this library's attention


class Rebuilt(nn.Module):
    """All that a model of transformers has but its attention, which is converted."""

    def __init__(self, model: Any, load: Callable[..., MultiHeadAttention]) -> None:
        super().__init__()
        body, self.head = model.base_model, model.lm_head
        self.old = hasattr(body, "wpe")  # GPT-2 adds its positions to the tokens
        if self.old:
            self.tokens, self.places, self.norm = body.wte, body.wpe, body.ln_f
            names, blocks = ("attn", "ln_1", "ln_2"), body.h
        else:
            self.tokens, self.norm = body.embed_tokens, body.norm
            names = ("self_attn", "input_layernorm", "post_attention_layernorm")
            blocks = body.layers
        prefix = f"{model.base_model_prefix}.{'h' if self.old else 'layers'}"
        self.attentions = nn.ModuleList(
            load(model, f"{prefix}.{number}.{names[0]}") for number in range(len(blocks))
        )
        self.norms = nn.ModuleList(getattr(block, names[1]) for block in blocks)
        self.later_norms = nn.ModuleList(getattr(block, names[2]) for block in blocks)
        self.perceptrons = nn.ModuleList(block.mlp for block in blocks)

    def forward(self, ids: Tensor, keep: Tensor, caches: list[KVCache] | None = None) -> Tensor:
        """Logits of ``ids``, the last of the tokens that ``keep`` tells from padding."""
        x = self.tokens(ids)
        if self.old:
            x = x + self.places(positions(keep)[:, -ids.shape[1] :])
        mask = None if keep.all() else keep[:, None, None, :]
        for number, attention in enumerate(self.attentions):
            cache = None if caches is None else caches[number]
            x = x + attention(self.norms[number](x), mask=mask, cache=cache)
            x = x + self.perceptrons[number](self.later_norms[number](x))
        logits: Tensor = self.head(self.norm(x))
        return logits

    def caches(self, length: int) -> list[KVCache]:
        dtype = next(self.parameters()).dtype
        return [
            KVCache(B, one.num_kv_heads, one.head_dim, max_length=length, dtype=dtype)
            for one in self.attentions
            if isinstance(one, MultiHeadAttention)
        ]


def positions(keep: Tensor) -> Tensor:
    """The place of each token among those that are no padding."""
    return (keep.long().cumsum(-1) - 1).clamp(min=0)


def prompt(seed: int, padded: bool) -> tuple[Tensor, Tensor]:
    """Tokens, and which of them are no padding."""
    ids = torch.randint(1, VOCABULARY, (B, PROMPT), generator=Draw(seed).generator)
    keep = torch.arange(PROMPT) >= torch.tensor(PADDING)[:, None]
    keep = keep if padded else torch.ones_like(keep)
    return ids * keep, keep


def longer(keep: Tensor, length: int) -> Tensor:
    """``keep`` with the tokens that are written, none of which is padding."""
    return torch.nn.functional.pad(keep, (0, length - keep.shape[1]), value=True)


@torch.no_grad()
def theirs(model: Any, ids: Tensor, keep: Tensor) -> Tensor:
    keep = longer(keep, ids.shape[1])
    given = {"attention_mask": keep.long(), "position_ids": positions(keep)}
    logits: Tensor = model(ids, **given, use_cache=False).logits
    return logits


@torch.no_grad()
def in_chunks(rebuilt: Rebuilt, ids: Tensor, keep: Tensor, sizes: Iterable[int]) -> Tensor:
    """Logits of all tokens, read a chunk at a time into caches."""
    caches, logits, start = rebuilt.caches(ids.shape[1]), [], 0
    keep = longer(keep, ids.shape[1])
    for size in sizes:
        end = start + size
        logits.append(rebuilt(ids[:, start:end], keep[:, :end], caches))
        start = end
    assert {cache.length for cache in caches} == {ids.shape[1]}
    return torch.cat(logits, dim=1)


@torch.no_grad()
def written(rebuilt: Rebuilt, ids: Tensor, keep: Tensor, sizes: Iterable[int] | None) -> Tensor:
    """The prompt and the likeliest tokens after it; without ``sizes``, each from the whole text, without a cache."""
    caches, start, text = None, 0, ids
    if sizes is not None:
        caches = rebuilt.caches(PROMPT + WRITTEN)
        for size in sizes:
            end = start + size
            logits = rebuilt(ids[:, start:end], keep[:, :end], caches)
            start = end
        text = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    while text.shape[1] < PROMPT + WRITTEN:
        logits = rebuilt(text[:, start:], longer(keep, text.shape[1]), caches)
        start = text.shape[1] if caches else 0
        text = torch.cat([text, logits[:, -1:].argmax(-1)], dim=1)
    return text


def cuttings(seed: int, length: int) -> list[list[int]]:
    """Sizes of chunks: everything at once, a token at a time, and at random places."""
    draw, cut = Draw(seed), []
    for _ in range(CUTTINGS):
        places = {draw.size(1, length - 1) for _ in range(draw.size(1, length - 1))}
        ends = [0, *sorted(places), length]
        cut.append([end - start for start, end in pairwise(ends)])
    return [[length], [1] * length, [length - 1, 1], *cut]


def assert_real_tokens_near(
    actual: Tensor, expected: Tensor, keep: Tensor, tolerance: Tolerance
) -> None:
    """Nothing reads what comes out of padding, but it is a number."""
    assert actual.dtype == expected.dtype
    assert actual.isfinite().all()
    real = longer(keep, expected.shape[1])
    assert_near(actual[real], expected[real], tolerance)


def assert_same_text(actual: Tensor, expected: Tensor, logits: Tensor) -> None:
    """The same tokens, up to where two of them are equally likely by the expected text's ``logits``."""
    assert actual.shape == expected.shape
    for mine, other, one in zip(actual, expected, logits, strict=True):
        differing = (mine != other).nonzero()
        if len(differing):
            place = int(differing[0])
            gap = one[place - 1].max() - one[place - 1, mine[place]]
            assert gap <= 2 * LOGITS.atol, f"another token at position {place}"


# What must be equal


@FAMILY
@SEED
@PADDED
def test_the_logits_are_those_of_transformers(family: Family, seed: int, padded: bool) -> None:
    model = family.build(seed)
    rebuilt = Rebuilt(model, family.load).eval()
    ids, keep = prompt(seed, padded)
    expected = theirs(model, ids, keep)
    with torch.no_grad():
        assert_real_tokens_near(rebuilt(ids, keep), expected, keep, LOGITS)
    for sizes in cuttings(seed, PROMPT):
        assert_real_tokens_near(in_chunks(rebuilt, ids, keep, sizes), expected, keep, LOGITS)


@FAMILY
@SEED
@PADDED
def test_the_text_is_that_of_transformers(family: Family, seed: int, padded: bool) -> None:
    model = family.build(seed)
    rebuilt = Rebuilt(model, family.load).eval()
    ids, keep = prompt(seed, padded)
    expected = model.generate(
        ids, attention_mask=keep.long(), max_new_tokens=WRITTEN, do_sample=False
    )
    assert expected.shape == (B, PROMPT + WRITTEN)
    logits = theirs(model, expected, keep)
    assert_same_text(written(rebuilt, ids, keep, None), expected, logits)
    for sizes in cuttings(seed, PROMPT):
        assert_same_text(written(rebuilt, ids, keep, sizes), expected, logits)


@FAMILY
@PADDED
def test_bfloat16_stays_close(family: Family, padded: bool) -> None:
    model = family.build(1)
    ids, keep = prompt(1, padded)
    model.bfloat16()
    rebuilt = Rebuilt(model, family.load).eval()
    expected = theirs(model, ids, keep)
    nearness = Tolerance(0, HALF_LOGITS.atol * float(expected.abs().max()))
    with torch.no_grad():
        assert_real_tokens_near(rebuilt(ids, keep), expected, keep, nearness)
    for sizes in cuttings(1, PROMPT)[:4]:
        assert_real_tokens_near(in_chunks(rebuilt, ids, keep, sizes), expected, keep, nearness)


# What must not pass


def rescaled(attention: Any) -> None:
    attention.scale = attention.scale * 1.05


def unmasked(attention: Any) -> None:
    attention.causal = False


def widened(attention: Any) -> None:
    attention.window += 1


def slowed(attention: Any) -> None:
    attention.rotary.frequencies *= 0.97


def interleaved(attention: Any) -> None:
    attention.rotary.interleaved = True


def unpositioned(attention: Any) -> None:
    attention.rotary = None


MISTAKES = [
    *[(name, rescaled) for name in FAMILIES],
    *[(name, unmasked) for name in FAMILIES],
    *[(name, slowed) for name in FAMILIES if "gpt2" not in name],
    *[(name, interleaved) for name in FAMILIES if "gpt2" not in name],
    *[(name, unpositioned) for name in FAMILIES if "gpt2" not in name],
    ("mistral", widened),
    ("qwen2, sliding layer", widened),
]


@pytest.mark.parametrize(
    ("name", "mistake"), MISTAKES, ids=[f"{name}: {made.__name__}" for name, made in MISTAKES]
)
def test_the_comparison_notices(name: str, mistake: Callable[[Any], None]) -> None:
    """A mistake in the last layer's attention alone."""
    model = FAMILIES[name].build(1)
    rebuilt = Rebuilt(model, FAMILIES[name].load).eval()
    ids, keep = prompt(1, True)
    expected = theirs(model, ids, keep)
    mistake(rebuilt.attentions[-1])
    with torch.no_grad(), pytest.raises(AssertionError):
        assert_real_tokens_near(rebuilt(ids, keep), expected, keep, LOGITS)


# Images


class Tupled(nn.Module):
    """Attention in the place of that of ViT, which returns its weights too."""

    def __init__(self, attention: MultiHeadAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return self.attention(x), None


@SEED
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_the_logits_of_vit(seed: int, bias: bool) -> None:
    needs("transformers")
    draw = Draw(seed)
    heads = draw.size(1, 4)
    settings = {
        "hidden_size": 4 * draw.size(1, 3) * heads,
        "num_attention_heads": heads,
        "num_hidden_layers": LAYERS,
        "intermediate_size": draw.size(8, 40),
        "image_size": 12,
        "patch_size": draw.size(3, 4),
        "qkv_bias": bias,
        "num_labels": 5,
    }
    kind = "ViTForImageClassification"
    model = of_transformers("vit", kind, "ViTConfig", settings, implementation="eager")
    drawn(model.eval(), seed)
    images = draw.normal(B, 3, 12, 12, dtype=torch.float32)
    with torch.no_grad():
        expected = model(images).logits
        for number, layer in enumerate(model.vit.layers):
            layer.attention = Tupled(convert.from_vit(model, f"vit.layers.{number}.attention"))
        assert_near(model(images).logits, expected, LOGITS)
        model.vit.layers[-1].attention.attention.scale *= 1.05
        with pytest.raises(AssertionError):
            assert_near(model(images).logits, expected, LOGITS)
