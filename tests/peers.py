"""Correct attention by other people and in other styles: the doctor must find nothing wrong with any of it.

``PEERS`` imports fast: transformers, x-transformers and timm are loaded when a peer of theirs is built. A peer with
``verified=True`` is all that the book's reference can compute, given the arguments; with ``verified=False`` it holds
something that ``diagnose`` cannot be told of; with None it is left open.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mha_lib import (
    MultiHeadAttention,
    RotaryEmbedding,
    SimpleMultiHeadAttention,
    SplitMultiHeadAttention,
)

BF16, FP64 = torch.bfloat16, torch.float64
BLOCK = 512
"""The longest sequence that peers with a table of positions take."""


@dataclass
class Peer:
    """One candidate that is right.

    Attributes:
        name: What it is.
        build: Seeds torch and returns the candidate.
        arguments: What ``diagnose`` is called with besides: ``embed_dim``, ``num_heads`` and keywords.
        verified: What ``.verified`` should be; None if either will do.
    """

    name: str
    build: Callable[[], Any]
    arguments: dict[str, Any]
    verified: bool | None = None


PEERS: list[Peer] = []

DISPUTED: list[Peer] = []
"""Widely used code that does what a finding says, on purpose or from habit; whether that is an alarm is a decision."""


def add(
    name: str,
    make: Callable[[], Any],
    verified: bool | None = None,
    *,
    embed_dim: int = 32,
    num_heads: int = 4,
    disputed: bool = False,
    **keywords: Any,
) -> None:
    """Put a peer on its list."""

    def build() -> Any:
        torch.manual_seed(0)
        return make()

    arguments = {"embed_dim": embed_dim, "num_heads": num_heads, **keywords}
    (DISPUTED if disputed else PEERS).append(Peer(name, build, arguments, verified))


def shaken(module: Any, factor: float = 3.0) -> Any:
    """Weights as after training: larger matrices, biases and norms that are no longer zeros and ones."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.mul_(factor)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def as_function(module: Any) -> Callable[[Tensor], Any]:
    """The module behind a lambda, which is all that the doctor gets."""
    return lambda x: module(x)


def forbidden(
    x: Tensor, *, causal: bool = False, window: int | None = None, padding: Tensor | None = None
) -> Tensor:
    """True where a query may not look, shape ``(b or 1, 1, n, n)``."""
    n = x.shape[1]
    ago = torch.arange(n, device=x.device)[:, None] - torch.arange(n, device=x.device)
    hidden = torch.zeros(n, n, dtype=torch.bool, device=x.device)
    if causal:
        hidden = hidden | (ago < 0)
    if window is not None:
        hidden = hidden | (ago >= window)
    hidden = hidden[None, None]
    return hidden if padding is None else hidden | ~padding[:, None, None, :]


class Holder(nn.Module):
    """A wrapper in the usual style: it holds the attention and calls it with what else it needs."""

    def __init__(self, attention: Any, call: Callable[..., Any]) -> None:
        super().__init__()
        self.attention = attention
        self.call = call

    def forward(self, x: Tensor, *mask: Tensor) -> Any:
        return self.call(self.attention, x, *mask)


# torch


def torch_mha(embed_dim: int = 32, num_heads: int = 4, **options: Any) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(embed_dim, num_heads, **{"batch_first": True, **options})


def torch_causal(attention: Any, x: Tensor) -> Any:
    mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
    return attention(x, x, x, attn_mask=mask, need_weights=False)[0]


def torch_padded(attention: Any, x: Tensor, mask: Tensor, need_weights: bool = False) -> Any:
    return attention(x, x, x, key_padding_mask=~mask, need_weights=need_weights)


def sequence_first(attention: Any, x: Tensor) -> Any:
    turned = x.transpose(0, 1)
    return attention(turned, turned, turned)[0].transpose(0, 1)


def batch_first(attention: Any, x: Tensor) -> Any:
    return attention(x, x, x)[0]


class Block(nn.Module):
    """A pre-norm residual block without its MLP."""

    def __init__(self, attention: Any, embed_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embed_dim)
        self.attention = attention

    def forward(self, x: Tensor) -> Any:
        y = self.norm(x)
        return x + self.attention(y, y, y, need_weights=False)[0]


add("torch: bare, batch first", torch_mha, True)
add("torch: bare, eval", lambda: torch_mha().eval(), True)
add("torch: bare, batch second", lambda: torch_mha(batch_first=False))
add("torch: bare, batch second, eval", lambda: torch_mha(batch_first=False).eval())
add("torch: train with dropout", lambda: torch_mha(dropout=0.3), True)
add("torch: without bias", lambda: torch_mha(bias=False), True)
add("torch: float64", lambda: torch_mha(48, 3, dtype=FP64), True, embed_dim=48, num_heads=3)
add("torch: bfloat16", lambda: torch_mha(48, 3, dtype=BF16), True, embed_dim=48, num_heads=3)
add("torch: bfloat16, eval, no bias", lambda: torch_mha(dtype=BF16, bias=False).eval(), True)
add("torch: one head", lambda: torch_mha(16, 1), True, embed_dim=16, num_heads=1)
add("torch: heads of width 2", lambda: torch_mha(32, 16), True, num_heads=16)
add("torch: width 768", lambda: torch_mha(768, 12), True, embed_dim=768, num_heads=12)
add("torch: as trained", lambda: shaken(torch_mha()), True)
add("torch: as trained, scores in the tens", lambda: shaken(torch_mha(), 12.0), True)
add("torch: frozen", lambda: torch_mha().requires_grad_(False), True)
add("torch: zero attention", lambda: torch_mha(add_zero_attn=True), False)
add("torch: key and value bias", lambda: torch_mha(add_bias_kv=True), False)
add(
    "torch: kdim given, separate weights",
    lambda: Holder(torch_mha(kdim=32, vdim=24), lambda a, x: a(x, x, x[..., :24])[0]),
)


def torch_lambda() -> Any:
    attention = torch_mha().eval()
    return lambda x: attention(x, x, x)


def torch_lambda_bf16() -> Any:
    attention = torch_mha(dtype=BF16)
    return lambda x: attention(x, x, x, need_weights=False)[0]


def torch_sequence_first() -> Any:
    attention = shaken(torch_mha(batch_first=False))
    return lambda x: sequence_first(attention, x)


def torch_causal_lambda() -> Any:
    attention = torch_mha()
    return lambda x: torch_causal(attention, x)


def torch_padded_lambda() -> Any:
    attention = torch_mha().eval()
    return lambda x, mask: torch_padded(attention, x, mask)


add("torch: lambda", torch_lambda, True)
add("torch: lambda, bfloat16", torch_lambda_bf16, True)
add("torch: lambda, batch second", torch_sequence_first, True)
add("torch: causal wrapper", lambda: Holder(torch_mha(), torch_causal), True, causal=True)
add("torch: causal lambda", torch_causal_lambda, True, causal=True)
add(
    "torch: causal, is_causal with a boolean mask",
    lambda: Holder(
        torch_mha(dropout=0.1),
        lambda a, x: a(x, x, x, attn_mask=forbidden(x, causal=True)[0, 0], is_causal=True),
    ),
    True,
    causal=True,
)
add(
    "torch: padding, weights wanted",
    lambda: Holder(torch_mha(), partial(torch_padded, need_weights=True)),
    True,
    takes_mask=True,
)
add("torch: padding", lambda: Holder(torch_mha(), torch_padded), True, takes_mask=True)
add("torch: padding, lambda", torch_padded_lambda, True, takes_mask=True)
add(
    "torch: self_attn of an encoder layer",
    lambda: nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).self_attn,
    True,
)
add("torch: pre-norm block with residual", lambda: Block(torch_mha(), 32))
add(
    "torch: layer norm in front",
    lambda: nn.Sequential(nn.LayerNorm(32), Holder(torch_mha(), batch_first)),
)


# timm


