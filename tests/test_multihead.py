"""MultiHeadAttention: against PyTorch's module, formulas written by hand and itself with a cache, and in every tool
that an importing project may put it through.
"""

from __future__ import annotations

import copy
import io
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from mha_lib import (
    AttentionOutput,
    KVCache,
    MultiHeadAttention,
    RotaryEmbedding,
    SimpleMultiHeadAttention,
    alibi_bias,
    causal_mask,
    padding_mask,
    sliding_window_mask,
)
from tests.support import DRAWS, ROOT, Draw, assert_near, by_dtype, draws
from tests.tolerances import HALF_STEP, MODULE, Tolerance

if sys.version_info >= (3, 11):
    from typing import assert_type
else:

    def assert_type(value: Any, kind: Any) -> Any:
        """Python 3.10 has none; only the type checker looks at it."""
        return value


CACHED = Tolerance(1e-12, 1e-12)
"""float64 with a cache against one pass: the same sums over blocks of another shape."""

TURNED = Tolerance(1e-5, 1e-5)
"""Rotary angles at positions up to 128 are float32: rounded to 4e-6 radians each, on numbers around 1."""

COMPILED = Tolerance(1e-4, 1e-5)
"""float32 against itself with fused operations: a few roundings, 6e-8 each, through two projections and a softmax."""

HALF_GRADIENT = by_dtype({"bfloat16": Tolerance(2**-4, 2**-4), "float16": Tolerance(2**-7, 2**-7)})
"""Half gradients of a module: a dozen roundings of half a unit in the last place, 2**-9 (2**-12), forward and back, on
sums of terms around 1."""

HALF_FORWARD = by_dtype({"bfloat16": HALF_STEP, "float16": Tolerance(2**-9, 2**-9)})
"""As HALF_STEP, with three bits more."""

B, I, J, E, H, K, D = 2, 5, 7, 10, 4, 2, 6  # noqa: E741
NORM = partial(nn.RMSNorm, eps=1e-2)
MOST_GRAPHS = 3  # for the prompt, for one token after it, for a token at any later place
COMPILERS = ["aot_eager"] + ["inductor"] * (
    sys.platform != "win32"
)  # Windows has no compiler on its path

FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "bias in the output alone": {"bias": False, "out_bias": True},
    "grouped": {"num_kv_heads": K},
    "multi-query": {"num_kv_heads": 1},
    "causal": {"causal": True},
    "window": {"window": 2},
    "causal window": {"window": 3, "causal": True},
    "rotary": {"rotary": RotaryEmbedding(D)},
    "rotary in part": {"rotary": RotaryEmbedding(4, interleaved=True)},
    "norm": {"qk_norm": NORM},
    "norm, then rotary": {"qk_norm": NORM, "rotary": RotaryEmbedding(D)},
    "scale": {"scale": 0.7},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "everything": {
        "num_kv_heads": K,
        "causal": True,
        "window": 4,
        "rotary": RotaryEmbedding(4),
        "qk_norm": NORM,
        "scale": 0.5,
        "softcap": 2.0,
        "sinks": True,
    },
}
MAIN = ["plain", "causal window", "sinks", "everything"]


def build(draw: Draw, *, dtype: torch.dtype = torch.float64, **options: Any) -> MultiHeadAttention:
    """A module; every parameter is drawn, biases, norms and sinks too."""
    sizes = {"embed_dim": E, "num_heads": H}
    if "embed_dim" not in options:
        sizes["head_dim"] = D
    module = MultiHeadAttention(**{**sizes, **options}, dtype=dtype)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            spread = math.sqrt(parameter.shape[-1]) if name.endswith("proj.weight") else 1
            parameter.copy_(draw.normal(*parameter.shape) / spread)
    return module


def compare_gradients(
    got: Tensor, wanted: Tensor, leaves: list[Tensor], others: list[Tensor] | None = None
) -> None:
    """Forward and backward through two ways to the same number, with the same random upstream gradient."""
    assert_near(got, wanted, MODULE)
    upstream = Draw(99).normal(*wanted.shape)
    mine = torch.autograd.grad(got, leaves, upstream)
    theirs = torch.autograd.grad(wanted, others or leaves, upstream)
    for one, other in zip(mine, theirs, strict=True):
        assert_near(one, other, MODULE)


# Against PyTorch's module


def torch_twin(module: MultiHeadAttention) -> nn.MultiheadAttention:
    """PyTorch's module with the same weights."""
    has_bias = module.q_proj.bias is not None
    twin = nn.MultiheadAttention(
        module.embed_dim,
        module.num_heads,
        bias=has_bias,
        kdim=module.kdim,
        vdim=module.vdim,
        batch_first=True,
        dtype=torch.float64,
    )
    twin.load_state_dict(in_torch_names(dict(module.state_dict()), packed=twin._qkv_same_embed_dim))
    return twin


def in_torch_names(state: dict[str, Tensor], *, packed: bool) -> dict[str, Tensor]:
    """Parameters, or their gradients, under PyTorch's names."""
    named = {name: state[name] for name in state if name.startswith("out_proj")}
    weights = [state[f"{part}_proj.weight"] for part in "qkv"]
    if packed:
        named["in_proj_weight"] = torch.cat(weights)
    else:
        names = (f"{part}_proj_weight" for part in "qkv")
        named |= dict(zip(names, weights, strict=True))
    if "q_proj.bias" in state:
        named["in_proj_bias"] = torch.cat([state[f"{part}_proj.bias"] for part in "qkv"])
    return named


