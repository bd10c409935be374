"""Attention of other libraries as ``MultiHeadAttention``, and attention of this one in models of transformers.

Built in chapter 6 of the book.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from mha_lib._checks import (
    check_bool,
    check_causal,
    check_config,
    check_heads,
    check_keys,
    check_known,
    check_layers,
    check_matrix,
    check_name,
    check_packed,
    check_parts,
    check_permutation,
    check_plain,
    check_rope,
    check_rotary_given,
    check_same_size,
    check_source,
    check_thirds,
    check_torch_keys,
    check_type,
)
from mha_lib.attention import attention
from mha_lib.multihead import MultiHeadAttention
from mha_lib.reference import AttentionOutput
from mha_lib.rotary import RotaryEmbedding
from mha_lib.simple import SimpleMultiHeadAttention
from mha_lib.split import SplitMultiHeadAttention


class Layout(NamedTuple):
    """What a library calls the layers of its attention.

    Attributes:
        layers: Its name of each layer and ours, ``"qkv_proj"`` for queries, keys and values in one.
        biased: Our names of the layers that always have a bias.
        beside: Keys under the same prefix that are no part of attention.
        transposed: Whether matrices are stored ``(in, out)``.
    """

    layers: dict[str, str]
    biased: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    transposed: bool = False


SEPARATE = ("q_proj", "k_proj", "v_proj", "out_proj")
BERT = Layout(
    dict(zip(("self.query", "self.key", "self.value", "output.dense"), SEPARATE, strict=True)),
    biased=SEPARATE,
    beside=tuple(f"output.LayerNorm.{name}" for name in ("weight", "bias", "gamma", "beta")),
)
GPT2 = Layout(
    {"c_attn": "qkv_proj", "c_proj": "out_proj"},
    biased=("qkv_proj", "out_proj"),
    beside=("bias", "masked_bias"),
    transposed=True,
)
LLAMA = Layout(
    dict(zip(("q_proj", "k_proj", "v_proj", "o_proj"), SEPARATE, strict=True)),
    beside=("rotary_emb.inv_freq",),
)
VIT = (
    LLAMA._replace(biased=("out_proj",), beside=()),
    Layout(
        {
            **{f"attention.{name}": f"{name[0]}_proj" for name in ("query", "key", "value")},
            "output.dense": "out_proj",
        },
        biased=("out_proj",),
    ),
    Layout({"qkv": "qkv_proj", "proj": "out_proj"}, biased=("out_proj",)),
)


def from_torch(module: nn.MultiheadAttention) -> MultiHeadAttention:
    """Copy torch's module; the mask sense, the order of axes and the weights' average stay torch's affair.

    Args:
        module: Of any widths, with bias or without. The result takes batches first, masks with True where attention is
            allowed, and returns weights per head.

    Returns:
        The same function with copies of the weights.

    Raises:
        TypeError: ``module`` is no ``torch.nn.MultiheadAttention``.
        ValueError: It has ``add_bias_kv`` or ``add_zero_attn``, or its tensors do not fit together.

    Example:
        >>> theirs = nn.MultiheadAttention(8, 2, batch_first=True)
        >>> x = torch.randn(1, 3, 8)
        >>> torch.allclose(from_torch(theirs)(x), theirs(x, x, x)[0], atol=1e-6)
        True
    """
    check_type("module", module, nn.MultiheadAttention)
    check_plain("module", add_bias_kv=module.bias_k is not None, add_zero_attn=module.add_zero_attn)
    check_torch_keys(list(module.state_dict()), module.in_proj_weight is not None)
    state: dict[str, _Named] = {}
    for key, tensor in module.state_dict().items():
        if key.startswith("in_proj_"):
            state |= _unpacked(key.removeprefix("in_proj_"), _Named(key, tensor))
        else:
            state[key.replace("_proj_weight", "_proj.weight")] = _Named(key, tensor)
    facts = _Facts(dropout=module.dropout, training=module.training)
    return _assembled(state, module.num_heads, facts, kdim=module.kdim, vdim=module.vdim)


def to_torch(attention: MultiHeadAttention) -> nn.MultiheadAttention:
    """Copy into torch's module.

    Args:
        attention: With a head for every key and value, ``embed_dim = num_heads * head_dim``, and none of the options
            that torch's module does not have.

    Returns:
        With ``batch_first=True``, the same function with copies of the weights.

    Raises:
        TypeError: ``attention`` is no :class:`mha_lib.MultiHeadAttention`.
        ValueError: It has an option that torch's module does not have; a causal mask is an argument of each call there.

    Example:
        >>> ours = MultiHeadAttention(8, 2)
        >>> x = torch.randn(1, 3, 8)
        >>> torch.allclose(to_torch(ours)(x, x, x)[0], ours(x), atol=1e-6)
        True
    """
    check_type("attention", attention, MultiHeadAttention)
    state = attention.state_dict()
    default = attention.head_dim**-0.5
    check_plain(
        "attention",
        num_kv_heads=attention.num_kv_heads != attention.num_heads,
        head_dim=attention.num_heads * attention.head_dim != attention.embed_dim,
        causal=attention.causal,
        window=attention.window is not None,
        rotary=attention.rotary is not None,
        qk_norm=attention.q_norm is not None,
        scale=attention.scale not in (None, default),
        softcap=attention.softcap is not None,
        sinks=attention.sinks is not None,
        out_bias=("q_proj.bias" in state) != ("out_proj.bias" in state),
    )
    biased = SEPARATE if "q_proj.bias" in state else ()
    check_keys(state, "", list(SEPARATE), list(biased), ())
    named = {key: _Named(key, tensor) for key, tensor in state.items()}
    sizes = check_layers(named, attention.num_heads, attention.kdim, attention.vdim)
    check_same_size("head_dim", sizes["head_dim"], attention.head_dim)
    with torch.device("meta"):
        module = nn.MultiheadAttention(
            attention.embed_dim,
            attention.num_heads,
            dropout=attention.dropout,
            bias="q_proj.bias" in state,
            kdim=attention.kdim,
            vdim=attention.vdim,
            batch_first=True,
        )
    packed = {}
    if "q_proj.bias" in state:
        packed["in_proj_bias"] = torch.cat([state.pop(f"{part}_proj.bias") for part in "qkv"])
    weights = [state.pop(f"{part}_proj.weight") for part in "qkv"]
    if module.in_proj_weight is not None:
        packed["in_proj_weight"] = torch.cat(weights)
    else:
        packed |= {f"{part}_proj_weight": w for part, w in zip("qkv", weights, strict=True)}
    _fill(module, {**state, **packed})
    return module.train(attention.training)


def from_simple(module: SimpleMultiHeadAttention) -> MultiHeadAttention:
    """Copy the module of chapter 2.

    Args:
        module: A :class:`mha_lib.SimpleMultiHeadAttention`.

    Returns:
        The same function with copies of the weights.

    Raises:
        TypeError: ``module`` is of another type.
        ValueError: Its tensors do not fit together.

    Example:
        >>> simple = SimpleMultiHeadAttention(8, 2, causal=True)
        >>> x = torch.randn(1, 3, 8)
        >>> torch.allclose(from_simple(simple)(x), simple(x), atol=1e-6)
        True
    """
    check_type("module", module, SimpleMultiHeadAttention)
    layout = Layout({name: name for name in ("qkv_proj", "out_proj")})
    state = _read(module.state_dict(), "", layout)
    facts = _Facts(training=module.training)
    return _assembled(state, module.num_heads, facts, causal=module.causal)


def from_split(module: SplitMultiHeadAttention) -> MultiHeadAttention:
    """Copy the module of chapter 3.

    Args:
        module: A :class:`mha_lib.SplitMultiHeadAttention`.

    Returns:
        The same function with copies of the weights.

    Raises:
        TypeError: ``module`` is of another type.
        ValueError: Only some of its layers have a bias, or its tensors do not fit together.

    Example:
        >>> split = SplitMultiHeadAttention(8, 2)
        >>> x = torch.randn(1, 3, 8)
        >>> torch.allclose(from_split(split)(x), split(x), atol=1e-6)
        True
    """
    check_type("module", module, SplitMultiHeadAttention)
    return from_simple(module.fuse())


def from_bert(
    source: nn.Module | Mapping[str, Tensor], prefix: str = "", *, num_heads: int | None = None
) -> MultiHeadAttention:
    """Copy the attention of BERT, RoBERTa or ELECTRA, without the residual and the norm that follow it.

    Args:
        source: A module of transformers, or a state dict.
        prefix: What stands before ``self.query.weight`` in its names, such as ``"encoder.layer.0.attention"``.
        num_heads: Number of heads, ``h``; read from a module of transformers, needed for a state dict. A state dict
            holds weights alone: that nothing else is special (a scale, cross-attention) is up to you.

    Returns:
        The same function with copies of the weights.

    Raises:
        TypeError: ``source`` is neither a module nor a mapping, or holds something else than floating tensors.
        ValueError: Keys are missing or left over, shapes do not fit, or the module computes something else.

    Source: Devlin et al., "BERT" (2019); names as in transformers.

    Example:
        >>> names = ["self.query", "self.key", "self.value", "output.dense"]
        >>> state = {f"layer.{name}.weight": torch.randn(8, 8) for name in names}
        >>> state |= {f"layer.{name}.bias": torch.randn(8) for name in names}
        >>> from_bert(state, "layer", num_heads=2)(torch.randn(1, 3, 8)).shape
        torch.Size([1, 3, 8])
    """
    facts = _facts(source, prefix, ("bert", "roberta", "camembert", "xlm-roberta", "electra"), BERT)
    causal = facts.get("is_decoder", False)
    check_causal(facts.is_causal or not causal)
    return _assembled(_read(source, prefix, BERT), num_heads, facts, causal=causal)


def from_gpt2(
    source: nn.Module | Mapping[str, Tensor], prefix: str = "", *, num_heads: int | None = None
) -> MultiHeadAttention:
    """Copy the attention of GPT-2, whose matrices are stored transposed; the result is causal.

    Args:
        source: A module of transformers, or a state dict.
        prefix: What stands before ``c_attn.weight`` in its names, such as ``"h.0.attn"``.
        num_heads: Number of heads, ``h``; read from a module of transformers, needed for a state dict. A state dict
            holds weights alone: that nothing else is special (a scale, cross-attention) is up to you.

    Returns:
        The same function with copies of the weights.

    Raises:
        TypeError: ``source`` is neither a module nor a mapping, or holds something else than floating tensors.
        ValueError: Keys are missing or left over, shapes do not fit, or the module computes something else.

    Source: Radford et al., "Language models are unsupervised multitask learners" (2019); names as in transformers.

    Example:
        >>> state = {"c_attn.weight": torch.randn(8, 24), "c_attn.bias": torch.randn(24)}
        >>> state |= {"c_proj.weight": torch.randn(8, 8), "c_proj.bias": torch.randn(8)}
        >>> from_gpt2(state, num_heads=2)(torch.randn(1, 3, 8)).shape
        torch.Size([1, 3, 8])
    """
    facts = _facts(source, prefix, ("gpt2",), GPT2)
    check_causal(facts.is_causal)
    return _assembled(_read(source, prefix, GPT2), num_heads, facts, causal=True)


def from_vit(
    source: nn.Module | Mapping[str, Tensor], prefix: str = "", *, num_heads: int | None = None
) -> MultiHeadAttention:
    """Copy the attention of a Vision Transformer: ViT, DeiT and DINOv2 of transformers, or timm's ``Attention``.

    Args:
        source: A module, or a state dict. The layouts of transformers 4 (``attention.query``) and 5 (``q_proj``) and
            of timm (``qkv``) are told by their names.
        prefix: What stands before those names, such as ``"layers.0.attention"`` or ``"blocks.0.attn"``.
        num_heads: Number of heads, ``h``; read from a module, needed for a state dict. A state dict holds weights
            alone: that nothing else is special, such as a norm of queries, is up to you.

    Returns:
        The same function with copies of the weights.

    Raises:
        TypeError: ``source`` is neither a module nor a mapping, or holds something else than floating tensors.
        ValueError: Keys are missing or left over, shapes do not fit, or the module computes something else.

    Source: Dosovitskiy et al., "An image is worth 16x16 words" (2020); names as in transformers and timm.

    Example:
        >>> state = {"blocks.0.attn.qkv.weight": torch.randn(24, 8)}
        >>> state["blocks.0.attn.proj.weight"] = torch.randn(8, 8)
        >>> state["blocks.0.attn.proj.bias"] = torch.randn(8)
        >>> from_vit(state, "blocks.0.attn", num_heads=2)(torch.randn(1, 3, 8)).shape
        torch.Size([1, 3, 8])
    """
    facts = _facts(source, prefix, ("vit", "deit", "dinov2", "timm.Attention"), *VIT)
    return _assembled(_read(source, prefix, *VIT), num_heads, facts)


def from_llama(
    source: nn.Module | Mapping[str, Tensor],
    prefix: str = "",
    *,
    num_heads: int | None = None,
    rotary: nn.Module | None = None,
) -> MultiHeadAttention:
    """Copy the attention of Llama, Mistral, Mixtral or Qwen2: grouped heads, rotary positions; the result is causal.

    Args:
        source: A module of transformers, or a state dict in its layout, where the two features that turn together are
            half a head apart.
        prefix: What stands before ``q_proj.weight`` in its names, such as ``"layers.0.self_attn"``.
        num_heads: Number of query heads, ``h``; read from a module of transformers, needed for a state dict. The number
            of key/value heads follows from the shapes.
        rotary: The rotary positions, copied; made by :func:`rotary_from_config` for a module of transformers, needed
            for a state dict, which does not tell a window or a scale either.

    Returns:
        The same function with copies of the weights.

    Raises:
        TypeError: ``source`` is neither a module nor a mapping, or holds something else than floating tensors.
        ValueError: Keys are missing or left over, shapes do not fit, or the module computes something else.

    Source: Touvron et al., "LLaMA" (2023); names as in transformers.

    Example:
        >>> widths = {"q": 8, "k": 4, "v": 4, "o": 8}
        >>> state = {f"{name}_proj.weight": torch.randn(width, 8) for name, width in widths.items()}
        >>> attention = from_llama(state, num_heads=2, rotary=RotaryEmbedding(4))
        >>> attention.num_kv_heads
        1
    """
    facts = _facts(source, prefix, ("llama", "mistral", "mixtral", "qwen2"), LLAMA)
    check_causal(facts.is_causal or facts.window is None)
    check_rotary_given(rotary, facts.config)
    found = rotary_from_config(facts.config) if rotary is None else copy.deepcopy(rotary)
    result = _assembled(
        _read(source, prefix, LLAMA),
        num_heads,
        facts,
        causal=facts.is_causal,
        window=facts.window,
        rotary=found,
    )
    if isinstance(found, RotaryEmbedding) and rotary is None:
        check_same_size("rotary features", result.head_dim, found.dim)
    return result


def rotary_from_config(config: Any) -> RotaryEmbedding:
    """The rotary positions that a config of transformers describes.

    Args:
        config: A config of transformers, or a mapping such as the content of ``config.json``. The types ``default``,
            ``linear`` and ``llama3`` of scaling are known, and ``partial_rotary_factor``.

    Returns:
        For pairs that are half a head apart; whether the model has these is not in its config.

    Raises:
        TypeError: ``config`` is neither, or a number in it is none.
        ValueError: The config scales in a way that is not known, or lacks a number.

    Source: Su et al., "RoFormer" (2021), section 3.2.2; Dubey et al., "The Llama 3 herd of models" (2024).

    Example:
        >>> config = {"hidden_size": 64, "num_attention_heads": 4, "rope_theta": 500000.0}
        >>> rotary_from_config(config)
        RotaryEmbedding(dim=16, base=500000.0, interleaved=False)
    """
    head_dim, rope = check_config(config)
    dim, base = int(head_dim * rope.pop("partial_rotary_factor")), rope.pop("rope_theta")
    kind, factor, low, high, length = check_rope(rope)
    if kind == "default":
        return RotaryEmbedding(dim, base=base)
    exponents = torch.arange(0, dim, 2, device="cpu", dtype=torch.float64) / dim
    frequencies = base**-exponents
    if kind == "linear":
        return RotaryEmbedding(dim, base=base, frequencies=frequencies / factor)
    turns = length * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return RotaryEmbedding(dim, base=base, frequencies=frequencies * (kept + (1 - kept) / factor))


def permute_rotary(
    rows: Tensor, head_dim: int, *, interleaved: bool, rotary_dim: int | None = None
) -> Tensor:
    """Reorder the features of each head from one rotary layout to the other.

    A projection of queries and one of keys, both permuted, with ``RotaryEmbedding(interleaved=True)`` give the scores
    that the unpermuted ones give with ``interleaved=False``.

    Args:
        rows: Weight ``(h d, e)`` or bias ``(h d,)`` of a projection of queries or keys.
        head_dim: Features of one head, ``d``.
        interleaved: True leads from pairs half a head apart to neighbours, False back.
        rotary_dim: How many features of a head turn; all if None.

    Returns:
        Shape ``(h d, e)`` or ``(h d,)``, as ``rows``, in the other order.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: ``head_dim`` does not divide the rows, or ``rotary_dim`` is odd or larger.

    Example:
        >>> permute_rotary(torch.arange(4.0), 4, interleaved=True)
        tensor([0., 2., 1., 3.])
    """
    turning = check_permutation(rows, head_dim, rotary_dim)
    patterns = ["h (two d) ...", "h (d two) ..."]
    before, after = patterns if check_bool("interleaved", interleaved) else reversed(patterns)
    heads = rearrange(rows, "(h d) ... -> h d ...", d=head_dim)
    turned = rearrange(heads[:, :turning], f"{before} -> {after}", two=2)
    return rearrange(torch.cat([turned, heads[:, turning:]], dim=1), "h d ... -> (h d) ...")


def register_transformers(name: str = "mha_lib") -> None:
    """Let models of transformers compute their attention with :func:`mha_lib.attention`.

    Afterwards ``attn_implementation=name`` works in every model that looks its attention up by name. Such a model gets
    the additive mask that eager attention gets, so that its numbers are eager's, in padded rows too (but in float16,
    where the mask's least number is not far from the scores, not there). Weights are returned before dropout.

    Args:
        name: What to register it as.

    Raises:
        TypeError: ``name`` is no string.
        ValueError: ``name`` is empty, or transformers uses it for something else.
        ImportError: transformers is not installed.

    Example:
        >>> register_transformers()  # afterwards model.set_attn_implementation("mha_lib") works
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    check_name(name, ALL_ATTENTION_FUNCTIONS, _attend_for_transformers)
    ALL_ATTENTION_FUNCTIONS.register(name, _attend_for_transformers)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, eager_mask)


