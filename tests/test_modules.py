"""SimpleMultiHeadAttention and SplitMultiHeadAttention against torch.nn.MultiheadAttention and each other."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mha_lib import (
    AttentionOutput,
    SimpleMultiHeadAttention,
    SplitMultiHeadAttention,
    padding_mask,
)
from tests.support import Draw, assert_near, draws
from tests.tolerances import HALF_STEP, MODULE

B, I, J, E, H = 2, 5, 7, 12, 3  # noqa: E741
D = E // H
Ours = SimpleMultiHeadAttention | SplitMultiHeadAttention
KINDS = ["simple", "split"]
SOURCES: dict[str, int] = {"self": 1, "memory": 2, "cross": 3}


def build(kind: str, draw: Draw, **options: Any) -> Ours:
    """A float64 module; every parameter, the biases too, is drawn."""
    simple = SimpleMultiHeadAttention(E, H, **options).double()
    with torch.no_grad():
        for parameter in simple.parameters():
            parameter.copy_(draw.normal(*parameter.shape) / math.sqrt(E))
    return simple if kind == "simple" else simple.split()


def packed(module: Ours, take: Callable[[nn.Parameter], Tensor | None]) -> dict[str, Tensor]:
    """What ``take`` finds at each parameter, under the names and in the layout of PyTorch's module."""
    found = {name: take(parameter) for name, parameter in module.named_parameters()}
    result = {
        f"out_proj.{name}": found[f"out_proj.{name}"]
        for name, _ in module.out_proj.named_parameters()
    }
    for name, _ in module.out_proj.named_parameters():
        rows = (
            [found[f"qkv_proj.{name}"]]
            if isinstance(module, SimpleMultiHeadAttention)
            else [found[f"heads.{h}.{part}_proj.{name}"] for part in "qkv" for h in range(H)]
        )
        result[f"in_proj_{name}"] = torch.cat([row for row in rows if row is not None])
    return {name: tensor for name, tensor in result.items() if tensor is not None}


def torch_twin(module: Ours) -> nn.MultiheadAttention:
    """PyTorch's module with the same weights."""
    has_bias = module.out_proj.bias is not None
    twin = nn.MultiheadAttention(E, H, bias=has_bias, batch_first=True, dtype=torch.float64)
    twin.load_state_dict(packed(module, lambda parameter: parameter.detach()))
    return twin


def float_mask(causal: bool, mask: Tensor | None, bias: Tensor | None, keys: int) -> Tensor:
    """PyTorch's one additive mask, shape (b h, i, j)."""
    added = torch.zeros(B, H, I, keys, dtype=torch.float64)
    if bias is not None:
        added = added + bias
    if mask is not None:
        added = added.masked_fill(~mask, -math.inf)
    if causal:
        added = added.masked_fill(torch.ones(I, keys, dtype=torch.bool).triu(1), -math.inf)
    return added.flatten(0, 1)