@pytest.mark.parametrize("source", ["self", "memory", "cross", "other widths"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("masking", ["no mask", "padding", "per head", "bias", "both"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "with bias"])
def test_equals_torch_forward_and_backward(
    source: str, causal: bool, masking: str, bias: bool
) -> None:
    draw = Draw(1)
    kdim, vdim = (8, 5) if source == "other widths" else (12, 12)
    module = build(draw, embed_dim=12, num_heads=3, kdim=kdim, vdim=vdim, bias=bias, causal=causal)
    twin = torch_twin(module)
    keys = I if source == "self" else J
    sizes = {
        "self": [(I, 12)],
        "memory": [(I, 12), (J, 12)],
        "cross": [(I, 12), (J, 12), (J, 12)],
        "other widths": [(I, 12), (J, kdim), (J, vdim)],
    }[source]
    inputs = [draw.normal(B, *size, grad=True) for size in sizes]
    mask = {"padding": padding_mask([keys, 2], keys), "per head": draw.mask(B, 3, I, keys)}.get(
        "per head" if masking == "both" else masking
    )
    added = draw.normal(3, I, keys) if masking in ("bias", "both") else None

    forbidden = torch.zeros(B, 3, I, keys, dtype=torch.float64)
    forbidden = forbidden if added is None else forbidden + added
    allowed = causal_mask(I, keys, query_offset=0) if causal else torch.ones(I, keys) > 0
    allowed = allowed if mask is None else allowed & mask
    forbidden = rearrange(forbidden.masked_fill(~allowed, -math.inf), "b h i j -> (b h) i j")
    query, key, value = (inputs[min(n, len(inputs) - 1)] for n in range(3))
    theirs = twin(query, key, value, attn_mask=forbidden, average_attn_weights=False)

    ours = module(*inputs, mask=mask, bias=added, return_weights=True)
    assert_near(ours.weights, theirs[1], MODULE)
    for output in (ours.output, module(*inputs, mask=mask, bias=added)):
        assert_near(output, theirs[0], MODULE)
        upstream = draw.normal(*output.shape)
        mine = torch.autograd.grad(output, [*inputs, *module.parameters()], upstream)
        other = torch.autograd.grad(
            theirs[0], [*inputs, *twin.parameters()], upstream, retain_graph=True
        )
        for got, wanted in zip(mine, other[: len(inputs)], strict=False):
            assert_near(got, wanted, MODULE)
        names = [name for name, _ in module.named_parameters()]
        found = in_torch_names(
            dict(zip(names, mine[len(inputs) :], strict=True)), packed=twin._qkv_same_embed_dim
        )
        for (name, _), wanted in zip(twin.named_parameters(), other[len(inputs) :], strict=True):
            assert_near(found[name], wanted, MODULE)


def test_equals_torch_on_random_sizes() -> None:
    for draw in draws():
        heads, width = draw.size(1, 4), draw.size(1, 4)
        batch, queries, keys = draw.size(1, 3), draw.size(1, 6), draw.size(1, 6)
        kdim, vdim = draw.size(1, 9), draw.size(1, 9)
        module = build(draw, embed_dim=heads * width, num_heads=heads, kdim=kdim, vdim=vdim)
        sizes = [(queries, heads * width), (keys, kdim), (keys, vdim)]
        inputs = [draw.normal(batch, *size) for size in sizes]
        assert_near(module(*inputs), torch_twin(module)(*inputs)[0], MODULE)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_equals_the_simple_module(causal: bool) -> None:
    draw = Draw(2)
    module = build(draw, embed_dim=12, num_heads=3, causal=causal)
    simple = SimpleMultiHeadAttention(12, 3, causal=causal).double()
    state = module.state_dict()
    with torch.no_grad():
        for name, parameter in simple.qkv_proj.named_parameters():
            parameter.copy_(torch.cat([state[f"{part}_proj.{name}"] for part in "qkv"]))
    simple.out_proj.load_state_dict(module.out_proj.state_dict())
    x, memory, mask = draw.normal(B, I, 12, grad=True), draw.normal(B, J, 12), draw.mask(B, 1, I, J)
    compare_gradients(module(x), simple(x), [x])
    compare_gradients(module(x, memory, mask=mask), simple(x, memory, mask=mask), [x])
    compare_gradients(
        module(x, memory, bias=alibi_bias(3, I, J, query_offset=0)),
        simple(x, memory, bias=alibi_bias(3, I, J, query_offset=0)),
        [x],
    )


# Against a formula written by hand, head by head


def normed(x: Tensor, norm: nn.Module | None) -> Tensor:
    """Root mean square norm as its paper has it."""
    if norm is None:
        return x
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-2) * norm.get_parameter("weight")


def rotated(x: Tensor, rotary: RotaryEmbedding | None) -> Tensor:
    """Pairs of features as complex numbers, multiplied by a unit number. Angles are float32, as promised."""
    if rotary is None:
        return x
    pairs = rotary.dim // 2
    first, second = (
        (slice(0, rotary.dim, 2), slice(1, rotary.dim, 2))
        if rotary.interleaved
        else (slice(0, pairs), slice(pairs, rotary.dim))
    )
    powers = torch.arange(pairs, dtype=torch.float64) * 2 / rotary.dim
    frequencies = (10000.0**-powers).float()
    angles = torch.arange(x.shape[-2]).float()[:, None] * frequencies
    turned = torch.complex(x[..., first], x[..., second]) * torch.complex(
        angles.cos().double(), angles.sin().double()
    )
    result = x.clone()
    result[..., first], result[..., second] = turned.real, turned.imag
    return result


def by_hand(
    module: MultiHeadAttention,
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
) -> AttentionOutput:
    """The module's function, one head after the other, from its parameters."""
    key = query if key is None else key
    value = key if value is None else value
    batch, queries, keys = query.shape[0], query.shape[1], key.shape[1]
    allowed = torch.ones(batch, H, queries, keys, dtype=torch.bool)
    for i in range(queries):
        for j in range(keys):
            if module.causal and j > i:
                allowed[..., i, j] = False
            if module.window is not None and abs(i - j) >= module.window:
                allowed[..., i, j] = False
    allowed = allowed if mask is None else allowed & mask
    added = torch.zeros_like(allowed, dtype=query.dtype) + (0 if bias is None else bias)
    output, weights = torch.zeros(batch, queries, E, dtype=query.dtype), []
    for head in range(H):
        q_rows = slice(head * D, (head + 1) * D)
        group = head // (H // module.num_kv_heads)
        kv_rows = slice(group * D, (group + 1) * D)
        q, k, v = (
            x @ linear.weight[rows].mT + (0 if linear.bias is None else linear.bias[rows])
            for x, linear, rows in (
                (query, module.q_proj, q_rows),
                (key, module.k_proj, kv_rows),
                (value, module.v_proj, kv_rows),
            )
        )
        q, k = normed(q, module.q_norm), normed(k, module.k_norm)
        q, k = rotated(q, module.rotary), rotated(k, module.rotary)
        scores = q @ k.mT * (D**-0.5 if module.scale is None else module.scale)
        if module.softcap is not None:
            scores = module.softcap * torch.tanh(scores / module.softcap)
        exponents = torch.exp(scores + added[:, head]) * allowed[:, head]
        total = exponents.sum(-1, keepdim=True)
        if module.sinks is not None:
            total = total + torch.exp(module.sinks[head])
        weight = exponents / torch.where(total > 0, total, 1)
        output = output + weight @ v @ module.out_proj.weight[:, q_rows].mT
        weights.append(weight)
    bias_of_output = 0 if module.out_proj.bias is None else module.out_proj.bias
    return AttentionOutput(output + bias_of_output, torch.stack(weights, dim=1))


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("masking", ["no mask", "mask", "mask and bias"])
@pytest.mark.parametrize("source", ["self", "memory"])
def test_equals_the_formula_forward_and_backward(feature: str, masking: str, source: str) -> None:
    draw = Draw(3)
    module = build(draw, **FEATURES[feature])
    keys = I if source == "self" else J
    inputs = [draw.normal(B, n, E, grad=True) for n in (I, J)[: 1 if source == "self" else 2]]
    mask = draw.normal(B, H, I, keys) > -0.3 if "mask" in masking else None
    if mask is not None:
        mask[0, :, 2] = False
    added = draw.normal(B, 1, I, keys, grad=True) if "bias" in masking else None
    wanted = by_hand(module, *inputs, mask=mask, bias=added)
    leaves = [*inputs, *module.parameters(), *([] if added is None else [added])]
    compare_gradients(module(*inputs, mask=mask, bias=added), wanted.output, leaves)
    wanted = by_hand(module, *inputs, mask=mask, bias=added)
    got = module(*inputs, mask=mask, bias=added, return_weights=True)
    assert_near(got.weights, wanted.weights, MODULE)
    compare_gradients(got.output, wanted.output, leaves)


@pytest.mark.parametrize("backend", ["reference", "tiled", "sdpa"])
def test_every_backend_computes_the_same(backend: str) -> None:
    draw = Draw(4)
    options: dict[str, Any] = {"num_kv_heads": K, "causal": True, "window": 3}
    module = build(draw, **options, rotary=RotaryEmbedding(D), backend=backend)
    x, mask = draw.normal(B, I, E, grad=True), draw.mask(B, 1, I, I)
    wanted = by_hand(module, x, mask=mask).output
    compare_gradients(module(x, mask=mask), wanted, [x, *module.parameters()])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_heads_are_repeated_rows(kv_heads: int) -> None:
    draw = Draw(5)
    module = build(draw, num_kv_heads=kv_heads)
    full = build(draw)
    state = dict(module.state_dict())
    for name in [name for name in state if name[0] in "kv"]:
        pattern = "(k d) ... -> (k g d) ..."
        state[name] = repeat(state[name], pattern, d=D, g=H // kv_heads)
    full.load_state_dict(state)
    x = draw.normal(B, I, E, grad=True)
    assert module.k_proj.weight.shape == module.v_proj.weight.shape == (kv_heads * D, E)
    compare_gradients(module(x), full(x), [x, module.q_proj.weight], [x, full.q_proj.weight])


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"rotary": RotaryEmbedding(8)}], ids=str)
def test_a_free_head_dim(options: dict[str, Any]) -> None:
    module = build(Draw(6), head_dim=9, embed_dim=10, num_heads=4, num_kv_heads=2, **options)
    assert module.q_proj.weight.shape == (36, 10)
    assert module.k_proj.weight.shape == module.v_proj.weight.shape == (18, 10)
    assert module.out_proj.weight.shape == (10, 36)
    assert module(Draw(6).normal(B, I, 10)).shape == (B, I, 10)