def timm_attention() -> ModuleType:
    """``timm.layers.attention`` alone: timm itself imports torchvision, which the environment does without.

    ``timm`` and ``timm.layers`` are empty packages while the file and its four neighbours are loaded; afterwards
    ``sys.modules`` is as before.
    """
    spec = importlib.util.find_spec("timm")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent

    def ours() -> list[str]:
        return [name for name in sys.modules if name == "timm" or name.startswith("timm.")]

    before = {name: sys.modules.pop(name) for name in ours()}
    try:
        for name, path in {"timm": folder, "timm.layers": folder / "layers"}.items():
            package = ModuleType(name)
            package.__path__ = [str(path)]
            sys.modules[name] = package
        return importlib.import_module("timm.layers.attention")
    finally:
        for name in ours():
            del sys.modules[name]
        sys.modules.update(before)


def timm(kind: str = "Attention", *, fused: bool = True, **options: Any) -> Any:
    attention = getattr(timm_attention(), kind)(32, num_heads=4, **options)
    attention.fused_attn = fused
    return attention


def timm_rope(attention: Any, x: Tensor) -> Any:
    """Rotary positions in timm's layout: neighbours are a pair."""
    angles = torch.arange(x.shape[1])[:, None] * 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    table = torch.cat([angles.sin(), angles.cos()], dim=-1).repeat_interleave(2, dim=-1)
    return attention(x, rope=table.to(x.dtype))


RMS = partial(nn.RMSNorm, eps=1e-6)
LAYER = partial(nn.LayerNorm, eps=1e-6)

add("timm: Attention", timm, True)
add("timm: Attention, eager, qkv bias", lambda: timm(fused=False, qkv_bias=True), True)
add("timm: dropouts in training", lambda: timm(attn_drop=0.1, proj_drop=0.2), True)
add("timm: bfloat16", lambda: timm(qkv_bias=True, dtype=BF16), True)
add(
    "timm: qk_norm",
    lambda: timm(qkv_bias=True, qk_norm=True, norm_layer=LAYER),
    True,
    qk_norm=LAYER,
)
add("timm: qk_norm, undeclared", lambda: timm(qk_norm=True, norm_layer=LAYER))
add("timm: heads wider than the tokens", lambda: timm(attn_head_dim=16), True)
add("timm: scale norm", lambda: timm(scale_norm=True, norm_layer=LAYER))
add("timm: gated", lambda: timm(gated=True, qkv_bias=True), False)
add("timm: causal", lambda: Holder(timm(), lambda a, x: a(x, is_causal=True)), True, causal=True)
add(
    "timm: AttentionRope",
    lambda: Holder(timm("AttentionRope", num_prefix_tokens=0), timm_rope),
    True,
    rotary=RotaryEmbedding(8, interleaved=True),
)
add("timm: AttentionRope without positions", lambda: timm("AttentionRope"), True)
add(
    "timm: AttentionRope, grouped heads",
    lambda: timm("AttentionRope", qkv_fused=False, num_kv_heads=2),
    True,
    num_kv_heads=2,
)


# x-transformers


def x_transformers(**options: Any) -> Any:
    module = importlib.import_module("x_transformers.x_transformers")
    return module.Attention(**{"dim": 32, "heads": 4, "dim_head": 8, **options})


def x_rotary(attention: Any, x: Tensor) -> Any:
    module = importlib.import_module("x_transformers.x_transformers")
    return attention(x, rotary_pos_emb=module.RotaryEmbedding(8).forward_from_seq_len(x.shape[1]))


add("x-transformers: plain", x_transformers, True)
add("x-transformers: causal", lambda: x_transformers(causal=True), True, causal=True)
add("x-transformers: flash", lambda: x_transformers(flash=True), True)
add(
    "x-transformers: flash, causal, dropout",
    lambda: x_transformers(flash=True, causal=True, dropout=0.1),
    True,
    causal=True,
)
add(
    "x-transformers: one key/value head",
    lambda: x_transformers(one_kv_head=True),
    True,
    num_kv_heads=1,
)
add("x-transformers: heads of width 16", lambda: x_transformers(dim_head=16), True)
add("x-transformers: qk_norm", lambda: x_transformers(qk_norm=True))
add("x-transformers: qk_rmsnorm", lambda: x_transformers(qk_rmsnorm=True))
add("x-transformers: gated values", lambda: x_transformers(gate_values=True), False)
add("x-transformers: memory", lambda: x_transformers(num_mem_kv=2), False)
add("x-transformers: head sinks", lambda: x_transformers(head_learned_sink=True))
add(
    "x-transformers: softclamp",
    lambda: x_transformers(softclamp_logits=True, logit_softclamp_value=5.0),
    True,
    softcap=5.0,
)
add(
    "x-transformers: rotary",
    lambda: Holder(x_transformers(), x_rotary),
    True,
    rotary=RotaryEmbedding(8, interleaved=True),
)
add(
    "x-transformers: rotary, causal, undeclared",
    lambda: Holder(x_transformers(causal=True), x_rotary),
    causal=True,
)
add(
    "x-transformers: padding",
    lambda: Holder(x_transformers(), lambda a, x, mask: a(x, mask=mask)),
    True,
    takes_mask=True,
)
add("x-transformers: float64", lambda: x_transformers(causal=True).double(), True, causal=True)
add(
    "x-transformers: two key/value heads, tiled",
    lambda: x_transformers(kv_heads=2),
    disputed=True,
    num_kv_heads=2,
)


# transformers


class Fed(nn.Module):
    """Attention of transformers, with the positions and the mask that its model would give it."""

    def __init__(
        self,
        attention: Any,
        rotary: Any = None,
        *,
        mask: bool = False,
        window: int | None = None,
        positions: bool = False,
        **given: Any,
    ) -> None:
        super().__init__()
        self.attention = attention
        self.rotary_emb = rotary
        self.mask, self.window, self.positions, self.given = mask, window, positions, given

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Any:
        more = dict(self.given)
        positions = torch.arange(x.shape[1], device=x.device)[None]
        if self.rotary_emb is not None:
            more["position_embeddings"] = self.rotary_emb(x, positions)
        if self.positions:
            more["position_ids"] = positions
        if self.mask or padding is not None:
            hidden = forbidden(x, causal=self.mask, window=self.window, padding=padding)
            lowest = torch.finfo(x.dtype).min
            more["attention_mask"] = torch.zeros_like(hidden, dtype=x.dtype).masked_fill(
                hidden, lowest
            )
        return self.attention(x, **more)


def of_transformers(
    model: str,
    kind: str,
    config: str,
    settings: dict[str, Any],
    init: dict[str, Any] | None = None,
    *,
    rotary: str | None = None,
    implementation: str = "sdpa",
    **fed: Any,
) -> Any:
    """An attention module with random weights, fed if it needs more than tokens."""
    modeling = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    configs = importlib.import_module(f"transformers.models.{model}.configuration_{model}")
    configuration = getattr(configs, config)(**settings, attn_implementation=implementation)
    attention = getattr(modeling, kind)(config=configuration, **(init or {}))
    if rotary is None and not fed:
        return attention
    turn = None if rotary is None else getattr(modeling, rotary)(configuration)
    return Fed(attention, turn, **fed)


