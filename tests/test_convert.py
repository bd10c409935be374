"""mha_lib.convert: the same numbers as the source, forward and backward, or an error that names what does not fit.

What needs transformers or timm is skipped where they are not installed; state dicts in their layouts are made here.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from mha_lib import (
    KVCache,
    MultiHeadAttention,
    RotaryEmbedding,
    SimpleMultiHeadAttention,
    SplitMultiHeadAttention,
    causal_mask,
    convert,
    padding_mask,
)
from tests.peers import (
    BERT,
    FULL,
    GPT2,
    LLAMA,
    PEERS,
    ROPE,
    Fed,
    Holder,
    Peer,
    of_transformers,
    timm_attention,
)
from tests.support import Draw, assert_near
from tests.test_multihead import build, in_torch_names
from tests.test_peers_themselves import answer, dtype_of
from tests.tolerances import CONVERTED, HALF_STEP, MODULE, ROTATED, Tolerance

Tensors = dict[str, Tensor]
Loader = Callable[..., MultiHeadAttention]
REFUSED = (TypeError, ValueError)
B, N, E, H = 2, 7, 12, 3
PARTS = ("q_proj", "k_proj", "v_proj", "out_proj")
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:]
)


# What the tests share


def needs(package: str) -> None:
    """Skip where a package is missing; timm cannot be imported whole, so only its place is looked up."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def drawn(module: Any, seed: int = 1) -> Any:
    """Every parameter is drawn, biases too, so large that each head looks somewhere else."""
    draw = Draw(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            spread = 0.5 * math.sqrt(min(parameter.shape)) if parameter.dim() > 1 else 1
            parameter.copy_(draw.normal(*parameter.shape) / spread)
    return module


def assert_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same names, and the same bits in the same dtypes."""
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=0, msg=name)


def snapshot(tensors: Mapping[str, Tensor]) -> Tensors:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_is_new(module: MultiHeadAttention, source: Mapping[str, Tensor]) -> None:
    """Trainable leaves, contiguous, and each with memory of its own."""
    tensors: Tensors = dict(module.named_parameters())
    assert all(
        one.requires_grad and one.is_leaf and one.is_contiguous() for one in tensors.values()
    )
    places = [one.untyped_storage().data_ptr() for one in tensors.values()]
    assert len(set(places)) == len(places)
    assert not set(places) & {one.untyped_storage().data_ptr() for one in source.values()}
    before = snapshot(source)
    mine: Tensors = snapshot(tensors)
    with torch.no_grad():
        for one in tensors.values():
            one.add_(1)
        assert_same(source, before)
        for one in source.values():
            one.zero_()
        for name, one in tensors.items():
            assert_same({name: one}, {name: mine[name] + 1})
            one.copy_(mine[name])
        for name, one in source.items():
            one.copy_(before[name])


def assert_equal_functions(
    module: MultiHeadAttention,
    ours: Callable[[Tensor], Tensor],
    theirs: Callable[[Tensor], Tensor],
    leaves: Mapping[str, Tensor],
    renamed: Callable[[Tensors], Tensors],
    tolerance: Tolerance,
    *,
    shape: tuple[int, ...] = (B, N, E),
) -> None:
    """Outputs, gradients of the input, and those of the weights under our names."""
    draw = Draw(3)
    dtype = next(module.parameters()).dtype
    x = draw.normal(*shape, dtype=dtype, grad=True)
    wanted, got = theirs(x), ours(x)
    assert got.dtype == wanted.dtype
    assert_near(got, wanted, tolerance)
    upstream = draw.normal(*wanted.shape, dtype=dtype)
    grads = torch.autograd.grad(wanted, [x, *leaves.values()], upstream)
    mine = torch.autograd.grad(got, [x, *module.parameters()], upstream)
    assert_near(mine[0], grads[0], tolerance)
    expected = renamed(dict(zip(leaves, grads[1:], strict=True)))
    found = dict(zip(dict(module.named_parameters()), mine[1:], strict=True))
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        assert_near(found[name], gradient, tolerance)


def first(output: Any) -> Any:
    return output[0] if isinstance(output, (tuple, list)) else output


# PyTorch's module


def from_packed(tensors: Tensors) -> Tensors:
    """PyTorch's names, in_proj packed or apart, to ours."""
    named = {name: tensors[name] for name in tensors if name.startswith("out_proj")}
    for letter, part in zip("qkv", range(3), strict=True):
        weight = tensors.get(f"{letter}_proj_weight")
        named[f"{letter}_proj.weight"] = (
            tensors["in_proj_weight"].chunk(3)[part] if weight is None else weight
        )
        if "in_proj_bias" in tensors:
            named[f"{letter}_proj.bias"] = tensors["in_proj_bias"].chunk(3)[part]
    return named


def torch_module(**options: Any) -> nn.MultiheadAttention:
    module: nn.MultiheadAttention = drawn(nn.MultiheadAttention(E, H, **options))
    return module


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize(("kdim", "vdim"), [(None, None), (8, None), (None, 5), (8, 5), (5, 8)])
@pytest.mark.parametrize("masking", ["none", "padding", "causal"])
def test_equals_torch(bias: bool, kdim: int | None, vdim: int | None, masking: str) -> None:
    source = torch_module(
        bias=bias, kdim=kdim, vdim=vdim, batch_first=True, dropout=0.25, dtype=torch.float64
    ).eval()
    module = convert.from_torch(source)
    assert not module.training
    draw = Draw(2)
    key, value = draw.normal(B, N, kdim or E), draw.normal(B, N, vdim or E)
    keep = padding_mask([N, 3], N)  # True where a key is there
    hidden = ~causal_mask(N, N, query_offset=0)
    mask = {"none": None, "padding": keep, "causal": ~hidden}[masking]
    given = {"none": {}, "padding": {"key_padding_mask": ~keep[:, 0, 0]}, "causal": {}}[masking]
    if masking == "causal":
        given = {"attn_mask": hidden}
    leaves = dict(source.named_parameters())
    assert_same(module.state_dict(), from_packed(snapshot(leaves)))
    assert_is_new(module, leaves)
    assert_equal_functions(
        module,
        lambda x: module(x, key, value, mask=mask),
        lambda x: source(x, key, value, **given)[0],
        leaves,
        from_packed,
        MODULE,
    )


@DTYPES
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_from_torch_keeps(dtype: torch.dtype, training: bool) -> None:
    source = torch_module(dropout=0.25, dtype=dtype).train(training).requires_grad_(False)
    module = convert.from_torch(source)
    assert (module.embed_dim, module.num_heads, module.num_kv_heads) == (E, H, H)
    assert (module.dropout, module.training, module.causal) == (0.25, training, False)
    assert module.q_proj.training is training
    assert_same(module.state_dict(), from_packed(dict(source.named_parameters())))
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert not any(parameter.requires_grad for parameter in source.parameters())
    assert source.training is training


@pytest.mark.parametrize("option", ["add_bias_kv", "add_zero_attn"])
def test_from_torch_refuses(option: str) -> None:
    with pytest.raises(ValueError, match=option):
        convert.from_torch(torch_module(**{option: True}))


def test_batch_first_changes_no_weight() -> None:
    both = [convert.from_torch(torch_module(batch_first=flag)) for flag in (False, True)]
    assert_same(both[0].state_dict(), both[1].state_dict())


@DTYPES
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize(("kdim", "vdim"), [(None, None), (8, 5), (None, 5)])
def test_torch_round_trip(
    dtype: torch.dtype, bias: bool, kdim: int | None, vdim: int | None
) -> None:
    ours = build(
        Draw(4),
        embed_dim=E,
        num_heads=H,
        kdim=kdim,
        vdim=vdim,
        bias=bias,
        dropout=0.25,
        dtype=dtype,
    ).eval()
    twin = convert.to_torch(ours)
    assert (twin.batch_first, twin.dropout, twin.training) == (True, 0.25, False)
    assert all(parameter.requires_grad for parameter in twin.parameters())
    packed = kdim is vdim is None
    assert_same(twin.state_dict(), in_torch_names(dict(ours.state_dict()), packed=packed))
    back = convert.from_torch(twin)
    assert_same(back.state_dict(), ours.state_dict())
    assert repr(back) == repr(ours)
    assert_same(convert.to_torch(back).state_dict(), twin.state_dict())
    assert_is_new(back, dict(twin.named_parameters()))
    query, key, value = (Draw(5).normal(B, N, size or E, dtype=dtype) for size in (E, kdim, vdim))
    near = HALF_STEP if dtype == torch.bfloat16 else ROTATED
    assert_near(twin(query, key, value)[0], ours(query, key, value), near)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("num_kv_heads", {"num_kv_heads": 1}),
        ("head_dim", {"head_dim": 6}),
        ("causal", {"causal": True}),
        ("window", {"window": 2}),
        ("rotary", {"rotary": RotaryEmbedding(4)}),
        ("qk_norm", {"qk_norm": nn.LayerNorm}),
        ("scale", {"scale": 0.7}),
        ("softcap", {"softcap": 1.5}),
        ("sinks", {"sinks": True}),
        ("out_bias", {"bias": False, "out_bias": True}),
        ("out_bias", {"bias": True, "out_bias": False}),
    ],
)
def test_to_torch_refuses_by_name(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=name):
        convert.to_torch(MultiHeadAttention(E, H, **options))