def gradients(
    output: Tensor, upstream: Tensor, module: nn.Module, inputs: list[Tensor]
) -> list[Tensor]:
    """Gradients of the inputs; those of the parameters are left in their ``.grad``."""
    leaves = [*inputs, *module.parameters()]
    found = torch.autograd.grad(output, leaves, upstream)
    for parameter, gradient in zip(module.parameters(), found[len(inputs) :], strict=True):
        parameter.grad = gradient
    return list(found[: len(inputs)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("masking", ["no mask", "padding", "per head"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["no score bias", "score bias"])
@pytest.mark.parametrize("linear_bias", [False, True], ids=["no bias", "bias"])
def test_equals_torch_forward_and_backward(
    kind: str, source: str, causal: bool, masking: str, with_bias: bool, linear_bias: bool
) -> None:
    draw = Draw(1)
    module = build(kind, draw, bias=linear_bias, causal=causal)
    twin = torch_twin(module)
    keys = I if source == "self" else J
    lengths = [I, J, J][: SOURCES[source]]
    inputs = [draw.normal(B, n, E, grad=True) for n in lengths]
    mask = {
        "no mask": None,
        "padding": padding_mask(torch.tensor([keys, 2]), keys),
        "per head": draw.mask(B, H, I, keys),
    }[masking]
    bias = draw.normal(H, I, keys) if with_bias else None
    upstream = draw.normal(B, I, E)

    ours = module(*inputs, mask=mask, bias=bias, return_weights=True)
    query, key, value = (inputs[min(n, len(inputs) - 1)] for n in range(3))
    theirs = twin(
        query,
        key,
        value,
        attn_mask=float_mask(causal, mask, bias, keys),
        average_attn_weights=False,
    )
    assert_near(ours.output, theirs[0], MODULE)
    assert_near(ours.weights, theirs[1], MODULE)
    assert torch.equal(module(*inputs, mask=mask, bias=bias), ours.output)

    of_inputs = gradients(ours.output, upstream, module, inputs)
    for got, wanted in zip(of_inputs, gradients(theirs[0], upstream, twin, inputs), strict=True):
        assert_near(got, wanted, MODULE)
    of_parameters = packed(module, lambda parameter: parameter.grad)
    assert of_parameters.keys() == dict(twin.named_parameters()).keys()
    for name, parameter in twin.named_parameters():
        assert parameter.grad is not None
        assert_near(of_parameters[name], parameter.grad, MODULE)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_torch_on_random_sizes(kind: str) -> None:
    for draw in draws():
        heads, width = draw.size(1, 4), draw.size(1, 4)
        batch, queries, keys = draw.size(1, 3), draw.size(1, 6), draw.size(1, 6)
        embed_dim = heads * width
        simple = SimpleMultiHeadAttention(embed_dim, heads).double()
        twin = nn.MultiheadAttention(embed_dim, heads, batch_first=True, dtype=torch.float64)
        twin.load_state_dict(
            {
                name.replace("qkv_proj.", "in_proj_"): tensor
                for name, tensor in simple.state_dict().items()
            }
        )
        module = simple if kind == "simple" else simple.split()
        query, key, value = (draw.normal(batch, n, embed_dim) for n in (queries, keys, keys))
        assert_near(module(query, key, value), twin(query, key, value)[0], MODULE)
        assert_near(module(query), twin(query, query, query)[0], MODULE)


@pytest.mark.parametrize("kind", KINDS)
def test_one_tensor_three_times_is_self_attention(kind: str) -> None:
    draw = Draw(2)
    module, x = build(kind, draw), draw.normal(B, I, E)
    assert_near(module(x, x, x), module(x), MODULE)
    assert_near(module(x, x.clone()), module(x), MODULE)


@pytest.mark.parametrize("kind", KINDS)
def test_returns_weights_only_when_asked(kind: str) -> None:
    draw = Draw(3)
    module, x, memory = build(kind, draw), draw.normal(B, I, E), draw.normal(B, J, E)
    assert type(module(x, memory)) is Tensor
    result = module(x, memory, return_weights=True)
    assert type(result) is AttentionOutput
    assert result.output.shape == (B, I, E)
    assert result.weights.shape == (B, H, I, J)


@pytest.mark.parametrize("kind", KINDS)
def test_a_query_without_keys_gets_the_output_bias(kind: str) -> None:
    draw = Draw(4)
    module, x = build(kind, draw), draw.normal(B, I, E, grad=True)
    allowed = torch.ones(B, 1, I, I, dtype=torch.bool)
    allowed[0, :, 2] = False
    output = module(x, mask=allowed)
    assert torch.equal(output[0, 2], module.out_proj.bias)
    leaves = [x, *module.parameters()]
    assert all(found.isfinite().all() for found in torch.autograd.grad(output.sum(), leaves))


@pytest.mark.parametrize("kind", KINDS)
def test_causal_means_that_the_future_does_not_matter(kind: str) -> None:
    draw = Draw(5)
    module, x = build(kind, draw, causal=True), draw.normal(B, I, E)
    changed = torch.cat([x[:, :3], draw.normal(B, I - 3, E)], dim=1)
    before, after = module(x), module(changed)
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.isclose(before[:, 3:], after[:, 3:]).all(-1).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("return_weights", [False, True])
def test_training_and_evaluation_agree(kind: str, causal: bool, return_weights: bool) -> None:
    draw = Draw(6)
    module, x = build(kind, draw, causal=causal), draw.normal(B, I, E)
    mask, bias = draw.mask(B, 1, I, I), draw.normal(H, I, I)
    for options in ({}, {"mask": mask}, {"bias": bias}, {"mask": mask, "bias": bias}):
        trained = module.train()(x, **options, return_weights=return_weights)
        evaluated = module.eval()(x, **options, return_weights=return_weights)
        with torch.no_grad():
            without_gradient = module(x, **options, return_weights=return_weights)
        for other in (evaluated, without_gradient):
            assert all(map(torch.equal, trained, other))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_split_and_fuse_lose_nothing(
    dtype: torch.dtype, bias: bool, causal: bool, training: bool
) -> None:
    simple = build("simple", Draw(7), bias=bias, causal=causal).to(dtype).train(training)
    assert isinstance(simple, SimpleMultiHeadAttention)
    split = simple.split()
    again = split.fuse()
    assert_same_state(simple, again)
    assert_same_state(split, again.split())
    for module in (split, again):
        assert module.causal is causal
        assert all(part.training is training for part in module.modules())
        assert all(parameter.dtype == dtype for parameter in module.parameters())
        assert (module.out_proj.bias is not None) is bias


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


def test_split_gives_each_head_its_rows() -> None:
    simple = build("simple", Draw(8))
    assert isinstance(simple, SimpleMultiHeadAttention)
    split = simple.split()
    for part, name in enumerate(("q_proj", "k_proj", "v_proj")):
        for h in range(H):
            rows = slice(part * E + h * D, part * E + (h + 1) * D)
            linear = split.heads[h].get_submodule(name)
            assert torch.equal(linear.get_parameter("weight"), simple.qkv_proj.weight[rows])
            assert torch.equal(linear.get_parameter("bias"), simple.qkv_proj.bias[rows])


def test_split_and_fuse_copy() -> None:
    simple = build("simple", Draw(9))
    assert isinstance(simple, SimpleMultiHeadAttention)
    split = simple.split()
    fused = split.fuse()
    before = copy.deepcopy(fused.state_dict())
    with torch.no_grad():
        for parameter in [*simple.parameters(), *split.parameters()]:
            parameter.zero_()
    assert all(torch.equal(before[name], tensor) for name, tensor in fused.state_dict().items())
    assert all(parameter.requires_grad for parameter in [*split.parameters(), *fused.parameters()])


def test_split_and_fuse_on_the_meta_device() -> None:
    simple = SimpleMultiHeadAttention(E, H).to("meta")
    split = simple.split()
    assert all(parameter.is_meta for parameter in split.parameters())
    assert all(parameter.is_meta for parameter in split.fuse().parameters())
    assert split(torch.zeros(B, I, E, device="meta")).shape == (B, I, E)


def test_a_removed_head_is_a_head_that_adds_nothing() -> None:
    draw = Draw(10)
    module, x = build("split", draw), draw.normal(B, I, E)
    assert isinstance(module, SplitMultiHeadAttention)
    silent = copy.deepcopy(module)
    with torch.no_grad():
        silent.out_proj.weight[:, D : 2 * D] = 0
    del module.heads[1]
    kept = nn.Linear(2 * D, E).double()
    weight = silent.out_proj.weight
    kept.load_state_dict(
        {
            "weight": torch.cat([weight[:, :D], weight[:, 2 * D :]], dim=1),
            "bias": silent.out_proj.bias,
        }
    )
    module.out_proj = kept
    assert module.num_heads == 2
    assert_near(module(x), silent(x), MODULE)
    assert module(x, return_weights=True).weights.shape == (B, 2, I, I)
    with pytest.raises(ValueError, match="got 2 heads of head_dim=4"):
        module.fuse()


def test_a_frozen_head_gets_no_gradient() -> None:
    draw = Draw(11)
    module = build("split", draw)
    assert isinstance(module, SplitMultiHeadAttention)
    module.heads[1].requires_grad_(False)
    torch.autograd.backward(module(draw.normal(B, I, E)).square().sum())
    touched = [all(p.grad is not None for p in head.parameters()) for head in module.heads]
    assert touched == [True, False, True]


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_files_keep_everything(kind: str) -> None:
    draw = Draw(12)
    module, x = build(kind, draw, causal=True), draw.normal(B, I, E)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    loaded = build(kind, Draw(99), causal=True)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert_same_state(module, twin)
        assert torch.equal(twin(x), module(x))


def test_names_in_the_state_dict() -> None:
    simple = SimpleMultiHeadAttention(E, H)
    assert {name: tuple(tensor.shape) for name, tensor in simple.state_dict().items()} == {
        "qkv_proj.weight": (3 * E, E),
        "qkv_proj.bias": (3 * E,),
        "out_proj.weight": (E, E),
        "out_proj.bias": (E,),
    }
    split = {f"heads.{h}.{part}_proj" for h in range(H) for part in "qkv"} | {"out_proj"}
    names = {f"{module}.{name}" for module in split for name in ("weight", "bias")}
    assert SplitMultiHeadAttention(E, H).state_dict().keys() == names


@pytest.mark.parametrize("kind", KINDS)
def test_attributes(kind: str) -> None:
    module = build(kind, Draw(13))
    assert (module.embed_dim, module.num_heads, module.head_dim) == (E, H, D)
    assert module.causal is False


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_fire_once_on_every_submodule(kind: str) -> None:
    draw = Draw(14)
    module = build(kind, draw)
    calls: list[str] = []
    watched = [
        name
        for name, part in module.named_modules()
        if name and not isinstance(part, nn.ModuleList)
    ]
    for name in watched:
        part = module.get_submodule(name)
        part.register_forward_hook(lambda *_, name=name: calls.append(name))
    module(draw.normal(B, I, E))
    assert sorted(calls) == sorted(watched)
    assert len(watched) == (2 if kind == "simple" else 1 + 4 * H)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind: str) -> None:
    draw = Draw(15)
    module, x = build(kind, draw), draw.normal(B, I, E)
    wanted = module(x)
    got = copy.deepcopy(module).bfloat16()(x.bfloat16(), return_weights=True)
    assert got.output.dtype == got.weights.dtype == torch.bfloat16
    assert_near(got.output, wanted, HALF_STEP)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_takes_inputs_of_any_dtype(kind: str) -> None:
    draw = Draw(16)
    module, x = build(kind, draw).float(), draw.normal(B, I, E, dtype=torch.float32)
    memory = draw.normal(B, J, E, dtype=torch.float32)
    wanted = module(x, memory)
    with torch.autocast("cpu", torch.bfloat16):
        got = module(x, memory.bfloat16())
    assert got.dtype == torch.bfloat16
    assert_near(got, wanted, HALF_STEP)