def hugging(
    kind: str,
    model: str,
    settings: dict[str, Any],
    init: dict[str, Any] | None = None,
    verified: bool | None = None,
    *,
    what: str = "",
    rotary: bool = False,
    config: str | None = None,
    change: Callable[[Any], Any] = lambda module: module,
    expects: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """Put an attention class of transformers on the list; ``options`` are those of ``of_transformers``."""
    family = kind.removesuffix("Attention").removesuffix("Self")
    config = config or f"{family}Config"
    turn = f"{family}RotaryEmbedding" if rotary else None
    add(
        f"transformers: {kind}" + f", {what}" * bool(what),
        lambda: change(
            of_transformers(model, kind, config, settings, init, rotary=turn, **options)
        ),
        verified,
        **(expects or {}),
    )


def decoder(
    kind: str,
    model: str,
    settings: dict[str, Any],
    expects: dict[str, Any],
    what: str = "",
    *,
    layer: int = 0,
    verified: bool | None = True,
    **options: Any,
) -> None:
    """One with rotary positions that is given a causal mask."""
    options = {"rotary": True, "mask": True, "what": what, "expects": expects, **options}
    hugging(kind, model, settings, {"layer_idx": layer}, verified, **options)


BERT = {"hidden_size": 32, "num_attention_heads": 4}
GPT2 = {"n_embd": 32, "n_head": 4, "n_positions": BLOCK}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA = {**BERT, "num_key_value_heads": 2, "head_dim": 8, "rope_parameters": ROPE}
FULL = {**LLAMA, "num_key_value_heads": 4}
HALF = {**FULL, "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}
FIRST = {"layer_idx": 0}
WIDE = {"embed_dim": 32, "num_heads": 4}
CAUSAL = {"causal": True}
TURNED = {"causal": True, "rotary": RotaryEmbedding(8)}
PARTLY = {"causal": True, "rotary": RotaryEmbedding(4)}
GROUPED = {**TURNED, "num_kv_heads": 2}
NEIGHBOURS = RotaryEmbedding(8, interleaved=True)


def bf16(module: Any) -> Any:
    return module.to(BF16)


def fp64(module: Any) -> Any:
    return module.to(FP64)


def function(module: Any) -> Any:
    return as_function(module.eval())


hugging("BertSelfAttention", "bert", BERT)
hugging("BertSelfAttention", "bert", BERT, what="eager", implementation="eager")
hugging("BertSelfAttention", "bert", BERT, what="lambda", change=function)
hugging("BertSelfAttention", "bert", BERT, what="as trained", change=shaken)
hugging("BertSelfAttention", "bert", BERT, what="padding", mask=False, expects={"takes_mask": True})
hugging("BertAttention", "bert", BERT)
hugging("BertAttention", "bert", BERT, what="bfloat16", change=bf16)
hugging("RobertaSelfAttention", "roberta", BERT, change=fp64)
hugging("ElectraSelfAttention", "electra", BERT)
hugging("AlbertAttention", "albert", BERT)
hugging("MPNetSelfAttention", "mpnet", BERT, None, True)
hugging("DistilBertSelfAttention", "distilbert", {"dim": 32, "n_heads": 4}, None, True)
hugging("ViTAttention", "vit", BERT, None, True)
hugging("ViTAttention", "vit", BERT, None, True, what="eager", implementation="eager")
hugging("CLIPAttention", "clip", BERT, None, True, config="CLIPVisionConfig")
hugging("SiglipAttention", "siglip", BERT, None, True, config="SiglipVisionConfig")
hugging("BlipAttention", "blip", BERT, None, True, config="BlipVisionConfig")
hugging("BartAttention", "bart", {}, WIDE, True)
hugging("WhisperAttention", "whisper", {}, WIDE, True)
hugging("OPTAttention", "opt", BERT, FIRST, True, mask=True, expects=CAUSAL)
hugging(
    "GPT2Attention",
    "gpt2",
    GPT2,
    FIRST,
    True,
    what="eager",
    implementation="eager",
    mask=True,
    expects=CAUSAL,
)
hugging("GPT2Attention", "gpt2", GPT2, FIRST, True, what="sdpa", expects=CAUSAL)
hugging(
    "GPT2Attention",
    "gpt2",
    GPT2,
    FIRST,
    True,
    what="as trained",
    expects=CAUSAL,
    change=partial(shaken, factor=30.0),
)
hugging(
    "GPT2Attention",
    "gpt2",
    GPT2,
    FIRST,
    True,
    what="mask and lambda",
    mask=True,
    expects=CAUSAL,
    change=function,
)
hugging(
    "GPTNeoSelfAttention",
    "gpt_neo",
    {"hidden_size": 32, "num_heads": 4, "num_layers": 2, "attention_types": [[["global"], 2]]},
    {"attention_type": "global"},
    True,
    what="no scale",
    expects={"causal": True, "scale": 1.0},
)
hugging(
    "GPTNeoSelfAttention",
    "gpt_neo",
    {
        "hidden_size": 32,
        "num_heads": 4,
        "num_layers": 2,
        "window_size": 4,
        "attention_types": [[["local"], 2]],
    },
    {"attention_type": "local"},
    True,
    what="local",
    expects={"causal": True, "scale": 1.0, "window": 4},
)
hugging(
    "GPTBigCodeAttention",
    "gpt_bigcode",
    {**GPT2, "multi_query": True},
    FIRST,
    True,
    what="one key/value head",
    mask=True,
    expects={"causal": True, "num_kv_heads": 1},
)
for setting in ("sdpa", "eager"):
    decoder("LlamaAttention", "llama", LLAMA, GROUPED, setting, implementation=setting)
for label, change in {"bfloat16": bf16, "float64": fp64, "as trained": shaken}.items():
    decoder(
        "LlamaAttention",
        "llama",
        FULL,
        TURNED,
        label,
        change=change,
        verified=True if label == "as trained" else None,
    )
hugging(
    "LlamaAttention",
    "llama",
    LLAMA,
    FIRST,
    True,
    what="lambda, no mask given",
    rotary=True,
    expects=GROUPED,
    change=function,
)
decoder("LlamaAttention", "llama", FULL, CAUSAL, "rotary undeclared", verified=None)
decoder(
    "MistralAttention",
    "mistral",
    {**LLAMA, "sliding_window": 3},
    {**GROUPED, "window": 3},
    "with a window",
    window=3,
)
decoder("Qwen2Attention", "qwen2", {**LLAMA, "num_hidden_layers": 2}, GROUPED, "bias on q, k and v")
decoder(
    "Qwen3Attention",
    "qwen3",
    {**LLAMA, "head_dim": 16, "num_hidden_layers": 2},
    {**GROUPED, "rotary": RotaryEmbedding(16), "qk_norm": RMS},
    "qk_norm",
)
decoder(
    "Qwen3Attention",
    "qwen3",
    {**LLAMA, "num_hidden_layers": 2},
    {**GROUPED, "qk_norm": RMS},
    "as trained",
    change=shaken,
    verified=None,
)
decoder(
    "GemmaAttention",
    "gemma",
    {**LLAMA, "num_key_value_heads": 1, "head_dim": 16},
    {"causal": True, "rotary": RotaryEmbedding(16), "num_kv_heads": 1},
    "one key/value head",
)
decoder(
    "Gemma2Attention",
    "gemma2",
    {**LLAMA, "num_hidden_layers": 2, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0},
    {**GROUPED, "softcap": 2.0, "scale": 20 ** (-0.5)},
    "softcap and scale",
    implementation="eager",
    change=shaken,
    layer=1,
)
decoder(
    "GraniteAttention",
    "granite",
    {**LLAMA, "attention_multiplier": 0.2},
    {**GROUPED, "scale": 0.2},
    "scale of its own",
)
decoder("PhiAttention", "phi", HALF, PARTLY, "half of the features turned")
decoder("Phi3Attention", "phi3", {**LLAMA, "pad_token_id": 0}, GROUPED, "packed with grouped heads")
decoder("StableLmAttention", "stablelm", HALF, PARTLY, "half of the features turned")
decoder(
    "GPTNeoXAttention",
    "gpt_neox",
    {**BERT, "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}},
    PARTLY,
    "packed (h 3 d)",
)
decoder(
    "PersimmonAttention",
    "persimmon",
    HALF,
    {**PARTLY, "qk_norm": nn.LayerNorm},
    "packed (h 3 d), qk_norm",
    verified=None,
)
decoder("CohereAttention", "cohere", LLAMA, {**GROUPED, "rotary": NEIGHBOURS}, "neighbours turned")
hugging(
    "GPTJAttention",
    "gptj",
    {**GPT2, "rotary_dim": 4},
    FIRST,
    True,
    what="neighbours turned",
    mask=True,
    positions=True,
    expects={"causal": True, "rotary": RotaryEmbedding(4, interleaved=True)},
)
hugging(
    "CodeGenAttention",
    "codegen",
    {**GPT2, "rotary_dim": 4},
    FIRST,
    what="packed as query, value, key in four parts",
    mask=True,
    positions=True,
    expects={"causal": True, "rotary": RotaryEmbedding(4, interleaved=True)},
)
decoder(
    "FalconAttention",
    "falcon",
    {**BERT, "multi_query": True, "rope_parameters": ROPE},
    {**TURNED, "num_kv_heads": 1},
    "one key/value head",
    alibi=None,
)
decoder(
    "FalconAttention",
    "falcon",
    {**BERT, "new_decoder_architecture": True, "num_kv_heads": 2, "rope_parameters": ROPE},
    GROUPED,
    "groups packed side by side",
    alibi=None,
    verified=None,
)
decoder("Olmo2Attention", "olmo2", FULL, TURNED, "norm over all heads", verified=None)
decoder(
    "GptOssAttention",
    "gpt_oss",
    {**LLAMA, "num_hidden_layers": 2, "sliding_window": 4096},
    GROUPED,
    "sinks",
    implementation="eager",
    change=lambda module: sunk(module),
    layer=1,
    verified=None,
)


def sunk(module: Any) -> Any:
    """Its sinks are allocated, and filled by its model only."""
    nn.init.normal_(module.attention.sinks)
    return module


T5 = {"d_model": 32, "d_kv": 8, "num_heads": 4, "dropout_rate": 0.0}
hugging("T5Attention", "t5", T5, None, True, what="no scale", expects={"scale": 1.0})
hugging(
    "T5Attention",
    "t5",
    T5,
    {"has_relative_attention_bias": True},
    False,
    what="relative positions",
    expects={"scale": 1.0},
)


def bloom(slope: float) -> Any:
    """Packed (h 3 d); its linear bias by distance is switched off by ``slope=0``."""
    attention = of_transformers(
        "bloom", "BloomAttention", "BloomConfig", {"hidden_size": 32, "n_head": 4}, FIRST
    ).eval()

    def call(inner: Any, x: Tensor) -> Any:
        slopes = slope * 2.0 ** -torch.arange(1.0, 5.0, dtype=x.dtype)
        alibi = slopes[:, None, None] * torch.arange(x.shape[1], dtype=x.dtype)
        mask = torch.zeros(x.shape[1], x.shape[1]).masked_fill(forbidden(x, causal=True), -1e9)
        return inner(x, torch.zeros_like(x), alibi.repeat(x.shape[0], 1, 1), mask.to(x.dtype))[0]

    return Holder(attention, call)


add("transformers: BloomAttention, packed (h 3 d)", partial(bloom, 0.0), True, causal=True)
add("transformers: BloomAttention, ALiBi", partial(bloom, 1.0), False, causal=True)


def xlm() -> Any:
    attention = of_transformers(
        "xlm", "MultiHeadAttention", "XLMConfig", {"emb_dim": 32}, {"n_heads": 4, "dim": 32}
    )
    return Holder(attention.eval(), lambda a, x, mask: a(x, mask.to(x.dtype)))


def ctrl() -> Any:
    attention = of_transformers("ctrl", "MultiHeadAttention", "CTRLConfig", {**GPT2}, FIRST)
    return Holder(
        attention, lambda a, x: a(x, x, x, attention_mask=-1e4 * forbidden(x, causal=True))
    )


def openai_gpt() -> Any:
    sizes = {"nx": 32, "n_positions": BLOCK, "scale": True}
    return Holder(
        of_transformers("openai", "Attention", "OpenAIGPTConfig", GPT2, sizes).eval(),
        lambda a, x: a(x)[0],
    )


def squeezebert() -> Any:
    attention = of_transformers(
        "squeezebert", "SqueezeBertSelfAttention", "SqueezeBertConfig", BERT, {"cin": 32}
    )

    def call(inner: Any, x: Tensor) -> Any:
        nothing = x.new_zeros(x.shape[0], 1, 1, x.shape[1])
        return inner(x.transpose(1, 2), nothing, False)["context_layer"].transpose(1, 2)

    return Holder(attention, call)


add("transformers: XLM, padding", xlm, True, takes_mask=True)
add("transformers: CTRL, called as (v, k, q)", ctrl, True, causal=True)
add("transformers: OpenAI GPT, answers in a list", openai_gpt, True, causal=True)
add("transformers: SqueezeBERT, convolutions", squeezebert)


# Written by hand, each in the style of a course, a book or a repository


class NanoGPT(nn.Module):
    """karpathy/nanoGPT."""

    def __init__(
        self, n_embd: int, n_head: int, *, bias: bool = True, flash: bool = True, dropout: float = 0
    ) -> None:
        super().__init__()
        self.c_attn = nn.Linear(n_embd, 3 * n_embd, bias=bias)
        self.c_proj = nn.Linear(n_embd, n_embd, bias=bias)
        self.attn_dropout = nn.Dropout(dropout)
        self.resid_dropout = nn.Dropout(dropout)
        self.n_head, self.n_embd, self.dropout, self.flash = n_head, n_embd, dropout, flash
        if not flash:
            lower = torch.tril(torch.ones(BLOCK, BLOCK)).view(1, 1, BLOCK, BLOCK)
            self.register_buffer("bias", lower)

    def forward(self, x: Tensor) -> Any:
        b, t, c = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(b, t, self.n_head, c // self.n_head).transpose(1, 2)
        q = q.view(b, t, self.n_head, c // self.n_head).transpose(1, 2)
        v = v.view(b, t, self.n_head, c // self.n_head).transpose(1, 2)
        if self.flash:
            p = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(self.get_buffer("bias")[:, :, :t, :t] == 0, float("-inf"))
            y = self.attn_dropout(F.softmax(att, dim=-1)) @ v
        y = y.transpose(1, 2).contiguous().view(b, t, c)
        return self.resid_dropout(self.c_proj(y))


class LectureHead(nn.Module):
    """One head of Karpathy's lecture."""

    def __init__(self, n_embd: int, head_size: int) -> None:
        super().__init__()
        self.key = nn.Linear(n_embd, head_size, bias=False)
        self.query = nn.Linear(n_embd, head_size, bias=False)
        self.value = nn.Linear(n_embd, head_size, bias=False)
        self.register_buffer("tril", torch.tril(torch.ones(BLOCK, BLOCK)))
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Any:
        _, t, _ = x.shape
        k, q = self.key(x), self.query(x)
        wei = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5
        wei = wei.masked_fill(self.get_buffer("tril")[:t, :t] == 0, float("-inf"))
        return self.dropout(F.softmax(wei, dim=-1)) @ self.value(x)


class LectureHeads(nn.Module):
    def __init__(self, num_heads: int, head_size: int) -> None:
        super().__init__()
        n_embd = num_heads * head_size
        self.heads = nn.ModuleList([LectureHead(n_embd, head_size) for _ in range(num_heads)])
        self.proj = nn.Linear(n_embd, n_embd)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Any:
        return self.dropout(self.proj(torch.cat([h(x) for h in self.heads], dim=-1)))


class Annotated(nn.Module):
    """The Annotated Transformer: four linears in a list, the mask is zero where it forbids."""

    def __init__(self, h: int, d_model: int, dropout: float = 0.1, fill: float = -1e9) -> None:
        super().__init__()
        self.d_k, self.h, self.fill = d_model // h, h, fill
        linear = nn.Linear(d_model, d_model)
        self.linears = nn.ModuleList([copy.deepcopy(linear) for _ in range(4)])
        self.attn: Tensor | None = None
        self.dropout = nn.Dropout(p=dropout)
        for one in self.linears:
            nn.init.xavier_uniform_(one.get_parameter("weight"))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Any:
        if mask is not None:
            mask = mask.unsqueeze(1)
        nbatches = query.size(0)
        query, key, value = (
            lin(x).view(nbatches, -1, self.h, self.d_k).transpose(1, 2)
            for lin, x in zip(self.linears, (query, key, value), strict=False)
        )
        scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(self.d_k)
        if mask is not None:
            scores = scores.masked_fill(mask == 0, self.fill)
        self.attn = scores.softmax(dim=-1)
        x = torch.matmul(self.dropout(self.attn), value)
        x = x.transpose(1, 2).contiguous().view(nbatches, -1, self.h * self.d_k)
        return self.linears[-1](x)


class UvA(nn.Module):
    """The UvA deep learning tutorial: packed by head, (h 3 d)."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, embed_dim // num_heads
        self.qkv_proj = nn.Linear(embed_dim, 3 * embed_dim)
        self.o_proj = nn.Linear(embed_dim, embed_dim)
        nn.init.xavier_uniform_(self.qkv_proj.weight)
        nn.init.xavier_uniform_(self.o_proj.weight)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        batch, length, width = x.size()
        qkv = self.qkv_proj(x).reshape(batch, length, self.num_heads, 3 * self.head_dim)
        q, k, v = qkv.permute(0, 2, 1, 3).chunk(3, dim=-1)
        logits = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.size()[-1])
        if mask is not None:
            logits = logits.masked_fill(mask[:, None, None, :] == 0, -9e15)
        values = torch.matmul(F.softmax(logits, dim=-1), v).permute(0, 2, 1, 3)
        return self.o_proj(values.reshape(batch, length, width))


class D2L(nn.Module):
    """Dive into Deep Learning: the heads are moved into the batch; padding is given by lengths."""

    def __init__(self, num_hiddens: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.W_q = nn.Linear(num_hiddens, num_hiddens, bias=False)
        self.W_k = nn.Linear(num_hiddens, num_hiddens, bias=False)
        self.W_v = nn.Linear(num_hiddens, num_hiddens, bias=False)
        self.W_o = nn.Linear(num_hiddens, num_hiddens, bias=False)

    def transposed(self, x: Tensor) -> Tensor:
        x = x.reshape(x.shape[0], x.shape[1], self.num_heads, -1).permute(0, 2, 1, 3)
        return x.reshape(-1, x.shape[2], x.shape[3])

    def forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, valid_lens: Tensor | None
    ) -> Any:
        q, k, v = (
            self.transposed(layer(x))
            for layer, x in zip(
                (self.W_q, self.W_k, self.W_v), (queries, keys, values), strict=True
            )
        )
        scores = torch.bmm(q, k.transpose(1, 2)) / math.sqrt(q.shape[-1])
        if valid_lens is not None:
            lens = torch.repeat_interleave(valid_lens, self.num_heads)[:, None, None]
            scores = torch.where(torch.arange(k.shape[1]) < lens, scores, -1e6)
        out = torch.bmm(F.softmax(scores, dim=-1), v)
        out = out.reshape(-1, self.num_heads, out.shape[1], out.shape[2]).permute(0, 2, 1, 3)
        return self.W_o(out.reshape(out.shape[0], out.shape[1], -1))


class Raschka(nn.Module):
    """rasbt/LLMs-from-scratch."""

    def __init__(self, d_in: int, d_out: int, num_heads: int, qkv_bias: bool = False) -> None:
        super().__init__()
        self.d_out, self.num_heads, self.head_dim = d_out, num_heads, d_out // num_heads
        self.W_query = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_key = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_value = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.out_proj = nn.Linear(d_out, d_out)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("mask", torch.triu(torch.ones(BLOCK, BLOCK), diagonal=1))

    def forward(self, x: Tensor) -> Any:
        b, num_tokens, _ = x.shape
        keys, queries, values = self.W_key(x), self.W_query(x), self.W_value(x)
        keys = keys.view(b, num_tokens, self.num_heads, self.head_dim).transpose(1, 2)
        values = values.view(b, num_tokens, self.num_heads, self.head_dim).transpose(1, 2)
        queries = queries.view(b, num_tokens, self.num_heads, self.head_dim).transpose(1, 2)
        attn_scores = queries @ keys.transpose(2, 3)
        mask_bool = self.get_buffer("mask").bool()[:num_tokens, :num_tokens]
        attn_scores.masked_fill_(mask_bool, -torch.inf)
        attn_weights = torch.softmax(attn_scores / keys.shape[-1] ** 0.5, dim=-1)
        context_vec = (self.dropout(attn_weights) @ values).transpose(1, 2)
        return self.out_proj(context_vec.contiguous().view(b, num_tokens, self.d_out))


class Prepare(nn.Module):
    def __init__(self, d_model: int, heads: int, d_k: int, bias: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(d_model, heads * d_k, bias=bias)
        self.heads, self.d_k = heads, d_k

    def forward(self, x: Tensor) -> Any:
        return self.linear(x).view(*x.shape[:-1], self.heads, self.d_k)


class Labml(nn.Module):
    """labml.ai: sequence first, the softmax is over axis 1, arguments by keyword only."""

    def __init__(self, heads: int, d_model: int) -> None:
        super().__init__()
        self.d_k, self.heads = d_model // heads, heads
        self.query = Prepare(d_model, heads, self.d_k, bias=True)
        self.key = Prepare(d_model, heads, self.d_k, bias=True)
        self.value = Prepare(d_model, heads, self.d_k, bias=True)
        self.softmax = nn.Softmax(dim=1)
        self.output = nn.Linear(d_model, d_model)
        self.scale = 1 / math.sqrt(self.d_k)

    def forward(self, *, query: Tensor, key: Tensor, value: Tensor) -> Any:
        seq_len, batch_size, _ = query.shape
        query, key, value = self.query(query), self.key(key), self.value(value)
        scores = torch.einsum("ibhd,jbhd->ijbh", query, key) * self.scale
        x = torch.einsum("ijbh,jbhd->ibhd", self.softmax(scores), value)
        return self.output(x.reshape(seq_len, batch_size, -1))


def labml(attention: Any, x: Tensor) -> Any:
    turned = x.transpose(0, 1)
    return attention(query=turned, key=turned, value=turned).transpose(0, 1)


class VitPytorch(nn.Module):
    """lucidrains/vit-pytorch; newer versions have the norm inside."""

    def __init__(self, dim: int, heads: int, dim_head: int, norm: bool = False) -> None:
        super().__init__()
        inner, self.heads, self.scale = dim_head * heads, heads, dim_head**-0.5
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()
        self.attend = nn.Softmax(dim=-1)
        self.dropout = nn.Dropout(0.1)
        self.to_qkv = nn.Linear(dim, inner * 3, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, dim), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Any:
        qkv = self.to_qkv(self.norm(x)).chunk(3, dim=-1)
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in qkv)
        attn = self.dropout(self.attend(torch.matmul(q, k.transpose(-1, -2)) * self.scale))
        return self.to_out(rearrange(torch.matmul(attn, v), "b h n d -> b n (h d)"))


class CrossStyle(nn.Module):
    """lucidrains' perceiver: to_q and a packed to_kv, the heads in the batch."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(dim, dim * 2, bias=False)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        q, (k, v) = self.to_q(x), self.to_kv(x).chunk(2, dim=-1)
        q, k, v = (rearrange(t, "b n (h d) -> (b h) n d", h=self.heads) for t in (q, k, v))
        sim = torch.einsum("b i d, b j d -> b i j", q, k) * self.scale
        if mask is not None:
            allowed = repeat(mask, "b j -> (b h) 1 j", h=self.heads)
            sim.masked_fill_(~allowed, -torch.finfo(sim.dtype).max)
        out = torch.einsum("b i j, b j d -> b i d", sim.softmax(dim=-1), v)
        return self.to_out(rearrange(out, "(b h) n d -> b n (h d)", h=self.heads))


class Conv1D(nn.Module):
    """GPT-2's own layer: the weight is (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(0.2 * torch.randn(nx, nf))
        self.bias = nn.Parameter(0.1 * torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.reshape(-1, x.size(-1)), self.weight)
        return flat.view(*x.size()[:-1], self.nf)


class HuggingGPT(nn.Module):
    """The early pytorch-pretrained-bert: Conv1D, split_heads(k=True) gives transposed keys."""

    def __init__(self, nx: int, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.c_attn, self.c_proj = Conv1D(3 * nx, nx), Conv1D(nx, nx)
        self.register_buffer("bias", torch.tril(torch.ones(BLOCK, BLOCK))[None, None])

    def split_heads(self, x: Tensor, k: bool = False) -> Tensor:
        x = x.view(*x.size()[:-1], self.n_head, x.size(-1) // self.n_head)
        return x.permute(0, 2, 3, 1) if k else x.permute(0, 2, 1, 3)

    def forward(self, x: Tensor) -> Any:
        query, key, value = self.c_attn(x).split(x.size(-1), dim=2)
        query, key = self.split_heads(query), self.split_heads(key, k=True)
        w = torch.matmul(query, key) / math.sqrt(query.size(-1))
        n = w.size(-1)
        b = self.get_buffer("bias")[:, :, :n, :n]
        w = w * b - 1e10 * (1 - b)
        a = torch.matmul(nn.Softmax(dim=-1)(w), self.split_heads(value))
        a = a.permute(0, 2, 1, 3).contiguous()
        return self.c_proj(a.view(*a.size()[:-2], -1))


class Lens(nn.Module):
    """TransformerLens: a matrix for each head."""

    def __init__(self, d_model: int, n_heads: int, d_head: int, causal: bool = True) -> None:
        super().__init__()
        self.causal, self.d_head = causal, d_head
        for name in "QKV":
            self.register_parameter(f"W_{name}", self.drawn(n_heads, d_model, d_head))
            self.register_parameter(f"b_{name}", self.drawn(n_heads, d_head))
        self.W_O = self.drawn(n_heads, d_head, d_model)
        self.b_O = self.drawn(d_model)

    @staticmethod
    def drawn(*shape: int) -> nn.Parameter:
        return nn.Parameter(0.2 * torch.randn(*shape))

    def forward(self, normalized: Tensor) -> Any:
        q, k, v = (
            einsum(normalized, self.get_parameter(f"W_{name}"), "b p e, h e d -> b p h d")
            + self.get_parameter(f"b_{name}")
            for name in "QKV"
        )
        scores = einsum(q, k, "b i h d, b j h d -> b h i j") / self.d_head**0.5
        if self.causal:
            scores = scores.masked_fill(forbidden(normalized, causal=True), -1e5)
        z = einsum(v, scores.softmax(-1), "b j h d, b h i j -> b i h d")
        return einsum(z, self.W_O, "b i h d, h d e -> b i e") + self.b_O


class SummedHeads(nn.Module):
    """Each head writes to the residual stream by itself: the sum is what one output matrix does."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        size = width // heads
        self.heads = nn.ModuleList(
            nn.ModuleDict(
                {
                    "query": nn.Linear(width, size),
                    "key": nn.Linear(width, size),
                    "value": nn.Linear(width, size),
                    "output": nn.Linear(size, width, bias=False),
                }
            )
            for _ in range(heads)
        )

    def forward(self, x: Tensor) -> Any:
        total = torch.zeros_like(x)
        for head in self.heads:
            assert isinstance(head, nn.ModuleDict)
            q, k, v = head["query"](x), head["key"](x), head["value"](x)
            weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1)
            total = total + head["output"](weights @ v)
        return total


class ThreeLists(nn.Module):
    """A loop over three lists of per-head layers, and a concatenation."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        size = width // heads
        self.queries = nn.ModuleList(nn.Linear(width, size) for _ in range(heads))
        self.keys = nn.ModuleList(nn.Linear(width, size) for _ in range(heads))
        self.values = nn.ModuleList(nn.Linear(width, size) for _ in range(heads))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Any:
        outputs = []
        for to_q, to_k, to_v in zip(self.queries, self.keys, self.values, strict=True):
            q, k, v = to_q(x), to_k(x), to_v(x)
            outputs.append(torch.softmax(torch.bmm(q, k.mT) / math.sqrt(q.size(-1)), 2).bmm(v))
        return self.out(torch.cat(outputs, dim=2))


class Chunks(nn.Module):
    """One wide projection each; the heads are cut in a Python loop over columns."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Any:
        q, k, v = (w(x).chunk(self.heads, dim=-1) for w in (self.wq, self.wk, self.wv))
        done = [
            F.scaled_dot_product_attention(*(t.unsqueeze(1) for t in one)).squeeze(1)
            for one in zip(q, k, v, strict=True)
        ]
        return self.wo(torch.cat(done, -1))


class Fairseq(nn.Module):
    """fairseq: (t, b, c) inside, the query is scaled before the product."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, embed_dim // num_heads
        self.scaling = self.head_dim**-0.5
        self.k_proj = nn.Linear(embed_dim, embed_dim)
        self.v_proj = nn.Linear(embed_dim, embed_dim)
        self.q_proj = nn.Linear(embed_dim, embed_dim)
        self.out_proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, query: Tensor, key_padding_mask: Tensor | None = None) -> Any:
        x = query.transpose(0, 1)
        tgt, bsz, embed = x.size()
        q, k, v = self.q_proj(x) * self.scaling, self.k_proj(x), self.v_proj(x)
        q, k, v = (
            t.contiguous().view(tgt, bsz * self.num_heads, self.head_dim).transpose(0, 1)
            for t in (q, k, v)
        )
        attn = torch.bmm(q, k.transpose(1, 2))
        if key_padding_mask is not None:
            hidden = key_padding_mask.repeat_interleave(self.num_heads, 0).unsqueeze(1)
            attn = attn.masked_fill(hidden, torch.finfo(attn.dtype).min)
        attn = torch.bmm(F.softmax(attn, dim=-1, dtype=torch.float32).type_as(attn), v)
        attn = attn.transpose(0, 1).contiguous().view(tgt, bsz, embed)
        return self.out_proj(attn).transpose(0, 1), None


class Convolutions(nn.Module):
    """Speech and diffusion code: kernel size 1 on (b, e, n)."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Conv1d(channels, channels * 3, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Any:
        qkv = self.qkv(x.transpose(1, 2))
        bs, width, length = qkv.shape
        ch = width // (3 * self.heads)
        q, k, v = qkv.chunk(3, dim=1)
        scale = 1 / math.sqrt(math.sqrt(ch))  # on both sides, which is safer in half precision
        q, k = ((t * scale).view(bs * self.heads, ch, length) for t in (q, k))
        weight = torch.softmax(torch.einsum("bct,bcs->bts", q, k).float(), dim=-1).type(q.dtype)
        a = torch.einsum("bts,bcs->bct", weight, v.reshape(bs * self.heads, ch, length))
        return self.proj_out(a.reshape(bs, -1, length)).transpose(1, 2)


class Grouped(nn.Module):
    """Grouped heads in the ways that people write them."""

    def __init__(self, width: int, heads: int, groups: int, style: str, size: int = 8) -> None:
        super().__init__()
        self.heads, self.groups, self.size, self.style = heads, groups, size, style
        self.wq = nn.Linear(width, heads * size, bias=False)
        self.wk = nn.Linear(width, groups * size, bias=False)
        self.wv = nn.Linear(width, groups * size, bias=False)
        self.wo = nn.Linear(heads * size, width, bias=False)

    def forward(self, x: Tensor) -> Any:
        b, n, _ = x.shape
        q = self.wq(x).view(b, n, self.heads, self.size).transpose(1, 2)
        k = self.wk(x).view(b, n, self.groups, self.size).transpose(1, 2)
        v = self.wv(x).view(b, n, self.groups, self.size).transpose(1, 2)
        times = self.heads // self.groups
        if self.style == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        elif self.style == "einsum":
            q = q.reshape(b, self.groups, times, n, self.size)
            scores = torch.einsum("bkgid,bkjd->bkgij", q, k) / self.size**0.5
            scores = scores.masked_fill(forbidden(x, causal=True)[:, :, None], float("-inf"))
            y = torch.einsum("bkgij,bkjd->bkgid", scores.softmax(-1), v).flatten(1, 2)
        else:
            if self.style == "expand":
                k, v = (t[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2) for t in (k, v))
            else:
                k, v = (t.repeat_interleave(times, dim=1) for t in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(y.transpose(1, 2).flatten(2))


class PackedGroups(nn.Module):
    """litgpt and others: one matrix for the query heads, then the key heads, then the value heads."""

    def __init__(self, width: int, heads: int, groups: int) -> None:
        super().__init__()
        self.sizes = [heads * 8, groups * 8, groups * 8]
        self.qkv = nn.Linear(width, sum(self.sizes))
        self.proj = nn.Linear(heads * 8, width)

    def forward(self, x: Tensor) -> Any:
        parts = self.qkv(x).split(self.sizes, dim=-1)
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", d=8) for t in parts)
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.proj(rearrange(y, "b h n d -> b n (h d)"))


class Online(nn.Module):
    """Blocks of keys with a running maximum and sum, as flash attention does it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Any:
        packed = "b n (three h d) -> three b h n d"
        q, k, v = rearrange(self.in_proj(x), packed, three=3, h=self.heads)
        top = x.new_full((*q.shape[:-1], 1), float("-inf"))
        norm, total = torch.zeros_like(top), torch.zeros_like(q)
        for keys, values in zip(k.split(4, dim=2), v.split(4, dim=2), strict=True):
            scores = q @ keys.mT * q.shape[-1] ** -0.5
            new = torch.maximum(top, scores.amax(-1, keepdim=True))
            shrink, grown = (top - new).exp(), (scores - new).exp()
            norm = norm * shrink + grown.sum(-1, keepdim=True)
            total = total * shrink + grown @ values
            top = new
        return self.out_proj(rearrange(total / norm, "b h n d -> b n (h d)"))


class ByHand(nn.Module):
    """Four layers and a softmax that can be exchanged; for what concerns the scores."""

    def __init__(
        self,
        width: int = 32,
        heads: int = 4,
        scores: Callable[[Tensor, Tensor], Tensor] = lambda q, k: q @ k.mT * q.shape[-1] ** -0.5,
        softmax: Callable[[Tensor], Tensor] = lambda scores: scores.softmax(dim=-1),
        layer: Callable[[int, int], nn.Module] = nn.Linear,
    ) -> None:
        super().__init__()
        self.heads, self.scores, self.softmax = heads, scores, softmax
        self.fc_q, self.fc_k = layer(width, width), layer(width, width)
        self.fc_v, self.fc_o = layer(width, width), layer(width, width)

    def forward(self, x: Tensor) -> Any:
        q, k, v = (
            fc(x).unflatten(-1, (self.heads, -1)).movedim(2, 1)
            for fc in (self.fc_q, self.fc_k, self.fc_v)
        )
        return self.fc_o((self.softmax(self.scores(q, k)) @ v).movedim(1, 2).flatten(2))


class LowRank(nn.Linear):
    """A LoRA layer that was not merged."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.lora_a = nn.Parameter(torch.randn(4, inputs) / 4)
        self.lora_b = nn.Parameter(torch.randn(outputs, 4) / 4)

    def forward(self, x: Tensor) -> Tensor:
        low: Tensor = super().forward(x) + x @ self.lora_a.T @ self.lora_b.T
        return low


def normed(inputs: int, outputs: int) -> Any:
    return nn.utils.parametrizations.weight_norm(nn.Linear(inputs, outputs))


def stable(scores: Tensor) -> Tensor:
    grown = torch.exp(scores - scores.max(dim=-1, keepdim=True).values)
    return grown / grown.sum(dim=-1, keepdim=True)


def hard_causal(scores: Tensor) -> Tensor:
    n = scores.shape[-1]
    return torch.softmax(scores + torch.full((n, n), float("-inf")).triu(1).to(scores), dim=-1)


def half_frozen() -> Any:
    module = ByHand()
    for layer in (module.fc_q, module.fc_v):
        layer.requires_grad_(False)
    return module


def with_alibi(q: Tensor, k: Tensor) -> Tensor:
    n, heads = q.shape[2], q.shape[1]
    ago = (torch.arange(n)[:, None] - torch.arange(n)).abs().to(q.dtype)
    slopes = 2.0 ** -torch.arange(1, heads + 1, dtype=q.dtype)[:, None, None]
    return q @ k.mT / math.sqrt(q.shape[-1]) - slopes * ago


def soft_capped(q: Tensor, k: Tensor) -> Tensor:
    return 3.0 * torch.tanh(q @ k.mT * q.shape[-1] ** -0.5 / 3.0)


add("nanoGPT, flash", lambda: NanoGPT(32, 4), True, causal=True)
add(
    "nanoGPT, by hand, no bias, dropout",
    lambda: NanoGPT(48, 6, bias=False, flash=False, dropout=0.2),
    True,
    embed_dim=48,
    num_heads=6,
    causal=True,
)
add("nanoGPT, flash, float64", lambda: fp64(NanoGPT(32, 4)), True, causal=True)
add("nanoGPT, by hand, bfloat16", lambda: bf16(NanoGPT(32, 4, flash=False)), True, causal=True)
add("nanoGPT, as trained", lambda: shaken(NanoGPT(32, 4)), True, causal=True)
add("nanoGPT, eval, lambda", lambda: function(NanoGPT(32, 4)), True, causal=True)
add("nanoGPT, 768 wide", lambda: NanoGPT(768, 12), True, embed_dim=768, num_heads=12, causal=True)
add("lecture, list of heads", lambda: LectureHeads(4, 8), True, causal=True)
add("Annotated Transformer, bare", lambda: Annotated(4, 32), True)
add(
    "Annotated Transformer, eval, float64",
    lambda: fp64(Annotated(8, 64).eval()),
    True,
    embed_dim=64,
    num_heads=8,
)
add(
    "Annotated Transformer, padding",
    lambda: Holder(Annotated(4, 32), lambda a, x, mask: a(x, x, x, mask.unsqueeze(-2))),
    True,
    takes_mask=True,
)
add(
    "Annotated Transformer, subsequent mask",
    lambda: Holder(Annotated(4, 32), lambda a, x: a(x, x, x, ~forbidden(x, causal=True)[0])),
    True,
    causal=True,
)
add("UvA tutorial, packed (h 3 d)", lambda: UvA(32, 4), True)
add("UvA tutorial, padding", lambda: UvA(32, 4), True, takes_mask=True)
add("d2l", lambda: Holder(D2L(32, 4), lambda a, x: a(x, x, x, None)), True)
add("Raschka", lambda: Raschka(32, 32, 4), True, causal=True)
add(
    "Raschka, qkv_bias, eval",
    lambda: Raschka(48, 48, 3, True).eval(),
    True,
    embed_dim=48,
    num_heads=3,
    causal=True,
)
add("labml, sequence first", lambda: Holder(Labml(4, 32), labml))
add("vit-pytorch", lambda: VitPytorch(32, 4, 8), True)
add("vit-pytorch, wider inside", lambda: VitPytorch(32, 4, 16), True)
add("vit-pytorch, norm inside", lambda: VitPytorch(32, 4, 8, norm=True))
add("perceiver, to_q and to_kv", lambda: CrossStyle(32, 4), True)
add("perceiver, padding", lambda: CrossStyle(32, 4), True, takes_mask=True)
add("Conv1D, transposed keys", lambda: HuggingGPT(32, 4), True, causal=True)
add("TransformerLens", lambda: Lens(32, 4, 8), True, causal=True)
add("TransformerLens, narrow heads", lambda: Lens(32, 4, 4, causal=False))
add("heads that add to the output, one matrix each", lambda: SummedHeads(32, 4))
add("three lists of layers", lambda: ThreeLists(32, 4), True)
add("columns cut in a loop", lambda: Chunks(32, 4), True)
add("fairseq", lambda: Fairseq(32, 4), True)
add(
    "fairseq, padding",
    lambda: Holder(Fairseq(32, 4), lambda a, x, mask: a(x, ~mask)),
    True,
    takes_mask=True,
)
add("convolutions of size 1", lambda: Convolutions(32, 4))
for way in ("sdpa", "einsum", "expand", "repeat_interleave"):
    add(f"grouped heads, {way}", partial(Grouped, 32, 4, 2, way), True, causal=True, num_kv_heads=2)
add(
    "one key/value head, heads wider than the tokens",
    lambda: Grouped(32, 6, 1, "expand", size=16),
    True,
    num_heads=6,
    causal=True,
    num_kv_heads=1,
)
add("packed q, k, v of other sizes", lambda: PackedGroups(32, 4, 2), True, num_kv_heads=2)
add("blocks of keys, running softmax", lambda: Online(32, 4), True)
add("softmax by hand", lambda: shaken(ByHand(softmax=stable), 9.0), True)
add("minus infinity added", lambda: ByHand(softmax=hard_causal), True, causal=True)
add("scale 1 / d", lambda: ByHand(scores=lambda q, k: q @ k.mT / 8), True, scale=1 / 8)
add("softcap", lambda: shaken(ByHand(scores=soft_capped)), True, softcap=3.0)
add("ALiBi, both ways", lambda: ByHand(scores=with_alibi), False)
add("weight norm on the layers", lambda: ByHand(layer=normed))
add("LoRA, not merged", lambda: ByHand(layer=LowRank))
add("half of the layers frozen", half_frozen, True)
add(
    "checkpointed",
    lambda: Holder(NanoGPT(32, 4), lambda a, x: checkpoint(a, x, use_reentrant=False)),
    True,
    causal=True,
)
add(
    "answers with a dict of more in a tuple",
    lambda: Holder(Chunks(32, 4), lambda a, x: (a(x), {"cache": None})),
    True,
)


# Functions and objects that are not modules


def matrices(embed_dim: int = 32, inner: int = 32, bias: bool = False) -> dict[str, Tensor]:
    """Weights as ``diagnose`` takes them; the same ones at every call."""
    draw = torch.Generator().manual_seed(1)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("q", "k", "v"), (inner, embed_dim))
    shapes["out"] = (embed_dim, inner)
    if bias:
        shapes |= {f"{name}_bias": (inner,) for name in ("q", "k", "v")}
        shapes["out_bias"] = (embed_dim,)
    return {name: torch.randn(shape, generator=draw) * 0.3 for name, shape in shapes.items()}


def functional(x: Tensor, w: dict[str, Tensor], heads: int = 4, causal: bool = False) -> Tensor:
    """Plain matrices, and nothing of torch.nn."""
    b, n, _ = x.shape
    q, k, v = (
        (x @ w[name].T + w.get(f"{name}_bias", torch.zeros(()))).view(b, n, heads, -1)
        for name in "qkv"
    )
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
    if causal:
        scores = torch.where(forbidden(x, causal=True), -torch.inf, scores)
    mixed = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).reshape(b, n, -1)
    return mixed @ w["out"].T + w.get("out_bias", torch.zeros(()))


class Plain:
    """An object with matrices; callable, and with a method that does the same."""

    def __init__(self, bias: bool = False) -> None:
        self.w = matrices(bias=bias)

    def __call__(self, x: Tensor) -> Tensor:
        return functional(x, self.w)

    def attend(self, x: Tensor) -> Tensor:
        return functional(x, self.w, causal=True)


def row_vectors() -> Any:
    """Matrices of shape (in, out), as in JAX; a head at a time through vmap."""
    w = {name: matrix.T.contiguous() for name, matrix in matrices().items()}

    def one_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT / 8**0.5, dim=-1) @ v

    def attend(x: Tensor) -> Tensor:
        q, k, v = (rearrange(x @ w[name], "b n (h d) -> h b n d", h=4) for name in "qkv")
        return rearrange(torch.vmap(one_head)(q, k, v), "h b n d -> b n (h d)") @ w["out"]

    return attend


def packed_closure() -> Any:
    wqkv, wo = torch.randn(96, 32) * 0.3, torch.randn(32, 32) * 0.3

    def attend(x: Tensor) -> Tensor:
        q, k, v = F.linear(x, wqkv).view(*x.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4)
        return F.linear(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), wo)

    return attend


class Outer(nn.Module):
    """A model whose method is handed over."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 32)
        self.attention = NanoGPT(32, 4)
        self.head = nn.Linear(32, 10)

    def attend(self, x: Tensor) -> Any:
        return self.attention(x)

    def forward(self, tokens: Tensor) -> Any:
        return self.head(self.attention(self.embedding(tokens)))


GIVEN: dict[str, Any] = {"weights": matrices()}
BIASED: dict[str, Any] = {"weights": matrices(bias=True)}

add("closure over matrices", lambda: partial(functional, w=matrices()))
add("closure over matrices, weights given", lambda: Plain().__call__, True, **GIVEN)
add("callable object", Plain)
add("callable object, weights given", lambda: Plain(bias=True), True, **BIASED)
add("bound method, weights given", lambda: Plain().attend, True, causal=True, **GIVEN)
add("bound method", lambda: Plain().attend, False, causal=True, weights=None)
add("partial, weights given", lambda: partial(functional, w=matrices()), True, **GIVEN)
add("(in, out) matrices and vmap", row_vectors)
add("(in, out) matrices and vmap, weights given", row_vectors, True, **GIVEN)
add("packed matrix in a closure", packed_closure)
add(
    "heads that are wider together, weights given",
    lambda: partial(functional, w=matrices(32, 48)),
    True,
    weights=matrices(32, 48),
)
add("method of a model", lambda: Outer().eval().attend, causal=True)
add("forward of a module", lambda: NanoGPT(32, 4).forward, causal=True)
add("a module, weights=None", lambda: NanoGPT(32, 4), False, causal=True, weights=None)
add("torch.no_grad", lambda: torch.no_grad()(Plain()), True, **GIVEN)
add("torch.inference_mode", lambda: torch.inference_mode()(as_function(UvA(32, 4))))


# The book's own


def own(**options: Any) -> MultiHeadAttention:
    return MultiHeadAttention(32, 4, **options)


def own_padded(attention: Any, x: Tensor, mask: Tensor) -> Any:
    return attention(x, mask=mask[:, None, None, :])


OWN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "defaults": ({}, {}),
    "causal, dropout": ({"causal": True, "dropout": 0.1}, CAUSAL),
    "window": ({"causal": True, "window": 3}, {"causal": True, "window": 3}),
    "rotary": ({"causal": True, "rotary": RotaryEmbedding(8)}, TURNED),
    "rotary, neighbours": ({"rotary": NEIGHBOURS}, {"rotary": NEIGHBOURS}),
    "rotary, partial": ({"causal": True, "rotary": RotaryEmbedding(4)}, PARTLY),
    "qk_norm": ({"qk_norm": RMS}, {"qk_norm": RMS}),
    "softcap": ({"softcap": 1.5}, {"softcap": 1.5}),
    "grouped": ({"num_kv_heads": 2, "bias": False}, {"num_kv_heads": 2}),
    "one key/value head, wide": ({"num_kv_heads": 1, "head_dim": 16}, {"num_kv_heads": 1}),
    "scale": ({"scale": 1.0}, {"scale": 1.0}),
    "no bias, but on the output": ({"bias": False, "out_bias": True}, {}),
    "reference backend": ({"backend": "reference"}, {}),
    "sdpa backend": ({"backend": "sdpa", "causal": True}, CAUSAL),
    "float64": ({"dtype": FP64}, {}),
    "bfloat16": ({"dtype": BF16, "num_kv_heads": 2}, {"num_kv_heads": 2}),
    "everything": (
        {
            "num_kv_heads": 2,
            "causal": True,
            "window": 4,
            "rotary": RotaryEmbedding(8),
            "qk_norm": RMS,
            "softcap": 5.0,
            "scale": 0.5,
        },
        {**GROUPED, "window": 4, "qk_norm": RMS, "softcap": 5.0, "scale": 0.5},
    ),
}
for label, (own_options, told) in OWN.items():
    add(f"mha_lib: {label}", partial(own, **own_options), True, **told)
add("mha_lib: sinks", lambda: own(sinks=True), False)
add("mha_lib: padding", lambda: Holder(own(), own_padded), True, takes_mask=True)
add("mha_lib: simple", lambda: SimpleMultiHeadAttention(48, 3), True, embed_dim=48, num_heads=3)
add(
    "mha_lib: simple, causal, no bias",
    lambda: SimpleMultiHeadAttention(32, 4, bias=False, causal=True),
    True,
    causal=True,
)
add("mha_lib: simple, float64, lambda", lambda: function(fp64(SimpleMultiHeadAttention(32, 4))))
add("mha_lib: split", lambda: SplitMultiHeadAttention(32, 4), True)
add(
    "mha_lib: split, causal",
    lambda: SplitMultiHeadAttention(32, 4, causal=True).eval(),
    True,
    causal=True,
)