@pytest.mark.parametrize("causal", [False, True], ids=["both sides", "causal"])
@pytest.mark.parametrize("length", [5, 90])
def test_a_window_is_its_mask(causal: bool, length: int) -> None:
    draw = Draw(7)
    options: dict[str, Any] = {"num_kv_heads": K, "rotary": RotaryEmbedding(D)}
    module = build(draw, window=3, causal=causal, **options)
    plain = build(draw, **options)
    plain.load_state_dict(module.state_dict())
    x, mask = draw.normal(B, length, E, grad=True), draw.mask(B, 1, length, length)
    seen = sliding_window_mask(length, length, 3, causal=causal)
    compare_gradients(module(x), plain(x, mask=seen), [x])
    compare_gradients(module(x, mask=mask), plain(x, mask=seen & mask), [x])


class Later(nn.Module):
    """A rotary embedding for tokens that stand further behind."""

    def __init__(self, rotary: RotaryEmbedding, by: int) -> None:
        super().__init__()
        self.rotary, self.by = rotary, by

    def forward(self, x: Tensor, offset: int) -> Tensor:
        turned: Tensor = self.rotary(x, offset + self.by)
        return turned


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_rotary_is_relative(interleaved: bool) -> None:
    draw = Draw(8)
    rotary = RotaryEmbedding(D, interleaved=interleaved)
    module = build(draw, rotary=rotary, causal=True)
    x = draw.normal(B, I, E)
    here = module(x)
    module.rotary = Later(rotary, 100)
    assert_near(module(x), here, TURNED)
    module.rotary = None
    assert (module(x) - here).abs().max() > 0.01


def test_rotary_turns_explicit_keys_too() -> None:
    draw = Draw(9)
    module = build(draw, rotary=RotaryEmbedding(D))
    x = draw.normal(B, I, E)
    assert_near(module(x, x.clone()), module(x), MODULE)
    assert_near(module(x, x.clone(), x.clone()), module(x), MODULE)


@pytest.mark.parametrize(
    "factory", [nn.RMSNorm, partial(nn.RMSNorm, eps=1e-6), partial(nn.LayerNorm, bias=False)]
)
def test_norms_are_made_by_a_factory(factory: Callable[[int], nn.Module]) -> None:
    module = MultiHeadAttention(E, H, head_dim=D, qk_norm=factory, dtype=torch.float64)
    assert isinstance(module.q_norm, nn.Module)
    assert isinstance(module.k_norm, nn.Module)
    assert module.q_norm is not module.k_norm
    for norm in (module.q_norm, module.k_norm):
        assert norm.get_parameter("weight").shape == (D,)
        assert norm.get_parameter("weight").dtype == torch.float64
    x = Draw(10).normal(B, I, E)
    assert_near(module(100 * x + 0), module(x), Tolerance(1, 1e3))
    assert {"q_norm.weight", "k_norm.weight"} <= module.state_dict().keys()


def test_sinks_are_a_parameter_of_zeros_at_first() -> None:
    module = MultiHeadAttention(E, H, head_dim=D, sinks=True)
    assert isinstance(module.sinks, nn.Parameter)
    assert torch.equal(module.sinks, torch.zeros(H))
    result = module(Draw(11).normal(B, I, E, dtype=torch.float32), return_weights=True)
    assert (result.weights.sum(-1) < 1).all()
    torch.autograd.backward(result.output.sum())
    assert module.sinks.grad is not None
    assert (module.sinks.grad != 0).all()
    assert MultiHeadAttention(E, H, head_dim=D).sinks is None