def _attend_for_transformers(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    indices: Tensor | None = None,
    block_indices: Tensor | None = None,
    output_attentions: bool = False,
    **more: Any,
) -> tuple[Tensor, Tensor | None]:
    """The signature of transformers: heads in, ``(b, i, h, d)`` out; what eager attention ignores is ignored."""
    keys = key.shape[-2]
    if block_indices is not None:
        attention_mask = _in_blocks(module, block_indices, attention_mask, query, keys, **more)
    mask, bias = _mask_and_bias(query, keys, attention_mask, position_bias, indices)
    if sinks is not None:
        key, value = (torch.cat([x, torch.zeros_like(x[..., :1, :])], dim=-2) for x in (key, value))
        bias = query.new_zeros(1, 1, 1, keys) if bias is None else bias
        bias = torch.cat([bias.expand(*sinks.shape[:-1], -1), sinks.to(bias.dtype)], dim=-1)
    attended = attention(
        query,
        key,
        value,
        mask=mask,
        bias=bias,
        scale=scaling,
        softcap=softcap,
        sinks=s_aux,
        dropout_p=dropout if module.training else 0.0,
        return_weights=bool(output_attentions),
    )
    output, weights = attended if isinstance(attended, AttentionOutput) else (attended, None)
    output = rearrange(output, "b h i d -> b i h d").contiguous()
    return output, None if weights is None else weights[..., :keys]