def test_to_torch_allows_what_is_the_default() -> None:
    module = MultiHeadAttention(E, H, num_kv_heads=H, head_dim=E // H, out_bias=True)
    assert_same(convert.from_torch(convert.to_torch(module)).state_dict(), module.state_dict())


# The modules of chapters 2 and 3


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_equals_simple_and_split(bias: bool, causal: bool, training: bool) -> None:
    simple: SimpleMultiHeadAttention = drawn(
        SimpleMultiHeadAttention(E, H, bias=bias, causal=causal).double()
    )
    simple.requires_grad_(False).train(training)
    split = simple.split().requires_grad_(False)
    packed: Tensors = {
        name.replace("qkv_proj.", "in_proj_"): t for name, t in simple.named_parameters()
    }
    x = Draw(6).normal(B, N, E)
    for source, module in [
        (simple, convert.from_simple(simple)),
        (split, convert.from_split(split)),
    ]:
        assert (module.causal, module.training, module.num_heads) == (causal, training, H)
        assert_same(module.state_dict(), from_packed(packed))
        assert_is_new(module, dict(source.named_parameters()))
        assert not any(parameter.requires_grad for parameter in source.parameters())
        assert_near(module(x), source(x), MODULE)


def test_from_split_without_a_head() -> None:
    """Fewer heads than fill the width: the same numbers or an error."""
    split: SplitMultiHeadAttention = drawn(SimpleMultiHeadAttention(E, H).double()).split()
    del split.heads[1]
    split.out_proj = drawn(nn.Linear(E - E // H, E).double())
    x = Draw(6).normal(B, N, E)
    try:
        module = convert.from_split(split)
    except REFUSED:
        return
    assert_near(module(x), split(x), MODULE)


@pytest.mark.parametrize("name", ["from_torch", "to_torch", "from_simple", "from_split"])
@pytest.mark.parametrize(
    "wrong",
    [None, [], 3, {}, nn.Linear(E, E), nn.Identity(), SimpleMultiHeadAttention],
    ids=lambda wrong: type(wrong).__name__,
)
def test_one_module_for_another_is_an_error(name: str, wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"got|Attention"):
        getattr(convert, name)(wrong)


# State dicts in the layouts of others


def chosen(names: Mapping[str, str]) -> Callable[[Tensors], Tensors]:
    """Four linear layers under other names."""
    return lambda tensors: {
        f"{ours}.{kind}": tensors[f"{theirs}.{kind}"]
        for ours, theirs in names.items()
        for kind in ("weight", "bias")
        if f"{theirs}.{kind}" in tensors
    }


def from_gpt2_names(tensors: Tensors) -> Tensors:
    """Conv1D keeps its weight transposed."""
    packed = {
        "in_proj_weight": tensors["c_attn.weight"].T,
        "in_proj_bias": tensors["c_attn.bias"],
        "out_proj.weight": tensors["c_proj.weight"].T,
        "out_proj.bias": tensors["c_proj.bias"],
    }
    return from_packed(packed)


def from_timm_names(tensors: Tensors) -> Tensors:
    new = {"qkv.": "in_proj_", "proj.": "out_proj."}
    parts = {name: name.partition(".") for name in tensors}
    return from_packed(
        {new[one + "."] + kind: tensors[name] for name, (one, _, kind) in parts.items()}
    )


NAMES = {
    "bert": ("self.query", "self.key", "self.value", "output.dense"),
    "vit, transformers 4": ("attention.query", "attention.key", "attention.value", "output.dense"),
    "vit, transformers 5": ("q_proj", "k_proj", "v_proj", "o_proj"),
}


def linear_shapes(names: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.{kind}": (E,) * n for name in names for kind, n in [("weight", 2), ("bias", 1)]
    }


def ours_of(names: tuple[str, ...]) -> Callable[[Tensors], Tensors]:
    return chosen(dict(zip(PARTS, names, strict=True)))


@dataclass
class Layout:
    """Where others keep the same tensors: the loader, the shapes, and what a state dict does not tell."""

    load: Loader
    shapes: dict[str, tuple[int, ...]]
    ours: Callable[[Tensors], Tensors]
    told: dict[str, Any] = field(default_factory=lambda: {"num_heads": H})
    is_: dict[str, Any] = field(default_factory=dict)
    """What the result must be."""
    free: tuple[str, ...] = ()
    """Keys that may be missing."""

    def state(
        self, prefix: str = "", *, seed: int = 7, dtype: torch.dtype = torch.float64
    ) -> Tensors:
        draw = Draw(seed)
        return {
            prefix + name: draw.normal(*shape, dtype=dtype) for name, shape in self.shapes.items()
        }


KEYS, WIDE = 2, 6
LLAMA_ROTARY = RotaryEmbedding(WIDE)
LAYOUTS = {
    "bert": Layout(convert.from_bert, linear_shapes(NAMES["bert"]), ours_of(NAMES["bert"])),
    "gpt2": Layout(
        convert.from_gpt2,
        {
            "c_attn.weight": (E, 3 * E),
            "c_attn.bias": (3 * E,),
            "c_proj.weight": (E, E),
            "c_proj.bias": (E,),
        },
        from_gpt2_names,
        is_={"causal": True},
    ),
    **{
        name: Layout(convert.from_vit, linear_shapes(NAMES[name]), ours_of(NAMES[name]))
        for name in ("vit, transformers 4", "vit, transformers 5")
    },
    "timm": Layout(
        convert.from_vit,
        {
            "qkv.weight": (3 * E, E),
            "qkv.bias": (3 * E,),
            "proj.weight": (E, E),
            "proj.bias": (E,),
        },
        from_timm_names,
        free=("qkv.bias", "proj.bias"),
    ),
    "timm, no qkv bias": Layout(
        convert.from_vit,
        {"qkv.weight": (3 * E, E), "proj.weight": (E, E), "proj.bias": (E,)},
        from_timm_names,
        free=("proj.bias",),
    ),
    "llama": Layout(
        convert.from_llama,
        {
            "q_proj.weight": (4 * WIDE, E),
            "k_proj.weight": (KEYS * WIDE, E),
            "v_proj.weight": (KEYS * WIDE, E),
            "o_proj.weight": (E, 4 * WIDE),
        },
        ours_of(NAMES["vit, transformers 5"]),
        {"num_heads": 4, "rotary": LLAMA_ROTARY},
        {"causal": True, "num_kv_heads": KEYS, "head_dim": WIDE, "rotary": LLAMA_ROTARY},
    ),
    "qwen2": Layout(
        convert.from_llama,
        {
            **{f"{name}_proj.weight": (E, E) for name in "qkvo"},
            **{f"{name}_proj.bias": (E,) for name in "qkv"},
        },
        ours_of(NAMES["vit, transformers 5"]),
        {"num_heads": H, "rotary": RotaryEmbedding(4)},
        {"causal": True, "num_kv_heads": H, "head_dim": 4},
    ),
}
EVERY = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
TENSORS = [(layout, key) for layout in LAYOUTS.values() for key in layout.shapes]
EACH = pytest.mark.parametrize(
    ("layout", "key"),
    TENSORS,
    ids=[f"{name} {key}" for name, layout in LAYOUTS.items() for key in layout.shapes],
)
PREFIX = "layers.1.attn"


@EVERY
@DTYPES
@pytest.mark.parametrize(
    ("held", "prefix"), [("", ""), (f"{PREFIX}.", PREFIX), (f"{PREFIX}.", f"{PREFIX}.")]
)
def test_state_dicts(layout: Layout, dtype: torch.dtype, held: str, prefix: str) -> None:
    source = layout.state(held, dtype=dtype)
    beside = {f"layers.{n}.attn.{name}": t + 1 for n in (0, 10) for name, t in source.items()}
    beside["layers.1.attn_norm.weight"] = torch.ones(3, dtype=torch.float32)
    whole = {**beside, **source} if held else source
    before = snapshot(whole)
    module = layout.load(whole, prefix, **layout.told)
    assert_same(whole, before)
    expected = layout.ours({name.removeprefix(held): tensor for name, tensor in source.items()})
    assert_same(module.state_dict(), expected)
    assert_is_new(module, source)
    assert (module.num_heads, module.embed_dim) == (layout.told["num_heads"], E)
    for name, value in {"window": None, "softcap": None, "causal": False, **layout.is_}.items():
        assert repr(getattr(module, name)) == repr(value), name
    if "rotary" not in layout.told:
        assert module.rotary is None
    assert (module.q_norm, module.sinks) == (None, None)
    assert module.scale in (None, pytest.approx(module.head_dim**-0.5))


@EVERY
def test_parameters_as_tensors(layout: Layout) -> None:
    """Values that need gradients and are views into something larger."""
    plain = layout.state()
    views = {
        name: nn.Parameter(torch.stack([tensor, tensor], -1))[..., 0]
        for name, tensor in plain.items()
    }
    module = layout.load(views, **layout.told)
    assert_same(module.state_dict(), layout.ours(plain))
    assert_is_new(module, {name: view.detach() for name, view in views.items()})


@EVERY
def test_copies_and_state_dict(layout: Layout) -> None:
    module = layout.load(layout.state(), **layout.told)
    x = Draw(8).normal(B, N, E)
    assert_near(copy.deepcopy(module)(x), module(x), MODULE)
    other = layout.load(layout.state(seed=9), **layout.told)
    other.load_state_dict(module.state_dict(), strict=True)
    assert_near(other(x), module(x), MODULE)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2"])
def test_a_cache_changes_nothing(name: str) -> None:
    layout = LAYOUTS[name]
    module = layout.load(layout.state(), **layout.told).eval()
    x = Draw(8).normal(B, N, E)
    cache = KVCache(B, module.num_kv_heads, module.head_dim, max_length=N, dtype=torch.float64)
    with torch.no_grad():
        steps = [module(part, cache=cache) for part in torch.split(x, [3, 1, 1, 2], dim=1)]
        assert_near(torch.cat(steps, dim=1), module(x), ROTATED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8])
def test_old_buffers_of_gpt2_are_ignored(dtype: torch.dtype) -> None:
    layout = LAYOUTS["gpt2"]
    source = layout.state("h.0.attn.")
    buffers = {
        "h.0.attn.bias": torch.ones(1, 1, 16, 16).tril().to(dtype),
        "h.0.attn.masked_bias": torch.tensor(-1e4, dtype=torch.float32),
    }
    module = convert.from_gpt2({**buffers, **source}, "h.0.attn", num_heads=H)
    plain = convert.from_gpt2(source, "h.0.attn", num_heads=H)
    assert_same(module.state_dict(), plain.state_dict())


def test_the_norm_of_bert_is_left() -> None:
    layout = LAYOUTS["bert"]
    norm = {f"output.LayerNorm.{kind}": torch.ones(E) for kind in ("weight", "bias")}
    module = convert.from_bert({**layout.state(), **norm}, num_heads=H)
    assert_same(module.state_dict(), layout.ours(layout.state()))


# What does not fit is an error with a name


def refusal(layout: Layout, source: Any, *args: Any, **changed: Any) -> str:
    """The message with which a source is refused."""
    with pytest.raises(REFUSED) as caught:
        layout.load(source, *args, **{**layout.told, **changed})
    return str(caught.value)


@EACH
def test_missing_keys(layout: Layout, key: str) -> None:
    if key in layout.free:
        return
    source = layout.state(f"{PREFIX}.")
    del source[f"{PREFIX}.{key}"]
    before = snapshot(source)
    assert f"{PREFIX}.{key}" in refusal(layout, source, PREFIX)
    assert_same(source, before)


def narrowed(tensor: Tensor) -> Tensor:
    return tensor[:-1]


def thinned(tensor: Tensor) -> Tensor:
    return tensor[..., :-1]


@EACH
@pytest.mark.parametrize(
    "change",
    [narrowed, thinned, lambda t: t[None], lambda t: t[..., None], torch.sum, lambda t: t[:0]],
    ids=["a row less", "a column less", "a dim before", "a dim behind", "scalar", "empty"],
)
def test_wrong_shapes(layout: Layout, key: str, change: Callable[[Tensor], Tensor]) -> None:
    source = layout.state(f"{PREFIX}.")
    changed = change(source[f"{PREFIX}.{key}"])
    message = refusal(layout, {**source, f"{PREFIX}.{key}": changed}, PREFIX)
    assert f"{PREFIX}." in message
    assert f"{PREFIX}.{key}" in message or any(str(size) in message for size in changed.shape)


@EACH
def test_transposed_tensors(layout: Layout, key: str) -> None:
    """Conv1D for Linear and the other way round, where the shape tells."""
    source = layout.state(f"{PREFIX}.")
    tensor = source[f"{PREFIX}.{key}"]
    if tensor.dim() == 1 or tensor.shape[0] == tensor.shape[1]:
        return
    if (layout.told["num_heads"], key[0]) == (4, "k"):
        return
    assert f"{PREFIX}." in refusal(layout, {**source, f"{PREFIX}.{key}": tensor.T}, PREFIX)


@EACH
@pytest.mark.parametrize(
    "change",
    [torch.Tensor.int, torch.Tensor.bool, lambda t: None, lambda t: t.tolist(), lambda t: 1.0],
    ids=["integers", "booleans", "None", "list", "number"],
)
def test_wrong_values(layout: Layout, key: str, change: Callable[[Tensor], Any]) -> None:
    source: dict[str, Any] = layout.state(f"{PREFIX}.")
    source[f"{PREFIX}.{key}"] = change(source[f"{PREFIX}.{key}"])
    assert f"{PREFIX}.{key}" in refusal(layout, source, PREFIX)


@EACH
@pytest.mark.parametrize(
    ("change", "what"),
    [
        (torch.Tensor.float, "float32"),
        (torch.Tensor.bfloat16, "bfloat16"),
        (lambda tensor: tensor.to("meta"), "meta"),
    ],
    ids=["float32", "bfloat16", "meta"],
)
def test_mixed_tensors(
    layout: Layout, key: str, change: Callable[[Tensor], Tensor], what: str
) -> None:
    source = layout.state(f"{PREFIX}.")
    source[f"{PREFIX}.{key}"] = change(source[f"{PREFIX}.{key}"])
    message = refusal(layout, source, PREFIX)
    assert f"{PREFIX}." in message
    assert what in message


@EVERY
@pytest.mark.parametrize(
    "key", ["q_norm.weight", "self.distance_embedding.weight", "q_attn.weight"]
)
def test_extra_keys(layout: Layout, key: str) -> None:
    source = {**layout.state(f"{PREFIX}."), f"{PREFIX}.{key}": torch.ones(4, dtype=torch.float64)}
    assert f"{PREFIX}.{key}" in refusal(layout, source, PREFIX)


@EVERY
@pytest.mark.parametrize("prefix", ["", "layers", "layers.1", "layers.2.attn", "layers.1.att", "."])
def test_wrong_prefixes_show_right_ones(layout: Layout, prefix: str) -> None:
    assert PREFIX in refusal(layout, layout.state(f"{PREFIX}."), prefix)


@EVERY
def test_nothing_at_all(layout: Layout) -> None:
    refusal(layout, {})
    refusal(layout, {}, PREFIX)
    refusal(layout, {"something.else": torch.ones(3, 3)}, PREFIX)


@EVERY
@pytest.mark.parametrize("prefix", [None, 3, b"layers", ["layers"]], ids=str)
def test_prefixes_of_a_wrong_type(layout: Layout, prefix: Any) -> None:
    assert "prefix" in refusal(layout, layout.state(), prefix)


@EVERY
@pytest.mark.parametrize(
    "key", [1, None, ("q_proj", "weight"), b"q_proj.weight"], ids=lambda key: type(key).__name__
)
def test_keys_that_are_no_strings(layout: Layout, key: Any) -> None:
    message = refusal(layout, {**layout.state(), key: torch.ones(3)})
    assert type(key).__name__ in message or repr(key) in message


@EVERY
@pytest.mark.parametrize(
    "source",
    [None, [], "model.safetensors", 3, torch.ones(3, 3), nn.Linear, nn.Linear(E, E), nn.Identity()],
    ids=lambda source: type(source).__name__,
)
def test_sources_of_a_wrong_type(layout: Layout, source: Any) -> None:
    assert refusal(layout, source)


@EVERY
@pytest.mark.parametrize("heads", [None, True, 2.0, "3", 0, -3, 5, 1000], ids=repr)
def test_wrong_numbers_of_heads(layout: Layout, heads: Any) -> None:
    assert "num_heads" in refusal(layout, layout.state(), num_heads=heads)


@pytest.mark.parametrize(
    "rotary",
    [None, "default", 10000.0, RotaryEmbedding(WIDE + 2), RotaryEmbedding],
    ids=["missing", "string", "number", "too wide", "class"],
)
def test_llama_wants_a_rotary(rotary: Any) -> None:
    layout = LAYOUTS["llama"]
    assert "rotary" in refusal(layout, layout.state(), rotary=rotary)


@EVERY
def test_meta_tensors_stay_there_or_are_refused(layout: Layout) -> None:
    source = {name: tensor.to("meta") for name, tensor in layout.state().items()}
    try:
        module = layout.load(source, **layout.told)
    except REFUSED:
        return
    assert {parameter.device.type for parameter in module.parameters()} == {"meta"}


# Modules of transformers, within the masks and positions of their models


@dataclass
class Family:
    """A small model, its attention, and how to load it."""

    load: Loader
    model: str
    kind: str
    settings: dict[str, Any]
    attention: str
    layout: str
    dropout: str = "attention_dropout"
    is_: dict[str, Any] = field(default_factory=dict)
    layer: int = 1

    def build(self, **changed: Any) -> Any:
        needs("transformers")
        settings = {**SMALL, **self.settings, **changed}
        config = f"{self.kind.removesuffix('Model')}Config"
        return drawn(of_transformers(self.model, self.kind, config, settings)).double().eval()

    def path(self, model: Any) -> str:
        """Where the attention of the layer lies."""
        paths = [
            name for name, one in model.named_modules() if type(one).__name__ == self.attention
        ]
        return str(paths[self.layer])

    def inputs(self, padded: bool) -> dict[str, Tensor]:
        if self.layout.startswith("vit"):
            return {"pixel_values": Draw(12).normal(B, 3, 4, 4)}
        ids = torch.randint(3, 50, (B, N), generator=torch.Generator().manual_seed(11))
        return {"input_ids": ids, **({"attention_mask": KEEP.long()} if padded else {})}

    def alone(self, model: Any, attention: Any, padded: bool) -> tuple[Any, tuple[int, ...]]:
        """The attention as a function of its tokens, with all else that the model gave it, and their shape."""
        inner, outer = attention, nn.Identity()
        if self.layout == "bert":
            inner, outer = attention.self, attention.output.dense
        calls: list[tuple[Any, Any]] = []
        hook = inner.register_forward_pre_hook(
            lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
        )
        with torch.no_grad():
            model(**self.inputs(padded))
        hook.remove()
        args, kwargs = calls[0]
        rest = {
            name: value
            for name, value in kwargs.items()
            if name not in ("hidden_states", "past_key_values")
        }
        tokens = args[0] if args else kwargs["hidden_states"]
        assert not [one for one in args[1:] if one is not None and not isinstance(one, Tensor)]
        return lambda x: outer(first(inner(x, *args[1:], **rest))), tuple(tokens.shape)


KEEP = torch.arange(N) < torch.tensor([[N], [4]])
SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "num_hidden_layers": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 64,
}
STEEP = {"rope_theta": 10000.0, "factor": 8.0}
LINEAR = {**STEEP, "rope_type": "linear"}
LLAMA3 = {
    **STEEP,
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 100,
}
"""Of the frequencies 1, 0.1, 0.01 and 0.001, one stays, one lies between, and two are divided."""
bert = partial(
    Family, convert.from_bert, settings=BERT, layout="bert", dropout="attention_probs_dropout_prob"
)
gpt2 = partial(
    Family,
    convert.from_gpt2,
    "gpt2",
    "GPT2Model",
    attention="GPT2Attention",
    layout="gpt2",
    dropout="attn_pdrop",
)
vit = partial(
    Family,
    convert.from_vit,
    layout="vit, transformers 5",
    dropout="attention_probs_dropout_prob",
)
IMAGES = {**BERT, "image_size": 4, "patch_size": 2}
GPT2_SMALL = {**GPT2, "use_cache": False}
llama = partial(Family, convert.from_llama, layout="llama")
THREE = {**LLAMA, "sliding_window": 3}
QWEN = {
    **THREE,
    "use_sliding_window": True,
    "layer_types": ["full_attention", "sliding_attention"],
}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "experts_implementation": "eager"}
CAUSAL = {"causal": True}
FAMILIES = {
    "bert": bert("bert", "BertModel", attention="BertAttention"),
    "roberta": bert("roberta", "RobertaModel", attention="RobertaAttention"),
    "electra": bert("electra", "ElectraModel", attention="ElectraAttention"),
    "camembert": bert("camembert", "CamembertModel", attention="CamembertAttention"),
    "xlm-roberta": bert("xlm_roberta", "XLMRobertaModel", attention="XLMRobertaAttention"),
    "gpt2": gpt2(GPT2_SMALL, is_=CAUSAL),
    "gpt2, scaled by layer": gpt2({**GPT2_SMALL, "scale_attn_by_inverse_layer_idx": True}),
    "gpt2, not scaled": gpt2({**GPT2_SMALL, "scale_attn_weights": False}, is_={"scale": 1.0}),
    "gpt2, scaled by layer alone": gpt2(
        {**GPT2_SMALL, "scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
        is_={"scale": 0.5},
    ),
    "vit": vit("vit", "ViTModel", IMAGES, "ViTAttention"),
    "vit, no bias": vit("vit", "ViTModel", {**IMAGES, "qkv_bias": False}, "ViTAttention"),
    "deit": vit("deit", "DeiTModel", IMAGES, "DeiTAttention"),
    "dinov2": vit("dinov2", "Dinov2Model", IMAGES, "Dinov2Attention"),
    "llama": llama("llama", "LlamaModel", LLAMA, "LlamaAttention", is_=CAUSAL),
    "llama, all heads": llama("llama", "LlamaModel", FULL, "LlamaAttention"),
    "llama, bias": llama(
        "llama", "LlamaModel", {**LLAMA, "attention_bias": True}, "LlamaAttention"
    ),
    "llama, wide heads": llama(
        "llama", "LlamaModel", {**LLAMA, "head_dim": 12}, "LlamaAttention", is_={"head_dim": 12}
    ),
    "llama, linear": llama(
        "llama", "LlamaModel", {**LLAMA, "rope_parameters": LINEAR}, "LlamaAttention"
    ),
    "llama, llama3": llama(
        "llama", "LlamaModel", {**LLAMA, "rope_parameters": LLAMA3}, "LlamaAttention"
    ),
    "mistral": llama("mistral", "MistralModel", THREE, "MistralAttention", is_={"window": 3}),
    "mistral, no window": llama(
        "mistral",
        "MistralModel",
        {**LLAMA, "sliding_window": None},
        "MistralAttention",
        is_={"window": None},
    ),
    "qwen2": llama("qwen2", "Qwen2Model", LLAMA, "Qwen2Attention", is_={"window": None}),
    "qwen2, full layer": llama(
        "qwen2", "Qwen2Model", QWEN, "Qwen2Attention", is_={"window": None}, layer=0
    ),
    "qwen2, sliding layer": llama("qwen2", "Qwen2Model", QWEN, "Qwen2Attention", is_={"window": 3}),
    "mixtral": llama("mixtral", "MixtralModel", {**THREE, **EXPERTS}, "MixtralAttention"),
}
FAMILY = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def near(family: Family) -> Tolerance:
    """Angles of rotary positions are float32 on both sides."""
    return ROTATED if family.layout == "llama" else CONVERTED


def assert_source(
    family: Family, model: Any, path: str, module: MultiHeadAttention, padded: bool
) -> None:
    source = model.get_submodule(path)
    theirs, shape = family.alone(model, source, padded)
    mask = KEEP[:, None, None, :] if padded else None
    leaves = {
        name: one for name, one in source.named_parameters() if not name.startswith("output.Layer")
    }
    assert_equal_functions(
        module,
        lambda x: module(x, mask=mask),
        theirs,
        leaves,
        LAYOUTS[family.layout].ours,
        near(family),
        shape=shape,
    )


@FAMILY
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_equals_transformers(family: Family, padded: bool) -> None:
    if padded and family.layout.startswith("vit"):
        return
    model = family.build()
    path = family.path(model)
    module = family.load(model, path)
    expected = LAYOUTS[family.layout].ours(dict(model.get_submodule(path).state_dict()))
    assert_same(module.state_dict(), expected)
    assert {name: getattr(module, name) for name in family.is_} == family.is_
    assert_source(family, model, path, module, padded)


@FAMILY
def test_ways_to_the_same_module(family: Family) -> None:
    """The whole model with a prefix, with a dot behind it, the attention itself, and a state dict."""
    model = family.build()
    path = family.path(model)
    attention = model.get_submodule(path)
    before = snapshot(model.state_dict())
    wanted = family.load(model, path)
    x = Draw(13).normal(B, N, 32)
    told: dict[str, Any] = {"num_heads": 4}
    if family.layout == "llama":
        told["rotary"] = convert.rotary_from_config(model.config)
    dicts = [
        (model.state_dict(), path),
        (model.state_dict(), f"{path}."),
        (attention.state_dict(), ""),
    ]
    others = [family.load(model, f"{path}."), family.load(attention)]
    others += [family.load(source, prefix, **told) for source, prefix in dicts]
    for number, other in enumerate(others):
        assert_same(other.state_dict(), wanted.state_dict())
        if number < 2:  # a state dict tells neither scale nor window
            assert repr(other) == repr(wanted)
            assert_near(other(x), wanted(x), MODULE)
    assert_same(model.state_dict(), before)
    assert_is_new(wanted, dict(attention.named_parameters()))
    assert (wanted.num_heads, wanted.training) == (4, False)


@FAMILY
def test_dropout_training_and_dtype_are_carried(family: Family) -> None:
    model = family.build(**{family.dropout: 0.375}).train().to(torch.bfloat16).requires_grad_(False)
    module = family.load(model, family.path(model))
    assert module.dropout == 0.375
    assert module.training
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert all(parameter.requires_grad for parameter in module.parameters())


@FAMILY
def test_wrong_prefixes_into_a_model(family: Family) -> None:
    model = family.build()
    path = family.path(model)
    for prefix in ("", path.rpartition(".")[0], f"{path}s", "layer.99.attention"):
        with pytest.raises(REFUSED, match=re.escape(path.rpartition(".")[2])):
            family.load(model, prefix)


@FAMILY
def test_other_heads_than_the_module_has(family: Family) -> None:
    """A number that contradicts the source is refused, or the source is believed."""
    model = family.build()
    path = family.path(model)
    assert family.load(model, path, num_heads=4).num_heads == 4
    try:
        module = family.load(model, path, num_heads=8)
    except REFUSED:
        return
    assert module.num_heads == 4


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral"])
def test_a_cache_changes_nothing_after_a_model(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    module = family.load(model, family.path(model))
    x = Draw(8).normal(B, N, 32)
    cache = KVCache(B, module.num_kv_heads, module.head_dim, max_length=N, dtype=torch.float64)
    with torch.no_grad():
        steps = [module(part, cache=cache) for part in torch.split(x, [3, 1, 1, 2], dim=1)]
        assert_near(torch.cat(steps, dim=1), copy.deepcopy(module)(x), ROTATED)


def test_float32_keeps_the_numbers() -> None:
    family = FAMILIES["llama"]
    model = family.build().float()
    path = family.path(model)
    assert_source(family, model, path, family.load(model, path), False)


@pytest.mark.parametrize(
    ("load", "model", "kind"),
    [(convert.from_bert, "bert", "Bert"), (convert.from_gpt2, "gpt2", "GPT2")],
)
def test_cross_attention_is_refused(load: Loader, model: str, kind: str) -> None:
    needs("transformers")
    settings = {"hidden_size": 32, "num_attention_heads": 4}
    options = {"is_cross_attention": True, "layer_idx": 0}
    source = of_transformers(model, f"{kind}Attention", f"{kind}Config", settings, options)
    with pytest.raises(REFUSED, match=r"(?i)cross|q_attn"):
        load(source)


def test_a_decoder_of_bert_is_causal_or_refused() -> None:
    """The mask comes from the model there."""
    family = FAMILIES["bert"]
    model = family.build(is_decoder=True, use_cache=False)
    path = family.path(model)
    try:
        module = family.load(model, path)
    except REFUSED:
        return
    assert_source(family, model, path, module, False)


@pytest.mark.parametrize("scaling", ["yarn", "dynamic", "longrope"])
def test_llama_with_other_angles_is_refused(scaling: str) -> None:
    parts = {"long_factor": [1.0] * 4, "short_factor": [1.0] * 4} if scaling == "longrope" else {}
    rope = {
        **STEEP,
        "rope_type": scaling,
        "original_max_position_embeddings": 32,
        **parts,
    }
    model = FAMILIES["llama"].build(rope_parameters=rope)
    with pytest.raises(ValueError, match=scaling) as caught:
        convert.from_llama(model, "layers.0.self_attn")
    assert "rope_type" in str(caught.value)


TRANSFORMERS = [
    peer
    for peer in PEERS
    if peer.name.startswith(("transformers:", "timm:"))
    and peer.name != "timm: causal"  # which only its call makes causal
    and "bfloat16" not in peer.name  # where others round their cosines
]


def bert_alone(attention: Any) -> Any:
    """What a whole attention of BERT's family computes before it adds the input."""
    return lambda x: attention.output.dense(first(attention.self(x)))


@pytest.mark.parametrize("peer", TRANSFORMERS, ids=lambda peer: peer.name)
def test_nothing_is_half_converted(peer: Peer) -> None:
    """Every attention that the doctor knows, in every loader: an error, or the same numbers."""
    needs(peer.name.partition(":")[0])
    candidate = peer.build()
    if not isinstance(candidate, nn.Module):
        return  # the same module behind a lambda
    source: Any = candidate
    while isinstance(source, (Fed, Holder)):
        source = source.attention
    drawn(source)
    candidate.eval()
    dtype = dtype_of(candidate)
    x = Draw(14).normal(B, 9, peer.arguments["embed_dim"], dtype=dtype)
    mask = [torch.ones(B, 9, dtype=torch.bool)] * bool(peer.arguments.get("takes_mask"))
    whole = hasattr(source, "self") and hasattr(source, "output")
    for load in (convert.from_bert, convert.from_gpt2, convert.from_vit, convert.from_llama):
        try:
            module = load(source)
        except REFUSED:
            continue
        assert not module.training
        wanted = bert_alone(source)(x) if whole else first(answer(candidate, x, *mask))
        tolerance = HALF_STEP if dtype == torch.bfloat16 else ROTATED
        assert_near(module(x), wanted, tolerance)


# timm, and ViT as transformers 4 had it


@pytest.mark.parametrize("options", [{}, {"qkv_bias": True}, {"attn_head_dim": 6}], ids=str)
def test_equals_timm(options: dict[str, Any]) -> None:
    needs("timm")
    source = timm_attention().Attention(E, num_heads=H, attn_drop=0.375, **options)
    drawn(source).double().eval()
    module = convert.from_vit(source)
    assert (module.num_heads, module.dropout, module.training) == (H, 0.375, False)
    leaves = dict(source.named_parameters())
    assert_equal_functions(module, module, source, leaves, from_timm_names, CONVERTED)
    inside = convert.from_vit(nn.ModuleDict({"attn": source}), "attn")
    assert_same(inside.state_dict(), module.state_dict())


@pytest.mark.parametrize(
    "options",
    [
        {"qk_norm": True, "norm_layer": nn.LayerNorm},
        {"scale_norm": True, "norm_layer": nn.LayerNorm},
        {"gated": True},
        {"dim_out": 8},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_functions_of_timm_are_refused(options: dict[str, Any]) -> None:
    needs("timm")
    with pytest.raises(REFUSED):
        convert.from_vit(timm_attention().Attention(E, num_heads=H, **options))


def test_both_layouts_of_vit_give_the_same() -> None:
    new, old = LAYOUTS["vit, transformers 5"], LAYOUTS["vit, transformers 4"]
    source = new.state()
    names = dict(zip(NAMES["vit, transformers 5"], NAMES["vit, transformers 4"], strict=True))
    renamed = {
        f"{names[name.partition('.')[0]]}.{name.partition('.')[2]}": tensor
        for name, tensor in source.items()
    }
    assert set(renamed) == set(old.shapes)
    both = [convert.from_vit(state, num_heads=H) for state in (source, renamed)]
    assert_same(both[0].state_dict(), both[1].state_dict())


# Rotary positions from a config

WIDTH = 8
PLAIN = {"model_type": "llama", "hidden_size": 4 * WIDTH, "num_attention_heads": 4}


def powers(dim: int = WIDTH, base: float = 10000.0) -> list[float]:
    return [base ** (-2 * m / dim) for m in range(dim // 2)]


def llama3(frequency: float) -> float:
    """The formula of Llama 3.1, with the numbers of LLAMA3."""
    turns = 100 * frequency / (2 * math.pi)
    between = min(max((turns - 1) / (4 - 1), 0), 1)
    return between * frequency + (1 - between) * frequency / 8


DIVIDED = [frequency / 8 for frequency in powers()]
BENT = [llama3(frequency) for frequency in powers()]
OLD3 = {name: value for name, value in LLAMA3.items() if name != "rope_theta"}
CONFIGS: dict[str, tuple[dict[str, Any], list[float]]] = {
    "default": ({"rope_parameters": ROPE}, powers()),
    "theta": ({"rope_parameters": {**ROPE, "rope_theta": 5e5}}, powers(base=5e5)),
    "linear": ({"rope_parameters": LINEAR}, DIVIDED),
    "llama3": ({"rope_parameters": LLAMA3}, BENT),
    "half": ({"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}, powers(4)),
    "head_dim": ({"head_dim": 12, "rope_parameters": ROPE}, powers(12)),
    "head_dim null": ({"head_dim": None, "rope_parameters": ROPE}, powers()),
    "old": ({"rope_theta": 5e5, "rope_scaling": None}, powers(base=5e5)),
    "old, without": ({"rope_theta": 10000}, powers()),
    "old, nothing": ({}, powers()),
    "old, type": ({"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 8.0}}, DIVIDED),
    "old, rope_type": ({"rope_scaling": {"rope_type": "linear", "factor": 8}}, DIVIDED),
    "old, both": (
        {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 8}},
        DIVIDED,
    ),
    "old, default": ({"rope_theta": 5e5, "rope_scaling": {"type": "default"}}, powers(base=5e5)),
    "old, llama3": ({"rope_theta": 10000.0, "rope_scaling": OLD3}, BENT),
    "old, half": ({"rope_theta": 1e4, "partial_rotary_factor": 0.5}, powers(4)),
}


@pytest.mark.parametrize(("config", "frequencies"), CONFIGS.values(), ids=CONFIGS)
def test_rotary_from_a_dict(config: dict[str, Any], frequencies: list[float]) -> None:
    given = {**PLAIN, **config}
    before = copy.deepcopy(given)
    rotary = convert.rotary_from_config(given)
    assert given == before
    assert isinstance(rotary, RotaryEmbedding)
    assert (rotary.dim, rotary.interleaved) == (2 * len(frequencies), False)
    expected = RotaryEmbedding(rotary.dim, frequencies=torch.tensor(frequencies))
    x = Draw(15).normal(B, 4, 50, 12)
    assert_near(rotary(x, 3), expected(x, 3), ROTATED)


@pytest.mark.parametrize(
    ("model", "kind", "settings"),
    [
        ("llama", "Llama", LLAMA),
        ("llama", "Llama", {**LLAMA, "head_dim": 12}),
        ("llama", "Llama", {**LLAMA, "rope_parameters": LINEAR}),
        ("llama", "Llama", {**LLAMA, "rope_parameters": LLAMA3}),
        ("mistral", "Mistral", {**BERT, "rope_parameters": {**ROPE, "rope_theta": 5e5}}),
        *[
            (model, kind, {**BERT, "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}})
            for model, kind in [
                ("gpt_neox", "GPTNeoX"),
                ("stablelm", "StableLm"),
                ("phi", "Phi"),
            ]
        ],
        ("gpt_neox", "GPTNeoX", BERT),
        ("stablelm", "StableLm", BERT),
        ("phi", "Phi", BERT),
    ],
)
@pytest.mark.parametrize("as_dict", [False, True], ids=["config", "to_dict"])
def test_rotary_equals_transformers(
    model: str, kind: str, settings: dict[str, Any], as_dict: bool
) -> None:
    needs("transformers")
    theirs = of_transformers(model, f"{kind}RotaryEmbedding", f"{kind}Config", settings)
    config = theirs.config
    rotary = convert.rotary_from_config(config.to_dict() if as_dict else config)
    x = Draw(16).normal(1, 2, 50, 12)
    cos, sin = theirs(x, torch.arange(4, 54)[None])
    dim = cos.shape[-1]
    assert rotary.dim == dim
    modeling = importlib.import_module("transformers.models.llama.modeling_llama")
    wanted, _ = modeling.apply_rotary_pos_emb(x[..., :dim], x[..., :dim], cos, sin)
    got = rotary(x, 4)
    assert_near(got[..., :dim], wanted, ROTATED)
    assert torch.equal(got[..., dim:], x[..., dim:])


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "longrope", "mrope", "su", "proportional"])
@pytest.mark.parametrize("place", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_unknown_rope_types_are_refused(kind: str, place: str, key: str) -> None:
    with pytest.raises(ValueError, match="rope_type") as caught:
        convert.rotary_from_config({**PLAIN, place: {key: kind, "factor": 2.0, "rope_theta": 1e4}})
    assert kind in str(caught.value)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor"),
        ({"rope_parameters": {**LINEAR, "factor": "8"}}, "factor"),
        ({"rope_parameters": {**LINEAR, "factor": 0.0}}, "factor"),
        ({"rope_parameters": {**LLAMA3, "low_freq_factor": None}}, "low_freq_factor"),
        *[
            (
                {"rope_parameters": {key: LLAMA3[key] for key in LLAMA3 if key != missing}},
                missing,
            )
            for missing in ("high_freq_factor", "original_max_position_embeddings")
        ],
        ({"rope_theta": "10000"}, "rope_theta"),
        ({"rope_theta": -1.0}, "rope_theta|base"),
        ({"partial_rotary_factor": 0.0}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        ({"partial_rotary_factor": "half"}, "partial_rotary_factor"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_attention_heads": None}, "num_attention_heads"),
        ({"hidden_size": 30}, "hidden_size|num_attention_heads|head_dim"),
        ({"head_dim": 7}, "head_dim|dim"),
        ({"rope_parameters": {"full_attention": ROPE, "sliding_attention": LINEAR}}, "rope_"),
    ],
    ids=str,
)
def test_broken_configs_are_refused(config: dict[str, Any], name: str) -> None:
    with pytest.raises(REFUSED, match=name):
        convert.rotary_from_config({**PLAIN, **config})


@pytest.mark.parametrize("config", [None, [], "llama", 3, {}, nn.Linear(2, 2)], ids=repr)
def test_what_is_no_config_is_refused(config: Any) -> None:
    with pytest.raises(REFUSED):
        convert.rotary_from_config(config)


def test_other_names_for_a_part_are_not_passed_over() -> None:
    """GPT-NeoX as its first config.json had it: a quarter of the features, or an error."""
    config = {**PLAIN, "model_type": "gpt_neox", "rotary_pct": 0.25, "rotary_emb_base": 5e5}
    try:
        rotary = convert.rotary_from_config(config)
    except REFUSED:
        return
    assert rotary.dim == 2
    assert_near(rotary.frequencies, torch.ones(1), MODULE)


# The two layouts of rotary rows


@pytest.mark.parametrize(
    ("head_dim", "rotary_dim", "order"),
    [
        (2, None, [0, 1]),
        (4, None, [0, 2, 1, 3]),
        (6, None, [0, 3, 1, 4, 2, 5]),
        (6, 4, [0, 2, 1, 3, 4, 5]),
        (7, 6, [0, 3, 1, 4, 2, 5, 6]),
        (6, 2, [0, 1, 2, 3, 4, 5]),
    ],
)
@pytest.mark.parametrize("bias", [False, True], ids=["weight", "bias"])
@DTYPES
def test_permuted_rows(
    head_dim: int, rotary_dim: int | None, order: list[int], bias: bool, dtype: torch.dtype
) -> None:
    rows = Draw(17).normal(*((3 * head_dim,) if bias else (3 * head_dim, E)), dtype=dtype)
    before = rows.clone()
    permute = partial(convert.permute_rotary, head_dim=head_dim, rotary_dim=rotary_dim)
    neighbours = permute(rows, interleaved=True)
    wanted = torch.cat([head[order] for head in torch.split(rows, head_dim)])
    torch.testing.assert_close(neighbours, wanted, rtol=0, atol=0)
    torch.testing.assert_close(permute(neighbours, interleaved=False), rows, rtol=0, atol=0)
    back = permute(rows, interleaved=False)
    torch.testing.assert_close(permute(back, interleaved=True), rows, rtol=0, atol=0)
    neighbours.zero_()
    back.zero_()
    assert torch.equal(rows, before)


@pytest.mark.parametrize("heads", [4, 2, 1], ids=["all heads", "grouped", "one"])
@pytest.mark.parametrize("rotary_dim", [None, 4], ids=["whole", "part"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_both_rotary_layouts_are_one_function(
    heads: int, rotary_dim: int | None, bias: bool
) -> None:
    modules = [
        build(
            Draw(18),
            embed_dim=E,
            num_heads=4,
            num_kv_heads=heads,
            head_dim=WIDE,
            bias=bias,
            rotary=RotaryEmbedding(rotary_dim or WIDE, interleaved=interleaved),
        )
        for interleaved in (False, True)
    ]
    halves, neighbours = modules
    x = Draw(19).normal(B, N, E)
    assert not torch.allclose(halves(x), neighbours(x), atol=1e-3)
    with torch.no_grad():
        for name, rows in neighbours.named_parameters():
            if name[0] in "qk":
                rows.copy_(
                    convert.permute_rotary(rows, WIDE, interleaved=True, rotary_dim=rotary_dim)
                )
    assert_near(neighbours(x), halves(x), MODULE)


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"rows": None}, "rows"),
        ({"rows": [[1.0]]}, "rows"),
        ({"rows": torch.tensor(1.0)}, "rows"),
        ({"rows": torch.ones(WIDE, 2, 2)}, "rows"),
        ({"rows": torch.ones(WIDE + 1, 2)}, "rows|head_dim"),
        ({"rows": torch.ones(WIDE - 2)}, "rows|head_dim"),
        ({"head_dim": 0}, "head_dim"),
        ({"head_dim": -6}, "head_dim"),
        ({"head_dim": 3}, "head_dim|rotary_dim"),
        ({"head_dim": 6.0}, "head_dim"),
        ({"head_dim": True}, "head_dim"),
        ({"head_dim": None}, "head_dim"),
        ({"interleaved": None}, "interleaved"),
        ({"interleaved": 1}, "interleaved"),
        ({"interleaved": "yes"}, "interleaved"),
        ({"rotary_dim": 3}, "rotary_dim"),
        ({"rotary_dim": 0}, "rotary_dim"),
        ({"rotary_dim": 8}, "rotary_dim"),
        ({"rotary_dim": 4.0}, "rotary_dim"),
        ({"rotary_dim": True}, "rotary_dim"),
    ],
    ids=str,
)
def test_wrong_permutations(changed: dict[str, Any], name: str) -> None:
    given: dict[str, Any] = {
        "rows": torch.ones(3 * WIDE, 4),
        "head_dim": WIDE,
        "interleaved": True,
        "rotary_dim": None,
        **changed,
    }
    with pytest.raises(REFUSED, match=name):
        convert.permute_rotary(given.pop("rows"), given.pop("head_dim"), **given)


# What a review found: sources that look like a known one and compute something else


def tiny_llama(config: str = "LlamaConfig", **settings: Any) -> Any:
    """A small model of the Llama family, drawn."""
    needs("transformers")
    import transformers

    sizes: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"num_hidden_layers": 2, "intermediate_size": 16, "vocab_size": 50}
    kind = getattr(transformers, config)
    model = getattr(transformers, config.replace("Config", "Model"))
    return drawn(model(kind(**sizes, **settings)))


def tiny_bert(**settings: Any) -> Any:
    needs("transformers")
    import transformers

    sizes: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    sizes |= {"intermediate_size": 16, "vocab_size": 50}
    return drawn(transformers.BertModel(transformers.BertConfig(**sizes, **settings)))


@pytest.mark.parametrize("config", ["LlamaConfig", "MistralConfig", "Qwen2Config"])
def test_a_partial_rotation_that_the_model_ignores_is_refused(config: str) -> None:
    with pytest.raises(ValueError, match="rotary features=4"):
        convert.from_llama(tiny_llama(config, partial_rotary_factor=0.5), "layers.0.self_attn")


@pytest.mark.parametrize("option", ["qk_norm", "scale_norm"])
def test_norms_without_parameters_are_seen(option: str) -> None:
    needs("timm")
    norm = partial(nn.LayerNorm, elementwise_affine=False)
    source = timm_attention().Attention(32, num_heads=4, norm_layer=norm, **{option: True})
    with pytest.raises(ValueError, match=r"no parts but .* got '(q_)?norm'"):
        convert.from_vit(source)


def test_a_norm_without_parameters_is_seen_in_llama() -> None:
    model = tiny_llama()
    model.layers[0].self_attn.q_norm = nn.LayerNorm(8, elementwise_affine=False)
    with pytest.raises(ValueError, match="no parts but"):
        convert.from_llama(model, "layers.0.self_attn")


def test_another_class_named_attention_is_not_believed() -> None:
    class Attention(nn.Module):
        """Names of timm, rows (h three d)."""

        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj, self.num_heads = nn.Linear(8, 24), nn.Linear(8, 8), 2

    with pytest.raises(ValueError, match=r"timm\.Attention, got Attention"):
        convert.from_vit(Attention())


def test_a_module_with_some_of_the_heads_is_refused() -> None:
    model = tiny_bert()
    part = model.encoder.layer[0].attention
    for name in ("query", "key", "value"):
        setattr(part.self, name, nn.Linear(32, 16))
    part.output.dense = nn.Linear(16, 32)
    with pytest.raises(ValueError, match=r"head_dim=8.* 4"):
        convert.from_bert(model, "encoder.layer.0.attention")


def test_models_that_see_the_future_are_refused_where_we_are_causal() -> None:
    with pytest.raises(ValueError, match="is_causal=False"):
        convert.from_llama(
            tiny_llama("MistralConfig", sliding_window=3, is_causal=False), "layers.0.self_attn"
        )
    with pytest.raises(ValueError, match="is_causal=False"):
        convert.from_bert(tiny_bert(is_decoder=True, is_causal=False), "encoder.layer.0.attention")
    import transformers

    settings: dict[str, Any] = {"n_embd": 32, "n_head": 4, "n_layer": 1, "is_causal": False}
    config = transformers.GPT2Config(**settings)
    with pytest.raises(ValueError, match="is_causal=False"):
        convert.from_gpt2(transformers.GPT2Model(config), "h.0.attn")
    free = convert.from_llama(tiny_llama(is_causal=False), "layers.0.self_attn")
    assert not free.causal


@pytest.mark.parametrize(
    "entry",
    [
        {"alibi": True},
        {"rotary_dim": 4},
        {"rope_pct": 0.25},
        {"qk_rope_head_dim": 8},
        {"global_rope_theta": 1e4},
        {"rope_local_base_freq": 1e4},
        {"position_embedding_type": "absolute"},
    ],
    ids=lambda entry: next(iter(entry)),
)
def test_configs_with_other_positions_are_refused(entry: dict[str, Any]) -> None:
    config = {"hidden_size": 32, "num_attention_heads": 4, **entry}
    with pytest.raises(ValueError, match=next(iter(entry))):
        convert.rotary_from_config(config)


def test_llama3_frequencies_must_be_in_order() -> None:
    rope = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 4.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    config = {"hidden_size": 32, "num_attention_heads": 4, "rope_scaling": rope}
    with pytest.raises(ValueError, match=r"low_freq_factor must be below high_freq_factor=4\.0"):
        convert.rotary_from_config(config)


def test_rotary_from_config_works_while_models_are_made_on_meta() -> None:
    rope = {"rope_type": "linear", "factor": 2.0}
    config = {"hidden_size": 32, "num_attention_heads": 4, "rope_scaling": rope}
    with torch.device("meta"):
        made = convert.rotary_from_config(config)
    torch.testing.assert_close(made.frequencies, convert.rotary_from_config(config).frequencies)


def test_old_names_of_the_norm_beside_are_left() -> None:
    model = tiny_bert()
    old = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for key, tensor in model.state_dict().items()
    }
    path = "encoder.layer.0.attention"
    assert_same(
        convert.from_bert(old, path, num_heads=4).state_dict(),
        convert.from_bert(model, path).state_dict(),
    )


@pytest.mark.parametrize("name", ["in_proj_weight", "out_proj"])
def test_pruned_torch_modules_are_refused(name: str) -> None:
    module = nn.MultiheadAttention(8, 2)
    owner = module.out_proj if name == "out_proj" else module
    which = "weight" if name == "out_proj" else name
    prune.l1_unstructured(owner, which, 0.5)  # type: ignore[no-untyped-call]
    with pytest.raises(ValueError, match="must have exactly the tensors"):
        convert.from_torch(module)


def test_sharded_and_mixed_modules_do_not_become_torchs() -> None:
    module = MultiHeadAttention(8, 2)
    module.k_proj = module.k_proj.double()
    with pytest.raises(ValueError, match=r"dtype.*q_proj"):
        convert.to_torch(module)
    module = MultiHeadAttention(8, 2)
    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(module, name, nn.Linear(8, 4))
    module.out_proj = nn.Linear(4, 8)
    with pytest.raises(ValueError, match="head_dim=4"):
        convert.to_torch(module)


def test_what_is_converted_in_inference_mode_can_be_trained() -> None:
    with torch.inference_mode():
        ours = convert.from_torch(nn.MultiheadAttention(8, 2))
        theirs = convert.to_torch(ours)
    x = torch.randn(1, 3, 8)
    for output in (ours(x), theirs(x, x, x)[0]):
        torch.autograd.backward(output.sum())
    assert all(
        parameter.grad is not None for parameter in [*ours.parameters(), *theirs.parameters()]
    )


def test_a_given_rotary_is_copied() -> None:
    model, given = tiny_llama().eval(), RotaryEmbedding(8, base=500.0)
    made = convert.from_llama(model, "layers.0.self_attn", rotary=given)
    assert made.rotary is not given
    assert given.training
    assert isinstance(made.rotary, RotaryEmbedding)
    assert made.rotary.base == 500.0


def test_dropout_and_mode_are_those_of_the_attention_itself() -> None:
    model = tiny_bert(attention_probs_dropout_prob=0.1).train()
    part = model.encoder.layer[0].attention.eval()
    part.self.dropout.p = 0.25
    made = convert.from_bert(model, "encoder.layer.0.attention")
    assert (made.dropout, made.training) == (0.25, False)
    other = tiny_llama()
    other.layers[1].self_attn.attention_dropout = 0.3
    assert convert.from_llama(other, "layers.1.self_attn").dropout == 0.3


@pytest.mark.parametrize("name", ["a/b", "kernels-community/mine"])
def test_names_that_transformers_would_download_are_refused(name: str) -> None:
    needs("transformers")
    with pytest.raises(ValueError, match="free name"):
        convert.register_transformers(name)


def test_a_wrapped_layer_is_named_and_no_other_prefix_proposed() -> None:
    state = dict(tiny_bert().state_dict())
    key = "encoder.layer.0.attention.self.query."
    for kind in ("weight", "bias"):
        state[f"{key}base_layer.{kind}"] = state.pop(key + kind)
    with pytest.raises(ValueError, match="base_layer") as caught:
        convert.from_bert(state, "encoder.layer.0.attention", num_heads=4)
    assert "layer.1" not in str(caught.value)


@pytest.mark.parametrize("width", [32, 48])
def test_the_gpt_of_plain_linear_layers_is_told_to_transpose(width: int) -> None:
    state = {"c_attn.weight": torch.randn(3 * width, width), "c_attn.bias": torch.randn(3 * width)}
    state |= {"c_proj.weight": torch.randn(width, width), "c_proj.bias": torch.randn(width)}
    with pytest.raises(ValueError, match=r"c_attn\.weight must have shape .*transpose"):
        convert.from_gpt2(state, num_heads=4)