@pytest.mark.parametrize("shape", [(I, I), (H, I, I), (B, 1, 1, I), (B, H, I, I), (I,), (1, 1)])
def test_masks_and_biases_of_any_shape(shape: tuple[int, ...]) -> None:
    draw = Draw(12)
    module, x = build(draw, causal=True), draw.normal(B, I, E)
    mask, bias = draw.mask(*shape), draw.normal(*shape)
    assert_near(module(x, mask=mask), by_hand(module, x, mask=mask).output, MODULE)
    assert_near(module(x, bias=bias), by_hand(module, x, bias=bias).output, MODULE)
    forbidding = torch.where(mask, 0.0, -math.inf)
    assert_near(module(x, bias=forbidding), module(x, mask=mask), MODULE)


@pytest.mark.parametrize("feature", MAIN)
def test_a_query_without_keys_gets_the_output_bias(feature: str) -> None:
    draw = Draw(13)
    module, x = build(draw, **FEATURES[feature]), draw.normal(B, I, E, grad=True)
    mask = torch.ones(B, 1, I, I, dtype=torch.bool)
    mask[0, :, 2] = False
    output = module(x, mask=mask)
    assert torch.equal(output[0, 2], module.out_proj.bias)
    leaves = [x, *module.parameters()]
    gradients = torch.autograd.grad(output.sum(), leaves)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_weights_come_for_each_head_and_only_when_asked() -> None:
    draw = Draw(14)
    module, x, memory = build(draw, num_kv_heads=K), draw.normal(B, I, E), draw.normal(B, J, E)
    assert type(module(x, memory)) is Tensor
    result = module(x, memory, return_weights=True)
    assert type(result) is AttentionOutput
    assert result.weights.shape == (B, H, I, J)
    assert_near(result.weights, by_hand(module, x, memory).weights, MODULE)


def test_dropout_acts_in_training_only() -> None:
    draw = Draw(15)
    module, x = build(draw, dropout=1.0), draw.normal(B, I, E)
    kept = by_hand(module, x)
    assert_near(module.eval()(x), kept.output, MODULE)
    everything_dropped = module.out_proj.bias.expand(B, I, E)
    assert_near(module.train()(x), everything_dropped, MODULE)
    result = module(x, return_weights=True)
    assert_near(result.output, everything_dropped, MODULE)
    assert_near(result.weights, kept.weights, MODULE)


def test_dropout_follows_the_seed() -> None:
    draw = Draw(16)
    module, x = build(draw, dropout=0.5), draw.normal(B, I, E)
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(module(x))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


# With a cache


CACHES: dict[str, dict[str, Any]] = {
    "causal": {},
    "rotary": {"rotary": RotaryEmbedding(D)},
    "window": {"window": 4, "rotary": RotaryEmbedding(4, interleaved=True)},
    "grouped": {"num_kv_heads": K},
    "norm, sinks and softcap": {"qk_norm": NORM, "sinks": True, "softcap": 2.0},
    "everything": FEATURES["everything"],
}
CHUNKS = {
    "token by token": [1] * 9,
    "a prompt first": [5, 1, 1, 1, 1],
    "uneven": [2, 3, 4],
    "empty ones between": [0, 4, 0, 5, 0],
    "at once": [9],
}


def new_cache(module: MultiHeadAttention, max_length: int, **options: Any) -> KVCache:
    return KVCache(
        B,
        module.num_kv_heads,
        module.head_dim,
        max_length=max_length,
        **{"dtype": torch.float64, **options},
    )