def _mask_and_bias(
    query: Tensor,
    keys: int,
    attention_mask: Tensor | None,
    position_bias: Tensor | None,
    indices: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """What transformers adds to the scores; ``indices`` names the keys that a query may see, ``(b, i, chosen)``."""
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        mask, bias = attention_mask, position_bias
    elif attention_mask is None or position_bias is None:
        mask, bias = None, position_bias if attention_mask is None else attention_mask
    else:
        mask, bias = None, attention_mask + position_bias
    if indices is not None:
        left = indices.new_ones(*indices.shape[:-1], keys, dtype=torch.bool)
        left = rearrange(left.scatter(-1, indices.long(), False), "b i j -> b 1 i j")
        bias = query.new_zeros(1, 1, 1, keys) if bias is None else bias
        bias = bias.masked_fill(left, torch.finfo(bias.dtype).min)
    return mask, bias


def _in_blocks(
    module: Any,
    block_indices: Tensor,
    attention_mask: Tensor | None,
    query: Tensor,
    keys: int,
    *,
    position_ids: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """The mask of a module that chooses blocks of keys; it has a method for that, which eager attention uses too."""
    if position_ids is None:
        position_ids = torch.arange(keys - query.shape[-2], keys, device=query.device)[None]
    mask: Tensor = module.indexer.build_block_mask(
        block_indices, attention_mask, keys, query.dtype, query.device, position_ids
    )
    return mask


class _Facts(NamedTuple):
    """What a module tells besides its weights; a state dict tells nothing.

    Attributes:
        config: The config of transformers, if there is one.
        num_heads: Number of query heads, if known.
        head_dim: Features of one head, if known.
        scale: Factor of the scores, if known.
        window: Keys that a query sees, if limited.
        dropout: Probability with which a weight is dropped.
        training: Whether dropout acts.
    """

    config: Any = None
    num_heads: int | None = None
    head_dim: int | None = None
    scale: float | None = None
    window: int | None = None
    dropout: float = 0.0
    training: bool = True

    def get(self, name: str, default: Any) -> Any:
        """An entry of the config."""
        return getattr(self.config, name, default)

    @property
    def is_causal(self) -> bool:
        """Whether the config, if there is one, leaves a causal model causal."""
        return bool(self.get("is_causal", True))


def _facts(source: Any, prefix: str, types: tuple[str, ...], *layouts: Layout) -> _Facts:
    """What the modules at ``prefix`` know of themselves; models of other types are refused."""
    if not isinstance(source, nn.Module):
        return _Facts()
    _read_source(source, prefix, layouts)
    attention = source.get_submodule(prefix.rstrip("."))
    parts = list(attention.modules())

    def first(*names: str) -> Any:
        found = (getattr(part, name, None) for name in names for part in parts)
        return next((value for value in found if value is not None), None)

    config = first("config") or getattr(source, "config", None)
    package, kind = type(attention).__module__.split(".")[0], type(attention).__name__
    own_type = f"{package}.{kind}" if package == "timm" else kind
    check_known(getattr(config, "model_type", None) or own_type, config, types)
    crosses = first("is_cross_attention") or any("Cross" in type(part).__name__ for part in parts)
    check_plain("source", cross_attention=bool(crosses))
    check_parts(
        [name for name, part in attention.named_modules() if _is_strange(name, part, layouts)]
    )
    window = first("sliding_window")
    if window is None and getattr(config, "model_type", None) in ("mistral", "mixtral"):
        window = getattr(config, "sliding_window", None)
    dropout = first("attention_dropout", "attn_dropout", "attn_drop", "dropout")
    return _Facts(
        config,
        first("num_heads", "num_attention_heads") or getattr(config, "num_attention_heads", None),
        first("head_dim", "attention_head_size"),
        first("scaling", "scale"),
        window,
        getattr(dropout, "p", dropout) or 0.0,
        attention.training,
    )


def _is_strange(name: str, part: nn.Module, layouts: tuple[Layout, ...]) -> bool:
    """Whether a module without children is neither a layer of a layout, nor beside it, nor dropout."""
    if next(part.children(), None) is not None or isinstance(part, nn.Dropout | nn.Identity):
        return False
    layers = {layer for layout in layouts for layer in layout.layers}
    beside = {key.rpartition(".")[0] for layout in layouts for key in layout.beside}
    return not any(name == known or name.endswith(f".{known}") for known in layers | beside - {""})


class _Named(NamedTuple):
    """A tensor and the key it stood at, for messages."""

    key: str
    tensor: Tensor


def _read_source(
    source: Any, prefix: str, layouts: tuple[Layout, ...]
) -> tuple[dict[str, Tensor], str]:
    """What stands under the prefix, without it, and the prefix with its dot."""
    return check_source(source, prefix, [next(iter(layout.layers)) for layout in layouts])


def _read(source: Any, prefix: str, *layouts: Layout) -> dict[str, _Named]:
    """The tensors under ``prefix`` by our names, from the layout that fits best."""
    state, prefix = _read_source(source, prefix, layouts)
    layout = max(layouts, key=lambda each: sum(f"{name}.weight" in state for name in each.layers))
    biased = [theirs for theirs, ours in layout.layers.items() if ours in layout.biased]
    check_keys(state, prefix, list(layout.layers), biased, layout.beside)
    found: dict[str, _Named] = {}
    for theirs, ours in layout.layers.items():
        packed = ours == "qkv_proj"
        for kind in ("weight", "bias"):
            if (key := f"{theirs}.{kind}") in state:
                tensor = check_matrix(prefix + key, state[key], kind)
                if layout.transposed and packed and kind == "weight":
                    check_packed(prefix + key, tensor)
                named = _Named(prefix + key, tensor.t() if layout.transposed else tensor)
                found |= _unpacked(kind, named) if packed else {f"{ours}.{kind}": named}
    return found


def _unpacked(kind: str, packed: _Named) -> dict[str, _Named]:
    """Rows ``(three h d)`` of one layer as those of three."""
    thirds = rearrange(check_thirds(*packed), "(three e) ... -> three e ...", three=3)
    return {
        f"{part}_proj.{kind}": _Named(packed.key, third)
        for part, third in zip("qkv", thirds, strict=True)
    }


def _assembled(
    state: dict[str, _Named],
    num_heads: int | None,
    facts: _Facts,
    *,
    kdim: int | None = None,
    vdim: int | None = None,
    **options: Any,
) -> MultiHeadAttention:
    """A module with copies of the tensors in ``state``; sizes are told by their shapes."""
    options |= check_layers(state, check_heads(num_heads, facts.num_heads), kdim, vdim)
    check_same_size("head_dim", options["head_dim"], facts.head_dim)
    options |= {"bias": "q_proj.bias" in state, "out_bias": "out_proj.bias" in state}
    options |= {"dropout": facts.dropout, "scale": facts.scale}
    with torch.device("meta"):
        module = MultiHeadAttention(**options)
    _fill(module, {name: tensor for name, (_, tensor) in state.items()})
    if module.rotary is not None:
        module.rotary.to(module.q_proj.weight.device)
    return module.train(facts.training)


def _fill(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give a module on meta copies of the tensors; they can be trained even if this runs in inference mode."""
    with torch.inference_mode(mode=False):
        copies = {
            name: tensor.detach().clone(memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }
        module.load_state_dict(copies, assign=True)