def in_chunks(
    module: MultiHeadAttention,
    x: Tensor,
    sizes: list[int],
    mask: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Output and weights, piece by piece; mask and bias are those of one pass."""
    cache, outputs, weights, start = new_cache(module, x.shape[1]), [], [], 0
    for size in sizes:
        end = start + size
        piece = (slice(None), slice(None), slice(start, end), slice(0, end))
        options: dict[str, Any] = {
            "mask": None if mask is None else mask[piece],
            "bias": None if bias is None else bias[piece],
        }
        again = copy.deepcopy(cache)
        outputs.append(module(x[:, start:end], cache=cache, **options))
        result = module(x[:, start:end], cache=again, return_weights=True, **options)
        assert_near(result.output, outputs[-1], CACHED)
        assert cache.length == again.length == end
        weights.append(result.weights)
        start = end
    return torch.cat(outputs, dim=1), weights


@pytest.mark.parametrize("feature", CACHES)
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("masking", ["no mask", "left padding", "mask and bias"])
@torch.no_grad()
def test_a_cache_changes_nothing(feature: str, chunks: str, masking: str) -> None:
    draw = Draw(17)
    module, x = build(draw, **{"causal": True, **CACHES[feature]}), draw.normal(B, 9, E)
    mask, bias = None, None
    if masking == "left padding":
        mask = padding_mask([9, 6], 9, side="left").expand(-1, -1, 9, -1)
    if masking == "mask and bias":
        mask, bias = draw.mask(B, H, 9, 9), draw.normal(1, H, 9, 9)
    wanted = module(x, mask=mask, bias=bias, return_weights=True)
    output, weights = in_chunks(module, x, CHUNKS[chunks], mask, bias)
    assert_near(output, wanted.output, CACHED)
    start = 0
    for part in weights:
        end = start + part.shape[2]
        assert_near(part, wanted.weights[:, :, start:end, :end], CACHED)
        assert (wanted.weights[:, :, start:end, end:] == 0).all()
        start = end


@pytest.mark.parametrize("backend", ["auto", "reference", "tiled", "sdpa"])
@torch.no_grad()
def test_a_narrow_window_in_a_long_cache(backend: str) -> None:
    draw = Draw(18)
    options: dict[str, Any] = {"num_kv_heads": K, "window": 5, "causal": True}
    module = build(draw, **options, rotary=RotaryEmbedding(D), backend=backend)
    x = draw.normal(B, 120, E)
    cache, start, outputs = new_cache(module, 120), 0, []
    for size in (90, 1, 1, 20, 8):
        outputs.append(module(x[:, start : start + size], cache=cache))
        start += size
    seen = sliding_window_mask(120, 120, 5)
    assert_near(torch.cat(outputs, dim=1), by_hand_without_window(module, x, seen), CACHED)


def by_hand_without_window(module: MultiHeadAttention, x: Tensor, seen: Tensor) -> Tensor:
    """The formula with the window as a mask: loops over positions are slow."""
    plain = copy.deepcopy(module)
    plain.window, plain.causal = None, False
    return by_hand(plain, x, mask=seen).output


@torch.no_grad()
def test_left_padding_is_as_if_it_were_not_there() -> None:
    draw = Draw(19)
    module = build(draw, causal=True, rotary=RotaryEmbedding(D), num_kv_heads=K)
    x = draw.normal(B, 8, E)
    mask = padding_mask([8, 5], 8, side="left")
    cache = new_cache(module, 8)
    outputs = [module(x[:, :6], cache=cache, mask=mask[..., :6])]
    outputs += [module(x[:, n : n + 1], cache=cache, mask=mask[..., : n + 1]) for n in (6, 7)]
    alone = module(x[1:, 3:])
    assert_near(torch.cat(outputs, dim=1)[1:, 3:], alone, TURNED)


@torch.no_grad()
def test_explicit_keys_are_cached_like_those_of_self_attention() -> None:
    draw = Draw(20)
    module, x = build(draw, causal=True, rotary=RotaryEmbedding(D)), draw.normal(B, 6, E)
    first, second = new_cache(module, 6), new_cache(module, 6)
    for part in (x[:, :4], x[:, 4:]):
        explicit = module(part, part.clone(), part.clone(), cache=second)
        assert_near(module(part, cache=first), explicit, CACHED)
    assert_near(first.keys, second.keys, CACHED)


@torch.no_grad()
def test_truncating_a_cache_goes_back() -> None:
    draw = Draw(21)
    module, x = build(draw, causal=True, rotary=RotaryEmbedding(D)), draw.normal(B, 6, E)
    cache = new_cache(module, 6)
    module(x[:, :4], cache=cache)
    wanted = module(x[:, 4:], cache=cache)
    cache.truncate(2)
    module(draw.normal(B, 3, E), cache=cache)
    cache.truncate(2)
    module(x[:, 2:4], cache=cache)
    assert_near(module(x[:, 4:], cache=cache), wanted, CACHED)


@torch.no_grad()
def test_a_cache_under_autocast() -> None:
    draw = Draw(22)
    module = build(draw, causal=True, rotary=RotaryEmbedding(D), qk_norm=NORM, dtype=torch.float32)
    x = draw.normal(B, 6, E, dtype=torch.float32)
    cache = new_cache(module, 6, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [module(x[:, :4], cache=cache), module(x[:, 4:], cache=cache)]
    assert all(output.dtype == torch.bfloat16 for output in outputs)
    assert_near(torch.cat(outputs, dim=1), module(x), HALF_FORWARD[torch.bfloat16])


FAILING: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "mask of another shape": ("mask", {}, {"mask": torch.ones(2, 3, dtype=torch.bool)}),
    "mask of numbers": ("mask", {}, {"mask": torch.zeros(2, 5)}),
    "mask without the cached keys": ("mask", {}, {"mask": torch.ones(2, 2, dtype=torch.bool)}),
    "bias of another shape": ("bias", {}, {"bias": torch.zeros(3, 5)}),
    "bias elsewhere": ("bias", {}, {"bias": torch.zeros(2, 5, device="meta")}),
    "query of another dtype": ("dtype", {}, {"query": torch.zeros(B, 2, E)}),
    "query of another width": ("embed_dim", {}, {"query": torch.zeros(B, 2, 3).double()}),
    "query of another batch": ("batch", {}, {"query": torch.zeros(1, 2, E).double()}),
    "no room": ("max_length", {}, {"query": torch.zeros(B, 6, E).double()}),
    "flag": ("return_weights", {}, {"return_weights": 1}),
    "backend without sinks": ("sdpa", {"backend": "sdpa", "sinks": True}, {}),
    "backend without weights": ("tiled", {"backend": "tiled"}, {"return_weights": True}),
    "backend that is not usable": ("triton", {"backend": "triton"}, {"mask": torch.ones(5) > 0}),
}


@pytest.mark.parametrize("failure", FAILING)
@torch.no_grad()
def test_a_failing_call_leaves_the_cache_as_it_was(failure: str) -> None:
    word, options, call = FAILING[failure]
    draw = Draw(23)
    module = build(draw, causal=True, rotary=RotaryEmbedding(D), **options)
    working = copy.deepcopy(module)
    working.backend = "auto"
    x, cache = draw.normal(B, 5, E), new_cache(module, 8)
    working(x[:, :3], cache=cache)
    twin = copy.deepcopy(cache)
    with pytest.raises((ValueError, TypeError), match=rf"\b{word}\b"):
        module(**{"query": x[:, 3:], "cache": cache, **call})
    assert cache.length == 3
    assert torch.equal(cache.keys[:, :, :3], twin.keys[:, :, :3])
    assert torch.equal(cache.values[:, :, :3], twin.values[:, :, :3])
    assert torch.equal(working(x[:, 3:], cache=cache), working(x[:, 3:], cache=twin))


def test_a_cache_takes_no_gradient() -> None:
    draw = Draw(24)
    module, x = build(draw, causal=True), draw.normal(B, I, E)
    cache = new_cache(module, I)
    with pytest.raises(ValueError, match=r"key must not require a gradient.*torch\.no_grad"):
        module(x, cache=cache)
    assert cache.length == 0
    with torch.inference_mode():
        module(x, cache=cache)
    assert cache.length == I


# The layers are really called

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "out_proj"]


def test_the_layers_are_plain_and_hooks_fire_once() -> None:
    draw = Draw(25)
    module = build(draw, rotary=RotaryEmbedding(D), qk_norm=NORM, sinks=True)
    calls: list[str] = []
    names = [*PROJECTIONS, "q_norm", "k_norm"]
    for name in names:
        part = module.get_submodule(name)
        part.register_forward_hook(lambda *_, name=name: calls.append(name))
    for name in PROJECTIONS:
        assert type(module.get_submodule(name)) is nn.Linear
    module(draw.normal(B, I, E))
    assert sorted(calls) == sorted(names)
    module(draw.normal(B, I, E), draw.normal(B, J, E), return_weights=True)
    assert sorted(calls) == sorted(2 * names)


class LowRank(nn.Module):
    """An adapter: what was there, and a trained product of two thin matrices beside it."""

    def __init__(self, linear: nn.Module, draw: Draw) -> None:
        super().__init__()
        self.linear = linear
        out_features, in_features = linear.get_parameter("weight").shape
        self.down = nn.Parameter(draw.normal(2, in_features))
        self.up = nn.Parameter(draw.normal(out_features, 2) / 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(x) + x @ self.down.mT @ self.up.mT
        return result


@pytest.mark.parametrize("name", PROJECTIONS)
def test_a_layer_may_be_replaced_by_an_adapter(name: str) -> None:
    draw = Draw(26)
    module = build(draw, num_kv_heads=K, causal=True)
    merged, x = copy.deepcopy(module), draw.normal(B, I, E, grad=True)
    adapter = LowRank(module.get_submodule(name), draw)
    setattr(module, name, adapter)
    with torch.no_grad():
        merged.get_parameter(f"{name}.weight").add_(adapter.up @ adapter.down)
    compare_gradients(module(x), merged(x), [x])
    module.requires_grad_(False)
    adapter.down.requires_grad_()
    torch.autograd.backward(module(x).sum())
    assert adapter.down.grad is not None
    assert adapter.down.grad.abs().max() > 0


@pytest.mark.parametrize("feature", ["plain", "grouped", "sinks"])
def test_a_shard_of_the_layers_computes_its_part_of_the_sum(feature: str) -> None:
    draw = Draw(27)
    module, x = build(draw, **FEATURES[feature], causal=True), draw.normal(B, I, E, grad=True)
    shards = [shard(module, part, parts=2) for part in range(2)]
    output = shards[0](x) + shards[1](x) + module.out_proj.bias
    compare_gradients(output, module(x), [x])
    weights = [one(x, return_weights=True).weights for one in shards]
    assert_near(torch.cat(weights, dim=1), module(x, return_weights=True).weights, MODULE)


def shard(module: MultiHeadAttention, part: int, *, parts: int) -> MultiHeadAttention:
    """The module with the rows of some heads only; the output's bias is left to be added once."""
    result = copy.deepcopy(module)
    for name in PROJECTIONS:
        linear = module.get_submodule(name)
        axis = 1 if name == "out_proj" else 0
        weight = linear.get_parameter("weight").chunk(parts, dim=axis)[part]
        out_features, in_features = weight.shape
        smaller = nn.Linear(in_features, out_features, bias=axis == 0, dtype=weight.dtype)
        smaller.weight = nn.Parameter(weight.detach().clone())
        if axis == 0:
            bias = linear.get_parameter("bias").chunk(parts)[part]
            smaller.bias = nn.Parameter(bias.detach().clone())
        setattr(result, name, smaller)
    if module.sinks is not None:
        result.sinks = nn.Parameter(module.sinks.detach().chunk(parts)[part].clone())
    return result


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without it")
def test_heads_on_two_processes_equal_one(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.tensor_parallel", str(tmp_path / "meeting")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-20000:]


# Compiled, exported, transformed


def compiled(module: nn.Module, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(module, fullgraph=True, **{"backend": "aot_eager", **options})


COMPILATIONS = [
    ("plain", False, "aot_eager"),
    ("causal window", True, "aot_eager"),
    ("window", False, "eager"),
    ("rotary in part", True, "eager"),
    ("everything", True, "eager"),
]
if DRAWS > 50:
    COMPILATIONS = [(feature, n, "aot_eager") for feature in FEATURES for n in (False, True)]


@pytest.mark.parametrize(("feature", "dynamic", "compiler"), COMPILATIONS)
def test_compiles_to_one_graph_and_trains(feature: str, dynamic: bool, compiler: str) -> None:
    draw = Draw(28)
    module = build(draw, **FEATURES[feature])
    function = compiled(module, dynamic=dynamic, backend=compiler)
    for length in (5, 8) if dynamic else (5,):
        x = draw.normal(B, length, E, grad=True)
        compare_gradients(function(x), module(x), [x, *module.parameters()])


def test_compiles_with_everything_that_may_be_passed() -> None:
    draw = Draw(29)
    module = build(draw, num_kv_heads=K, sinks=True)
    function = compiled(module, dynamic=True, backend="eager")
    for queries, keys in ((5, 7), (6, 9)):
        x, memory = draw.normal(B, queries, E, grad=True), draw.normal(B, keys, E, grad=True)
        mask, bias = draw.mask(B, 1, queries, keys), draw.normal(H, queries, keys)
        got = function(x, memory, mask=mask, bias=bias, return_weights=True)
        wanted = module(x, memory, mask=mask, bias=bias, return_weights=True)
        assert type(got) is AttentionOutput
        assert_near(got.weights, wanted.weights, MODULE)
        compare_gradients(got.output, wanted.output, [x, memory, *module.parameters()])


@pytest.mark.parametrize("compiler", COMPILERS)
def test_a_training_step_under_each_compiler(compiler: str) -> None:
    draw = Draw(30)
    options: dict[str, Any] = {"num_kv_heads": K, "causal": True}
    module = build(draw, **options, dtype=torch.float32)
    function = compiled(module, backend=compiler)
    x, upstream = draw.normal(B, I, E, dtype=torch.float32), draw.normal(B, I, E).float()
    wanted = torch.autograd.grad(module(x), list(module.parameters()), upstream)
    with torch._inductor.config.patch(compile_threads=1):  # starting more takes longer
        output = function(x)
        got = torch.autograd.grad(output, list(module.parameters()), upstream)
    assert_near(output, module(x), COMPILED)
    for one, other in zip(got, wanted, strict=True):
        assert_near(one, other, COMPILED)


@pytest.mark.parametrize("feature", CACHES if DRAWS > 50 else ["causal", "everything"])
@torch.no_grad()
def test_a_compiled_cache_needs_no_graph_for_each_token(feature: str) -> None:
    from torch._dynamo.testing import CompileCounter

    draw = Draw(31)
    module, x = build(draw, **{"causal": True, **CACHES[feature]}), draw.normal(B, 15, E)
    counter = CompileCounter()
    function = compiled(module, backend=counter)
    cache, plain = new_cache(module, 40), new_cache(module, 40)
    for start, end in [(0, 5), *((n, n + 1) for n in range(5, 15))]:
        part = x[:, start:end]
        assert_near(function(part, cache=cache), module(part, cache=plain), CACHED)
    assert cache.length == plain.length == 15
    assert_near(cache.keys, plain.keys, CACHED)
    assert counter.frame_count <= MOST_GRAPHS


@torch.no_grad()
def test_a_compiled_failing_call_leaves_the_cache_as_it_was() -> None:
    draw = Draw(32)
    module, x = build(draw, causal=True), draw.normal(B, 6, E)
    cache = new_cache(module, 6)
    torch._dynamo.reset()
    function = torch.compile(module, backend="eager")
    function(x[:, :4], cache=cache)
    with pytest.raises(Exception, match="max_length"):
        function(x, cache=cache)
    assert cache.length == 4
    assert_near(module(x[:, 4:], cache=cache), module(x)[:, 4:], CACHED)


@pytest.mark.parametrize("feature", MAIN)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_exports(feature: str, dynamic: bool) -> None:
    draw = Draw(33)
    module = build(draw, **FEATURES[feature]).eval()
    shapes = ({1: torch.export.Dim("sequence", min=2, max=64)},) if dynamic else None
    x = draw.normal(B, I, E)
    program = torch.export.export(module, (x,), dynamic_shapes=shapes, strict=False).module()
    for length in (5, 3, 12) if dynamic else (5,):
        x = draw.normal(B, length, E)
        assert_near(program(x), module(x), MODULE)


@pytest.mark.parametrize("feature", MAIN)
def test_autocast(feature: str) -> None:
    draw = Draw(34)
    module = build(draw, **FEATURES[feature], dtype=torch.float32)
    x, memory = (draw.normal(B, n, E, dtype=torch.float32) for n in (I, J))
    exact = copy.deepcopy(module).double()
    for inputs in ([x], [x, memory], [x.bfloat16(), memory]):
        wanted = exact(*(one.double() for one in inputs))
        with torch.autocast("cpu", torch.bfloat16):
            got = module(*inputs)
            weights = module(*inputs, return_weights=True).weights
        assert got.dtype == weights.dtype == torch.bfloat16
        assert_near(got, wanted, HALF_FORWARD[torch.bfloat16])
    with torch.autocast("cpu", torch.bfloat16):
        torch.autograd.backward(module(x).sum())
    for parameter in module.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm])
def test_autocast_with_norms_that_return_float32(norm: type[nn.Module]) -> None:
    draw = Draw(41)
    options: dict[str, Any] = {"qk_norm": norm, "rotary": RotaryEmbedding(D)}
    module = build(draw, **options, dtype=torch.float32)
    x = draw.normal(B, I, E, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        result = module(x, return_weights=True)
    assert result.output.dtype == result.weights.dtype == torch.bfloat16
    assert_near(result.output, module(x), HALF_FORWARD[torch.bfloat16])


@pytest.mark.parametrize("dtype", HALF_FORWARD, ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_half_precision_forward_and_backward(feature: str, dtype: torch.dtype) -> None:
    draw = Draw(35)
    module = build(draw, **FEATURES[feature], dtype=dtype)
    exact = copy.deepcopy(module).double()
    x, upstream = draw.normal(B, I, E, dtype=dtype, grad=True), draw.normal(B, I, E, dtype=dtype)
    same = x.detach().double().requires_grad_()
    got, wanted = module(x), exact(same)
    assert got.dtype == module(x, return_weights=True).weights.dtype == dtype
    assert_near(got, wanted, HALF_FORWARD[dtype])
    mine = torch.autograd.grad(got, [x, *module.parameters()], upstream)
    theirs = torch.autograd.grad(wanted, [same, *exact.parameters()], upstream.double())
    for one, other in zip(mine, theirs, strict=True):
        assert one.dtype == dtype
        assert_near(one, other, HALF_GRADIENT[dtype])


@pytest.mark.parametrize("feature", FEATURES)
def test_gradients_of_single_samples(feature: str) -> None:
    draw = Draw(36)
    module, x = build(draw, **FEATURES[feature]), draw.normal(3, I, E)
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        output: Tensor = functional_call(module, parameters, (sample[None],))
        return output.square().sum()

    together = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for index, sample in enumerate(x):
        alone = torch.autograd.grad(module(sample[None]).square().sum(), list(module.parameters()))
        for name, wanted in zip(parameters, alone, strict=True):
            assert_near(together[name][index], wanted, MODULE)


@pytest.mark.parametrize("feature", MAIN)
def test_an_ensemble_in_one_call(feature: str) -> None:
    draw = Draw(37)
    modules = [build(draw, **FEATURES[feature]) for _ in range(3)]
    x, mask = draw.normal(B, I, E), draw.mask(B, 1, I, I)
    parameters, buffers = stack_module_state(modules)
    template = copy.deepcopy(modules[0]).to("meta")

    def call(parameters: Any, buffers: Any, x: Tensor) -> Tensor:
        output: Tensor = functional_call(template, (parameters, buffers), (x,), {"mask": mask})
        return output

    together = vmap(call, in_dims=(0, 0, None))(parameters, buffers, x)
    for one, module in zip(together, modules, strict=True):
        assert_near(one, module(x, mask=mask), MODULE)


# Copies, files, devices


def same_function(one: MultiHeadAttention, other: MultiHeadAttention, x: Tensor) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
    assert torch.equal(one(x), other(x))


@pytest.mark.parametrize("feature", ["plain", "everything"])
def test_copies_and_files_keep_everything(feature: str) -> None:
    draw = Draw(38)
    module, x = build(draw, **FEATURES[feature]), draw.normal(B, I, E)
    whole, state = io.BytesIO(), io.BytesIO()
    torch.save(module, whole)
    torch.save(module.state_dict(), state)
    whole.seek(0)
    state.seek(0)
    loaded = build(Draw(99), **FEATURES[feature])
    loaded.load_state_dict(torch.load(state, weights_only=True), strict=True)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded]
    for twin in [*copies, torch.load(whole, weights_only=False)]:
        same_function(twin, module, x)
    with torch.no_grad():
        copies[0].q_proj.weight.zero_()
    assert module.q_proj.weight.abs().min() > 0


def test_names_in_the_state_dict() -> None:
    plain = {
        "q_proj.weight": (H * D, E),
        "q_proj.bias": (H * D,),
        "k_proj.weight": (K * D, 3),
        "k_proj.bias": (K * D,),
        "v_proj.weight": (K * D, 5),
        "v_proj.bias": (K * D,),
        "out_proj.weight": (E, H * D),
        "out_proj.bias": (E,),
    }
    options: dict[str, Any] = {"head_dim": D, "num_kv_heads": K, "kdim": 3, "vdim": 5}
    assert shapes(MultiHeadAttention(E, H, **options)) == plain
    assert shapes(MultiHeadAttention(E, H, **options, rotary=RotaryEmbedding(D))) == plain
    more = {"sinks": (H,), "q_norm.weight": (D,), "k_norm.weight": (D,)}
    full = MultiHeadAttention(E, H, **options, sinks=True, qk_norm=nn.RMSNorm)
    assert shapes(full) == plain | more
    without = {name: shape for name, shape in plain.items() if not name.endswith("bias")}
    assert shapes(MultiHeadAttention(E, H, **options, bias=False)) == without
    last = MultiHeadAttention(E, H, **options, bias=False, out_bias=True)
    assert shapes(last) == without | {"out_proj.bias": (E,)}
    first = MultiHeadAttention(E, H, **options, out_bias=False)
    assert shapes(first) == {name: plain[name] for name in plain if name != "out_proj.bias"}
    with pytest.raises(RuntimeError, match="Missing key"):
        full.load_state_dict(last.state_dict())


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("how", ["argument", "context", "moved"])
def test_made_on_the_meta_device_and_filled_later(how: str) -> None:
    draw = Draw(39)
    options = FEATURES["everything"]
    ready, x = build(draw, **options), draw.normal(B, I, E)

    def new(**more: Any) -> MultiHeadAttention:
        fresh = {**options, "rotary": RotaryEmbedding(4)}
        return MultiHeadAttention(E, H, head_dim=D, dtype=torch.float64, **{**fresh, **more})

    if how == "argument":
        module = new(device="meta")
    elif how == "context":
        with torch.device("meta"):
            module = new()
    else:
        module = new().to("meta")
    assert all(parameter.is_meta for parameter in module.parameters())
    assert module(x.to("meta")).shape == x.shape
    assigned = copy.deepcopy(module)
    assigned.load_state_dict(ready.state_dict(), assign=True)
    module.to_empty(device="cpu").load_state_dict(ready.state_dict())
    for filled in (module, assigned):
        same_function(filled, ready, x)


def test_dtype_and_device_reach_every_parameter() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        options = FEATURES["everything"]
        module = MultiHeadAttention(E, H, head_dim=D, device="meta", dtype=dtype, **options)
        assert all(p.dtype == dtype and p.is_meta for p in module.parameters())


def test_attributes_and_representation() -> None:
    module = MultiHeadAttention(E, H, head_dim=D, num_kv_heads=K, kdim=3, vdim=5)
    assert (module.embed_dim, module.num_heads, module.num_kv_heads) == (E, H, K)
    assert (module.head_dim, module.kdim, module.vdim) == (D, 3, 5)
    assert module.extra_repr() == "num_heads=4, num_kv_heads=2, head_dim=6"
    module = MultiHeadAttention(
        8, 2, dropout=0.1, causal=True, window=3, scale=0.0, softcap=2.0, rotary=RotaryEmbedding(4)
    )
    assert module.extra_repr() == (
        "num_heads=2, num_kv_heads=2, head_dim=4, dropout=0.1, causal=True, window=3, "
        "scale=0.0, softcap=2.0"
    )
    assert "(rotary): RotaryEmbedding(dim=4" in repr(module)
    assert "(q_proj): Linear(in_features=8, out_features=8, bias=True)" in repr(module)


@pytest.mark.parametrize("options", [{}, {"causal": True, "rotary": RotaryEmbedding(D)}], ids=str)
def test_no_tokens_and_no_samples(options: dict[str, Any]) -> None:
    draw = Draw(40)
    module = build(draw, **options)
    for batch, queries in ((0, 3), (2, 0), (0, 0)):
        x = draw.normal(batch, queries, E, grad=True)
        output = module(x)
        assert output.shape == (batch, queries, E)
        torch.autograd.backward(output.sum())
    x = draw.normal(B, 3, E)
    assert torch.equal(module(x, x[:, :0]), module.out_proj.bias.expand(B, 3, E))


def test_the_type_checker_knows_what_comes_back() -> None:
    module = MultiHeadAttention(E, H, head_dim=D)
    x = torch.zeros(B, I, E)
    assert_type(module(x), Tensor)
    assert_type(module(x, return_weights=False), Tensor)
    assert_type(module(x, return_weights=True), AttentionOutput)
    assert_type(module.forward(x, return_weights=True), AttentionOutput)
    asked = bool(torch.ones(()))
    assert_type(module(x, return_weights=asked), Tensor | AttentionOutput)
    assert isinstance(module(x, return_weights=asked), AttentionOutput)
    if TYPE_CHECKING:
        module("text")  # type: ignore[call-overload]
        module(x, masks=None)  # type: ignore[call-overload]


def test_an_exported_module_takes_long_texts() -> None:
    module = MultiHeadAttention(16, 4, causal=True, softcap=20.0).eval()
    shapes = ({1: torch.export.Dim("sequence", min=2, max=2048)},)
    program = torch.export.export(
        module, (torch.randn(1, 16, 16),), dynamic_shapes=shapes, strict=False
    )
    x = Draw(51).normal(1, 700, 16, dtype=torch.float32)
    assert_near(program.module()(x), module(x), COMPILED)


@pytest.mark.parametrize("backend", ["auto", "tiled"])
@pytest.mark.parametrize("grad", [False, True])
def test_long_texts_compile(backend: str, grad: bool) -> None:
    options: dict[str, Any] = {"softcap": 20.0} if backend == "auto" else {}
    module = MultiHeadAttention(16, 4, causal=True, backend=backend, **options)
    x = Draw(52).normal(1, 520, 16, dtype=torch.float32)
    torch._dynamo.reset()
    with torch.set_grad_enabled(grad):
        compiled_output = torch.compile(module, fullgraph=True, backend="eager")(x)
        assert_near(compiled_output, module(x), COMPILED)


def test_a_rotary_module_moves_with_the_device_argument() -> None:
    with torch.device("meta"):
        rotary = RotaryEmbedding(4)
    assert rotary.frequencies.device.type == "cpu"
    module = MultiHeadAttention(16, 4, rotary=rotary, device="meta")
    assert module.q_proj.weight.is_meta
    assert not rotary.frequencies.is_meta


def test_weights_that_a_hook_fetches_are_not_mistaken_for_another_device() -> None:
    module = MultiHeadAttention(16, 4)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    x = torch.randn(1, 4, 16)
    expected = module(x)
    module.to("meta")

    def fetch(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, _: object) -> None:
            for key in ("weight", "bias"):
                setattr(layer, key, nn.Parameter(state[f"{name}.{key}"]))

        return hook

    for name, layer in module.named_children():
        layer.register_forward_pre_hook(fetch(name))
    assert_near(module(x), expected, COMPILED)
