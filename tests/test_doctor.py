"""diagnose: every mistake of the zoo is named, nobody healthy is alarmed, nothing is changed, nothing escapes."""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import itertools
import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import FrozenInstanceError, replace
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from mha_lib import (
    MultiHeadAttention,
    RotaryEmbedding,
    SimpleMultiHeadAttention,
    diagnose,
    doctor,
    hints,
    mistakes,
)
from mha_lib.doctor import Check, Diagnosis, Finding
from mha_lib.hints import HINTS, LINES
from mha_lib.mistakes import Mistake, Probe, Recipe, attend_with, known_mistakes, recipe_error
from mha_lib.recognise import Projections
from tests.peers import PEERS, Peer
from tests.support import Draw, assert_near
from tests.tolerances import ANOTHER_OUTPUT, MODULE, SECONDS
from tests.zoo import RIGHT, SPECIMENS, Specimen
from tests.zoo_names import NamedAttention

E, H = 12, 3
Module = NamedAttention
SEPARATE = ("q_proj", "k_proj", "v_proj", "o_proj")
STRANGE = ("first", "second", "third", "last")

REQUIRED = {
    "output_shape",
    "samples_mixed",
    "tokens_scrambled",
    "sees_future",
    "ignores_past",
    "padding_leaks",
    "mask_inverted",
    "split_without_transpose",
    "merge_without_transpose",
    "heads_dim_major",
    "scale_sqrt_embed_dim",
    "scale_missing",
    "softmax_over_queries",
    "input_sliced_per_head",
    "single_head",
    "kv_heads_tiled",
    "qkv_order_swapped",
    "output_projection_missing",
    "dropout_in_eval",
    "nan_when_all_masked",
    "overflow_in_half",
    "parameter_without_gradient",
}

BESIDES = {
    "raises",
    "not_finite",
    "output_type",
    "ignores_future",
    "causal_off_by_one",
    "softmax_over_heads",
    "scale_without_sqrt",
    "scale_inverted",
    "scale_wrong",
    "num_heads_wrong",
    "projection_reused",
    "projection_skipped",
    "mask_times_zero",
    "mask_after_softmax",
    "window_off_by_one",
    "window_ignored",
    "rotary_missing",
    "rotary_layout",
    "rotary_on_values",
    "rotary_on_one_side",
    "softcap_missing",
    "qk_norm_missing",
    "softmax_overflows",
    "weight_transposed",
    "heads_added",
    "output_changes_between_calls",
    "input_overwritten",
    "parameters_not_registered",
    "qkv_layout_wrong",
    "rotary_wrong_axis",
    "cannot_be_copied",
    "bias_missing",
    "softmax_missing",
    "softmax_twice",
}

NO_INFLUENCE = {"ignores_past", "ignores_future"}
CONSEQUENCES: dict[str, set[str]] = {
    "samples_mixed": NO_INFLUENCE,
    "tokens_scrambled": {"sees_future", "merge_without_transpose", *NO_INFLUENCE},
    "split_without_transpose": {"tokens_scrambled", "sees_future", *NO_INFLUENCE},
    "merge_without_transpose": {"tokens_scrambled", "sees_future", *NO_INFLUENCE},
    "output_projection_missing": {"parameter_without_gradient"},
    "projection_reused": {"parameter_without_gradient"},
    "projection_skipped": {"parameter_without_gradient"},
    "qk_norm_missing": {"parameter_without_gradient"},
    "output_changes_between_calls": {
        "samples_mixed",
        "sees_future",
        "raises",
        "dropout_in_eval",
        "parameter_without_gradient",
    },
    "softmax_over_queries": {"sees_future"},
    "softmax_overflows": {"overflow_in_half"},
    "ignores_past": {
        "mask_inverted",
        "split_without_transpose",
        "parameter_without_gradient",
        *NO_INFLUENCE,
    },
    "causal_off_by_one": {"sees_future", "not_finite"},
    "mask_inverted": {"nan_when_all_masked", "sees_future", *NO_INFLUENCE},
    "mask_times_zero": {"sees_future", "padding_leaks"},
    "mask_after_softmax": {"sees_future", "padding_leaks"},
    "rotary_on_values": {"tokens_scrambled"},
}
"""What is found besides, because it follows from the mistake."""

TRUE_FINDINGS = {
    **dict.fromkeys(
        (
            "Annotated Transformer, padding",
            "Annotated Transformer, subsequent mask",
            "UvA tutorial, padding",
            "TransformerLens",
        ),
        "overflow_in_half",  # fills a number that float16 does not hold
    ),
    "fairseq, padding": "nan_when_all_masked",  # a row of minus infinity
}
"""Right in every number, and yet with one weakness that the doctor is to name."""


def names_of(found: Diagnosis) -> list[str]:
    return [finding.name for finding in found.findings]


def built(**options: Any) -> SimpleMultiHeadAttention:
    torch.manual_seed(0)
    return SimpleMultiHeadAttention(E, H, **options)


def named(names: tuple[str, ...] = SEPARATE, cls: type[NamedAttention] = Module) -> NamedAttention:
    """Attention whose layers have the given names, with a dropout that must not act in eval mode."""
    torch.manual_seed(0)
    return cls(E, H, names)


# The zoo and the peers


@pytest.mark.parametrize("specimen", SPECIMENS, ids=lambda specimen: specimen.name)
def test_each_mistake_is_named_and_nothing_that_does_not_follow(specimen: Specimen) -> None:
    found = diagnose(specimen.build(), **specimen.arguments)
    wanted = {specimen.bug, *specimen.also}
    assert wanted <= {*names_of(found)}, found
    follows = set().union(*(CONSEQUENCES.get(name, set()) for name in wanted))
    assert {*names_of(found)} - wanted <= follows, found
    assert not found.healthy
    assert not found.verified
    assert all(finding.evidence and finding.hint for finding in found.findings)


@pytest.mark.parametrize("specimen", RIGHT, ids=lambda specimen: specimen.name)
def test_the_right_styles_are_healthy_and_verified(specimen: Specimen) -> None:
    found = diagnose(specimen.build(), **specimen.arguments)
    assert names_of(found) == []
    assert found.healthy
    assert found.verified, found


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_no_false_alarm_on_other_peoples_modules(peer: Peer) -> None:
    package = peer.name.partition(":")[0].replace("-", "_")
    others = ("timm", "transformers", "x_transformers")  # asked for, not imported: timm needs help
    if package in others and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    found = diagnose(peer.build(), **peer.arguments)
    weakness = TRUE_FINDINGS.get(peer.name)
    assert names_of(found) == [weakness] * (weakness is not None), found
    if peer.verified is not None and weakness is None:
        assert found.verified == peer.verified, found


def test_the_weaknesses_are_those_of_peers() -> None:
    assert TRUE_FINDINGS.keys() <= {peer.name for peer in PEERS}


# Nothing is changed


class Counting(nn.Module):
    """Attention whose every call leaves traces."""

    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.attention = built()
        self.drop = nn.Dropout(0.2)
        self.norm = nn.BatchNorm1d(E, affine=False)
        self.register_buffer("total", torch.zeros(()))
        self.calls: list[int] = []
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.total += 1
        self.calls.append(len(x))
        self.last = x
        return self.norm(self.drop(self.attention(x)).mT).mT  # type: ignore[no-any-return]


class Holder:
    """A callable that is no module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.seen: list[Tensor] = []

    def __call__(self, x: Tensor) -> Any:
        self.seen.append(x)
        return self.module(x)

    def method(self, x: Tensor) -> Any:
        return self.module(x)


class Bag:
    """A plain object that cannot be called."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def attend(self, x: Tensor) -> Any:
        return self.module(x)


class Slots:
    """A callable without a dict of attributes."""

    __slots__ = ("module",)

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Any:
        return self.module(x)


GLOBAL: nn.Module = nn.Identity()
GLOBAL_BAG = Bag(GLOBAL)


def through_a_global(x: Tensor) -> Any:
    return GLOBAL(x)


def through_a_global_object(x: Tensor) -> Any:
    return GLOBAL_BAG.attend(x)


def with_global(module: nn.Module) -> Callable[[Tensor], Any]:
    global GLOBAL
    GLOBAL = module
    return through_a_global


def with_global_object(module: nn.Module) -> Callable[[Tensor], Any]:
    GLOBAL_BAG.module = module
    return through_a_global_object


def by_default(module: nn.Module) -> Callable[..., Any]:
    def call(x: Tensor, *, inner: nn.Module = module) -> Any:
        return inner(x)

    return call


def in_namespace(module: nn.Module) -> Callable[[Tensor], Any]:
    space = SimpleNamespace(model=module)
    return lambda x: space.model(x)


def in_dict(module: nn.Module) -> Callable[[Tensor], Any]:
    parts = {"attention": [module]}
    return lambda x: parts["attention"][0](x)


def nested(module: nn.Module) -> Callable[[Tensor], Any]:
    def inner(x: Tensor) -> Any:
        return module(x)

    return functools.wraps(inner)(lambda *arguments: inner(*arguments))


WAYS: dict[str, Callable[[nn.Module], Callable[..., Any]]] = {
    "module": lambda module: module,
    "sequential": lambda module: nn.Sequential(module),
    "closure": lambda module: lambda x: module(x),
    "closure in a closure": nested,
    "closure over a dict": in_dict,
    "closure over an object": in_namespace,
    "global": with_global,
    "global object": with_global_object,
    "partial": lambda module: functools.partial(lambda inner, x: inner(x), module),
    "default": by_default,
    "bound forward": lambda module: module.forward,
    "bound method of a callable": lambda module: Holder(module).method,
    "bound method": lambda module: Bag(module).attend,
    "callable": Holder,
    "callable with slots": Slots,
    "callable in a module": lambda module: Outer(Holder(module)),
    "no_grad": lambda module: torch.no_grad()(lambda x: module(x)),
}
"""The ways in which a candidate leads to its module."""


class Outer(nn.Module):
    """A module around anything that can be called."""

    def __init__(self, inner: Callable[..., Any]) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


def state(module: nn.Module) -> dict[str, Any]:
    """All that a diagnosis could leave behind in a module or in the process; numbers bit for bit."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    hooks = [
        (name, [(key, id(hook)) for key, hook in getattr(each, name).items()])
        for each in module.modules()
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    ]
    kind, *numbers = np.random.get_state()
    return {
        "numbers": {name: each.detach().numpy().tobytes() for name, each in tensors.items()},
        "tensors": {name: (id(each), each.data_ptr()) for name, each in tensors.items()},
        "versions": {name: each._version for name, each in tensors.items()},
        "dtypes": {name: each.dtype for name, each in tensors.items()},
        "requires_grad": {name: each.requires_grad for name, each in tensors.items()},
        "grad": {name: each.grad for name, each in module.named_parameters()},
        "training": [each.training for each in module.modules()],
        "hooks": hooks,
        "attributes": [sorted(vars(each)) for each in module.modules()],
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": (kind, [np.asarray(each).tobytes() for each in numbers]),
        "python": random.getstate(),
        "dtype": torch.get_default_dtype(),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "threads": torch.get_num_threads(),
    }


def random_module() -> Counting:
    """In part in train mode and in part frozen, with a hook."""
    module = Counting()
    module.attention.eval()
    next(module.attention.parameters()).requires_grad_(False)
    module.register_forward_hook(lambda *_: None)
    return module


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_changed(way: str) -> None:
    module = random_module()
    candidate = WAYS[way](module)
    before = state(module)
    diagnose(candidate, E, H)
    assert state(module) == before
    assert (module.calls, module.last) == ([], None)
    if isinstance(candidate, Holder):
        assert candidate.seen == []


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_a_candidate_leads_to_is_found(way: str, dtype: torch.dtype) -> None:
    """Found, put into eval mode and called in its own dtype: else dropout or the dtype would be an alarm."""
    found = diagnose(WAYS[way](named().to(dtype)), E, H)
    assert names_of(found) == []
    assert found.verified or way in ("callable with slots", "callable in a module"), found


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_mode_of_the_caller_does_not_matter(mode: Callable[[], Any]) -> None:
    module, outside = named(), diagnose(named(), E, H)
    with mode():
        before = state(module)
        found = diagnose(module, E, H)
        inside = diagnose(named(), E, H)
        assert state(module) == before
    assert found.verified
    assert found == outside == inside


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_of_the_caller_does_not_matter(dtype: torch.dtype) -> None:
    module, usual = named(), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        before = state(module)
        found = diagnose(module, E, H)
        assert state(module) == before
    finally:
        torch.set_default_dtype(usual)
    assert found.verified, found


def test_autocast_of_the_caller_does_not_matter() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = diagnose(built(), E, H)
        assert torch.is_autocast_enabled("cpu")
    assert found.verified, found


def test_two_examinations_say_the_same_whatever_the_seed() -> None:
    first = diagnose(named(), E, H)
    torch.manual_seed(17)
    random.seed(17)
    np.random.seed(17)
    assert diagnose(named(), E, H) == first


class Locked(Module):
    """Cannot be pickled, nor copied as it is."""

    def __init__(self, dim: int, heads: int, names: tuple[str, ...]) -> None:
        super().__init__(dim, heads, names)
        self.lock = threading.Lock()

    def forward(self, x: Tensor) -> Any:
        with self.lock:
            return super().forward(x)


class LockedInList(Module):
    def __init__(self, dim: int, heads: int, names: tuple[str, ...]) -> None:
        super().__init__(dim, heads, names)
        self.locks = [threading.Lock()]


class KeepsNonLeaf(Module):
    """Keeps a tensor with a history, as caches of attention weights do."""

    def __init__(self, dim: int, heads: int, names: tuple[str, ...]) -> None:
        super().__init__(dim, heads, names)
        self.kept = 2 * self.get_parameter("q_proj.weight")


class KeepsNonLeaves(Module):
    def __init__(self, dim: int, heads: int, names: tuple[str, ...]) -> None:
        super().__init__(dim, heads, names)
        self.kept = {"seen": [2 * self.get_parameter("q_proj.weight")]}


@pytest.mark.parametrize("cls", [Locked, LockedInList, KeepsNonLeaf, KeepsNonLeaves])
@pytest.mark.parametrize("way", ["module", "closure", "sequential"])
def test_what_cannot_be_deep_copied_is_examined_and_kept(cls: type[Module], way: str) -> None:
    module = named(cls=cls)
    before = state(module)
    found = diagnose(WAYS[way](module), E, H)
    assert names_of(found) == []
    assert found.verified, found
    assert state(module) == before
    if isinstance(module, Locked):
        assert not module.lock.locked()


def test_hooks_of_the_caller_are_kept_and_not_called() -> None:
    module, seen = built(), []
    module.out_proj.register_forward_hook(lambda *got: seen.append(got))
    module.register_forward_pre_hook(lambda *got: seen.append(got))
    before = state(module)
    found = diagnose(module, E, H)
    assert found.healthy
    assert not found.verified
    assert any("hooks" in note for note in found.notes)
    assert state(module) == before
    assert seen == []
    module(torch.zeros(1, 2, E))
    assert len(seen) == 2


# Weights


def two_levels(module: nn.Module) -> nn.Module:
    return Outer(nn.Sequential(module))


class PerHead(nn.Module):
    """One query, key and value layer for each head, as a textbook draws it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.queries, self.keys, self.values = (
            nn.ModuleList(nn.Linear(E, E // H) for _ in range(H)) for _ in range(3)
        )
        self.out = nn.Linear(E, E)

    def forward(self, x: Tensor) -> Any:
        heads = [
            F.softmax(q(x) @ k(x).mT * (E // H) ** -0.5, dim=-1) @ v(x)
            for q, k, v in zip(self.queries, self.keys, self.values, strict=True)
        ]
        return self.out(torch.cat(heads, dim=-1))


class Conv1D(nn.Module):
    """The layer of GPT-2, whose matrix is the transposed one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, width) / E**0.5)
        self.bias = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def with_conv() -> NamedAttention:
    module = named(("c_attn", "c_proj"))
    module.c_attn, module.c_proj = Conv1D(3 * E), Conv1D(E)
    return module


SCHEMES: dict[str, Callable[[], nn.Module]] = {
    "packed": lambda: named(("qkv", "proj")),
    "in_proj": lambda: named(("in_proj", "out_proj")),
    "query_key_value": lambda: named(("query_key_value", "dense")),
    "separate": named,
    "capital letters": lambda: named(("W_Q", "W_K", "W_V", "W_O")),
    "per head": PerHead,
    "Conv1D": with_conv,
    "torch": lambda: nn.MultiheadAttention(E, H, batch_first=True),
    "torch, kdim": lambda: nn.MultiheadAttention(E, H, batch_first=True, bias=False),
    "no bias": lambda: NamedAttention(E, H, SEPARATE, bias=False),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_are_recognised(scheme: str) -> None:
    found = diagnose(SCHEMES[scheme](), E, H)
    assert found.healthy, found
    assert found.verified, found


@pytest.mark.parametrize("wrap", [Outer, two_levels], ids=["one level", "two levels"])
@pytest.mark.parametrize("scheme", sorted({*SCHEMES} - {"torch", "torch, kdim"}))
def test_weights_are_recognised_in_a_wrapper(
    scheme: str, wrap: Callable[[nn.Module], nn.Module]
) -> None:
    found = diagnose(wrap(SCHEMES[scheme]()), E, H)
    assert found.healthy, found
    assert found.verified, found


def matrices(module: NamedAttention) -> dict[str, Tensor]:
    layers = {name: module.get_submodule(name) for name in SEPARATE}
    weights = {name.removesuffix("_proj"): layer.weight for name, layer in layers.items()}
    biases = {name[0] + "_bias": layer.bias for name, layer in layers.items()}
    return {k: v for k, v in {**weights, **biases}.items() if isinstance(v, Tensor)}


FORMS: dict[str, Callable[[NamedAttention], Mapping[str, Any]]] = {
    "tensors": matrices,
    "detached": lambda module: {k: v.detach() for k, v in matrices(module).items()},
    "numpy": lambda module: {k: v.detach().numpy() for k, v in matrices(module).items()},
    "lists": lambda module: {k: v.tolist() for k, v in matrices(module).items()},
    "float64": lambda module: {k: v.detach().double() for k, v in matrices(module).items()},
    "state dict": lambda module: module.state_dict(),
    "prefixed": lambda module: {f"layers.0.{k}": v for k, v in module.state_dict().items()},
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_taken_from_a_dict(form: str) -> None:
    module, strange = named(), named(STRANGE)
    given = FORMS[form](module)
    before = {name: torch.as_tensor(value).detach().clone() for name, value in given.items()}
    assert diagnose(module, E, H, weights=given).verified
    assert not diagnose(strange, E, H).verified
    assert diagnose(strange, E, H, weights=given).verified
    for name, value in before.items():
        assert torch.equal(torch.as_tensor(given[name]), value)


def test_a_wrong_dict_is_a_note_and_no_finding() -> None:
    module = named()
    other = {name: torch.randn_like(value) for name, value in matrices(module).items()}
    found = diagnose(module, E, H, weights=other)
    assert (found.healthy, found.verified) == (True, False)
    (note,) = found.notes
    assert "no known mistake explains it" in note


def test_without_weights_properties_speak() -> None:
    found = diagnose(named(), E, H, weights=None)
    assert (found.healthy, found.verified) == (True, False)
    assert Check("reference", "skipped", "the weights are not known") in found.checks
    assert names_of(diagnose(named(), E, H, weights=None, causal=True)) == ["sees_future"]


def test_two_attentions_in_one_module_are_a_note() -> None:
    found = diagnose(nn.Sequential(named(), named()), E, H)
    assert (found.healthy, found.verified) == (True, False)
    (note,) = found.notes
    assert "2 sets of projections were found" in note


@pytest.mark.parametrize(
    "weights",
    [
        {},
        {"q": torch.zeros(E, E)},
        {"q": 3, "k": "a", "v": None},
        {1: torch.zeros(E, E)},
        {"q": object()},
        {"layer": {"q": 1}},
        {**dict.fromkeys("qkvo", torch.zeros(E, E)), "q": torch.zeros(5, 5)},
        {**dict.fromkeys("qkvo", torch.zeros(E, E)), "q_bias": torch.zeros(5)},
        {**dict.fromkeys("qkvo", torch.zeros(E, E)), "k": [[1.0, 2.0], [3.0]]},
        {**dict.fromkeys("qkvo", torch.zeros(E, E)), "v": torch.zeros(E, E, device="meta")},
    ],
    ids=lambda weights: ",".join(f"{k}={type(v).__name__}" for k, v in weights.items()),
)
def test_unfit_weights_are_refused_by_name(weights: dict[Any, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match="weights"):
        diagnose(built(), E, H, weights=weights)


# The result


class Unscaled(Module):
    """Two mistakes: no mask where it is to be causal, and no scale."""

    def forward(self, x: Tensor) -> Any:
        q, k, v = (self.split(part) for part in self.roles(x))
        attention = F.softmax(q @ k.mT, dim=-1)
        return self.layer(self.names[-1], self.merge(attention @ v))


@pytest.fixture(scope="module")
def two_mistakes() -> Diagnosis:
    return diagnose(named(cls=Unscaled), E, H, causal=True)


def test_causes_come_before_symptoms(two_mistakes: Diagnosis) -> None:
    assert {*names_of(two_mistakes)} == {"scale_missing", "sees_future"}
    split = diagnose(
        next(s for s in SPECIMENS if "nanogpt-ViewSplit" in s.name).build(), 48, 4, causal=True
    )
    assert names_of(split)[0] == "split_without_transpose"
    assert len({*names_of(split)}) == len(names_of(split)) > 1


def test_the_table_holds_all_that_was_found(two_mistakes: Diagnosis) -> None:
    text = repr(two_mistakes)
    assert text == str(two_mistakes)
    assert text.startswith("2 findings")
    for finding in two_mistakes.findings:
        assert {finding.name, finding.evidence, finding.hint} <= {
            line.strip().removeprefix("seen: ").removeprefix("mend: ") for line in text.splitlines()
        }
        assert all(line in text for line in finding.lines)
    for check in two_mistakes.checks:
        assert re.search(rf"^{check.name} +{check.result} +{re.escape(check.detail)}$", text, re.M)


def test_the_headline_of_the_healthy() -> None:
    assert repr(diagnose(built(), E, H)).startswith("healthy, and equal to the reference\n")
    unknown = repr(diagnose(built(), E, H, weights=None))
    assert unknown.startswith("healthy, but not shown to be equal to the reference\n")
    assert "note: " in repr(diagnose(nn.Sequential(built(), built()), E, H))


class Tags(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_html_holds_the_same(two_mistakes: Diagnosis) -> None:
    page = Tags(two_mistakes._repr_html_())
    assert {"table", "tr", "td", "details"} <= {*page.tags}
    for finding in two_mistakes.findings:
        assert all(words in page.text for words in (*finding[:3], *finding.lines))
    assert all(check.detail in page.text for check in two_mistakes.checks)


EVIL = "<script>alert('&')</script><img src=x onerror=y>"


def raises_evil(x: Tensor) -> Tensor:
    raise ValueError(EVIL)


def returns_evil(x: Tensor) -> object:
    return type(EVIL, (), {})()


def takes_five(x: Tensor) -> Tensor:
    if x.shape[1] != 5:
        raise ValueError(EVIL)
    return x


@pytest.mark.parametrize("candidate", [raises_evil, returns_evil, takes_five])
def test_everything_is_escaped(candidate: Callable[[Tensor], Any]) -> None:
    found = diagnose(candidate, E, H)
    page = Tags(found._repr_html_())
    assert not {"script", "img"} & {*page.tags}
    assert EVIL in repr(found)
    assert EVIL in page.text
    odd = Diagnosis(
        (Finding(EVIL, EVIL, EVIL, (EVIL,)),), False, (EVIL,), (Check(EVIL, EVIL, EVIL),)
    )
    page = Tags(odd._repr_html_())
    assert not {"script", "img"} & {*page.tags}
    assert page.text.count(EVIL) == 8


def test_a_diagnosis_is_frozen(two_mistakes: Diagnosis) -> None:
    for name in ("findings", "verified", "notes", "checks", "healthy"):
        with pytest.raises((FrozenInstanceError, AttributeError)):
            setattr(two_mistakes, name, ())
    assert isinstance(two_mistakes.findings, tuple)
    assert isinstance(two_mistakes.checks, tuple)


SKIPPED: dict[str, tuple[Callable[..., Any], dict[str, Any], str]] = {
    "permutation": (built(causal=True), {"causal": True}, "meant to matter"),
    "reference": (built(), {"weights": None}, "weights are not known"),
    "gradients": (lambda x: x.softmax(1), {}, "no parameters"),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_what_is_skipped_says_why(name: str) -> None:
    candidate, options, why = SKIPPED[name]
    (check,) = [check for check in diagnose(candidate, E, H, **options).checks if check[0] == name]
    assert check.result == "skipped"
    assert why in check.detail


def test_every_check_has_a_name_a_result_and_a_detail() -> None:
    masked = next(s for s in RIGHT if s.arguments.get("takes_mask"))
    found = diagnose(masked.build(), **masked.arguments)
    assert {check.result for check in found.checks} <= {"passed", "failed", "skipped"}
    assert all(check.name and check.detail for check in found.checks)
    assert {"call", "output", "finite", "samples", "influence", "padding", "empty rows"} <= {
        check.name for check in found.checks
    }


class WideScale(nn.Module):
    """Divides by the wrong root."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(E, E) for _ in range(4))

    def forward(self, x: Tensor) -> Any:
        q, k, v = (
            rearrange(layer(x), "b n (h d) -> b h n d", h=H) for layer in (self.q, self.k, self.v)
        )
        scores = q @ k.mT / E**0.5  # the wrong line
        return self.o(rearrange(scores.softmax(dim=-1) @ v, "b h n d -> b n (h d)"))


class SplitInHelper(WideScale):
    """Has the mistake in a method of its own."""

    def heads(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), H, -1, E // H)  # the wrong line

    def forward(self, x: Tensor) -> Any:
        q, k, v = (self.heads(layer(x)) for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.o(rearrange(mixed, "b h n d -> b n (h d)"))


class WrongSoftmax(WideScale):
    """Takes the softmax along the queries."""

    def forward(self, x: Tensor) -> Any:
        q, k, v = (
            rearrange(layer(x), "b n (h d) -> b h n d", h=H) for layer in (self.q, self.k, self.v)
        )
        weights = (q @ k.mT / (E // H) ** 0.5).softmax(dim=-2)  # the wrong line
        return self.o(rearrange(weights @ v, "b h n d -> b n (h d)"))


LINED = {
    "scale_sqrt_embed_dim": WideScale,
    "split_without_transpose": SplitInHelper,
    "softmax_over_queries": WrongSoftmax,
}


@pytest.mark.parametrize("way", ["module", "sequential", "closure"])
@pytest.mark.parametrize("name", LINED)
def test_a_line_of_the_file_is_shown(name: str, way: str) -> None:
    source, start = inspect.getsourcelines(LINED[name])
    offset = next(n for n, line in enumerate(source) if "# the wrong line" in line)
    code = source[offset].partition("#")[0].strip()
    found = diagnose(WAYS[way](LINED[name]()), E, H)
    (lines,) = [finding.lines for finding in found.findings if finding.name == name]
    assert f"test_doctor.py:{start + offset}: {code}" in lines
    assert len(lines) <= hints.SHOWN_LINES


# Candidates that are no attention at all


def changed(change: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """Right attention, and then something that is wrong."""
    module = built()
    return lambda x: change(module(x))


class Stubborn:
    """Right until its n-th call."""

    def __init__(self, last: int) -> None:
        self.left, self.module = [last], built()

    def __call__(self, x: Tensor) -> Any:
        self.left[0] -= 1
        if self.left[0] <= 0:
            raise RuntimeError("enough")
        return self.module(x)


class UnspeakableError(Exception):
    def __str__(self) -> str:
        raise ValueError


def unspeakable(x: Tensor) -> Tensor:
    raise UnspeakableError


def endless(x: Tensor) -> Tensor:
    return endless(x)


def zeroed(x: Tensor) -> Any:
    output = 2 * torch.softmax(x @ x.mT, dim=-1) @ x
    x.zero_()
    return output


ANSWERS: dict[str, tuple[str, Callable[..., Any]]] = {
    "raises": ("raises", lambda x: 1 / 0),
    "raises what cannot be said": ("raises", unspeakable),
    "recursion": ("raises", endless),
    "other arguments": ("raises", lambda x, y: x),
    "keyword only": ("raises", lambda x, *, y: x),
    "no arguments": ("raises", lambda: 1),
    "None": ("output_type", lambda x: None),
    "tuple of None": ("output_type", lambda x: (None, x)),
    "empty tuple": ("output_type", lambda x: ()),
    "dict": ("output_type", lambda x: {"output": x}),
    "numpy": ("output_type", changed(lambda y: y.detach().numpy())),
    "number": ("output_type", lambda x: 3),
    "list": ("output_type", lambda x: [x]),
    "class": ("output_type", lambda x: Tensor),
    "shorter": ("output_shape", changed(lambda y: y[:, :1])),
    "wider": ("output_shape", changed(lambda y: torch.cat([y, y], dim=-1))),
    "turned": ("output_shape", changed(lambda y: y.mT)),
    "sum": ("output_shape", changed(lambda y: y.sum())),
    "empty": ("output_shape", changed(lambda y: y[:, :0])),
    "half": ("output_type", changed(lambda y: y.half())),
    "float8": ("output_type", changed(lambda y: y.to(torch.float8_e4m3fn))),
    "integer": ("output_type", changed(lambda y: y.long())),
    "boolean": ("output_type", changed(lambda y: y > 0)),
    "complex": ("output_type", changed(lambda y: y.to(torch.complex64))),
    "meta": ("output_type", changed(lambda y: y.to("meta"))),
    "sparse": ("output_type", changed(lambda y: y.detach().to_sparse())),
    "nested": ("output_type", changed(lambda y: torch.nested.nested_tensor(list(y.detach())))),
    "nan": ("not_finite", changed(lambda y: y * torch.nan)),
    "infinity": ("not_finite", changed(lambda y: y + torch.inf)),
    "one nan": ("not_finite", changed(lambda y: y.index_fill(1, torch.tensor([0]), torch.nan))),
    "one nan a token": (
        "not_finite",
        changed(lambda y: y.index_fill(2, torch.tensor([0]), torch.nan)),
    ),
    "overwrites": ("input_overwritten", zeroed),
    "nothing moves": ("ignores_past", torch.ones_like),
    "identity": ("ignores_past", lambda x: x),
    "first sample only": ("output_shape", lambda x: x[:1]),
}


@pytest.mark.parametrize("takes_mask", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("name", ANSWERS)
def test_whatever_a_candidate_answers_is_a_finding(name: str, takes_mask: bool) -> None:
    wanted, candidate = ANSWERS[name]
    masked = (lambda x, mask: candidate(x)) if takes_mask else candidate
    found = diagnose(masked, E, H, takes_mask=takes_mask)
    assert wanted in names_of(found), found
    assert found._repr_html_()
    assert wanted in repr(found)


@pytest.mark.parametrize("last", [*range(1, 8), 10, 15, 20])
def test_a_candidate_that_raises_later_is_a_finding(last: int) -> None:
    found = diagnose(Stubborn(last), E, H)
    assert {"raises", "output_changes_between_calls"} & {*names_of(found)}, found
    assert "enough" in repr(found)


@pytest.mark.parametrize("last", [2, 5, 12])
@pytest.mark.parametrize("later", [None, (), torch.zeros(()), torch.zeros(1, 1, E), "x"], ids=str)
def test_an_answer_that_changes_its_type_is_a_finding(later: Any, last: int) -> None:
    module, calls = built(), [0]

    def candidate(x: Tensor) -> Any:
        calls[0] += 1
        return later if calls[0] >= last else module(x)

    assert not diagnose(candidate, E, H).healthy


def test_a_candidate_may_print(capsys: pytest.CaptureFixture[str]) -> None:
    module = built()

    def candidate(x: Tensor) -> Any:
        print("called")
        return module(x)

    assert diagnose(candidate, E, H).verified
    assert "called" in capsys.readouterr().out


def test_keyboard_interrupts_pass() -> None:
    def interrupted(x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        diagnose(interrupted, E, H)


@pytest.mark.parametrize("candidate", [SimpleMultiHeadAttention, nn.Linear, dict])
def test_a_class_is_refused(candidate: type) -> None:
    with pytest.raises(
        TypeError, match=rf"candidate must be .* got the class {candidate.__name__}"
    ):
        diagnose(candidate, E, H)


@pytest.mark.parametrize("candidate", [None, 3, "x", torch.zeros(2, 5, E), [built()]], ids=str)
def test_what_cannot_be_called_is_refused(candidate: Any) -> None:
    with pytest.raises(TypeError, match="candidate must be a module or a function, got"):
        diagnose(candidate, E, H)


def test_a_wrong_width_is_a_finding_that_holds_the_message() -> None:
    (finding,) = diagnose(named(), E + 1, 1).findings
    assert finding.name == "raises"
    assert f"(3, 7, {E + 1})" in finding.evidence
    assert "cannot be multiplied" in finding.evidence


# The reference with mistakes built in

WIDTH, HEADS = 24, 4
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 3},
    "window both ways": {"window": 3},
    "grouped": {"num_kv_heads": 2},
    "one key head": {"num_kv_heads": 1},
    "narrow heads": {"head_dim": 3},
    "wide heads": {"head_dim": 10},
    "rotary": {"rotary": RotaryEmbedding(6)},
    "rotary of a part": {"rotary": RotaryEmbedding(4, interleaved=True)},
    "softcap": {"softcap": 1.5},
    "scale": {"scale": 0.7},
    "norms": {"qk_norm": nn.RMSNorm},
    "all": {
        "causal": True,
        "window": 3,
        "num_kv_heads": 2,
        "rotary": RotaryEmbedding(6),
        "softcap": 1.5,
        "scale": 0.7,
        "qk_norm": nn.RMSNorm,
    },
}
SAME = {frozenset({"rotary_missing", "rotary_wrong_axis"})}
"""Query and key of one head turned by the same angle have the score of those that are not turned."""


def probed(options: dict[str, Any]) -> tuple[MultiHeadAttention, Probe]:
    """The finished module in float64 with weights as after training, and a probe with the same weights."""
    torch.manual_seed(0)
    module, draw = MultiHeadAttention(WIDTH, HEADS, **options).double(), Draw()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)
            else:
                parameter.add_(0.3 * draw.normal(*parameter.shape))
    module.requires_grad_(False)
    q, k, v, out = module.q_proj, module.k_proj, module.v_proj, module.out_proj
    biases = q.bias, k.bias, v.bias, out.bias
    weights = Projections(q.weight, k.weight, v.weight, out.weight, *biases)
    names = ("causal", "window", "scale", "softcap", "rotary")
    norms = (module.q_norm, module.k_norm) if module.q_norm and module.k_norm else None
    probe = Probe(
        draw.normal(2, 5, WIDTH),
        weights,
        HEADS,
        module.num_kv_heads,
        **{name: options[name] for name in names if name in options},
        norms=norms,
    )
    return module, probe


@pytest.mark.parametrize("name", OPTIONS)
def test_the_recipe_without_a_mistake_is_the_finished_module(name: str) -> None:
    module, probe = probed(OPTIONS[name])
    output, rows = attend_with(Recipe(), probe)
    assert rows.all()
    assert_near(output, module(probe.x), MODULE)
    assert_near(attend_with(Recipe(), probe, 5)[0], output[..., :5], MODULE)


@pytest.mark.parametrize("name", OPTIONS)
def test_no_mistake_is_without_effect(name: str) -> None:
    _, probe = probed(OPTIONS[name])
    right, _ = attend_with(Recipe(), probe)
    errors = {
        (mistake.name, mistake.does): recipe_error(
            replace(Recipe(), **mistake.changes), probe, right
        )
        for mistake in known_mistakes(probe)
    }
    assert len(errors) > 10
    assert {key: error for key, error in errors.items() if not error > ANOTHER_OUTPUT} == {}


def same_output(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> bool:
    rows = one[1] & other[1]
    if one[0].shape != other[0].shape or not rows.any():
        return False
    difference = (one[0][rows] - other[0][rows]).abs().max() / one[0][rows].std()
    return not difference > ANOTHER_OUTPUT


@pytest.mark.parametrize("name", OPTIONS)
def test_mistakes_can_be_told_apart(name: str) -> None:
    _, probe = probed(OPTIONS[name])
    outputs = [
        (mistake, attend_with(replace(Recipe(), **mistake.changes), probe))
        for mistake in known_mistakes(probe)
        if recipe_error(replace(Recipe(), **mistake.changes), probe, probe.x) < torch.inf
    ]
    assert len(outputs) > 10
    same = {
        frozenset({one.name, other.name})
        for (one, a), (other, b) in itertools.combinations(outputs, 2)
        if one.name != other.name and same_output(a, b)
    }
    assert same <= SAME


@pytest.mark.parametrize("name", OPTIONS)
def test_the_finished_module_is_verified_with_its_options(name: str) -> None:
    torch.manual_seed(0)
    options = OPTIONS[name]
    module = MultiHeadAttention(WIDTH, HEADS, **options)
    told = {key: value for key, value in options.items() if key not in ("bias", "head_dim")}
    found = diagnose(module, WIDTH, HEADS, **told)
    assert found.verified, found


FORGOTTEN = {
    "causal": "sees_future",
    "window": "window_ignored",
    "rotary": "rotary_missing",
    "softcap": "softcap_missing",
    "scale": "scale_wrong",
    "norms": "qk_norm_missing",
}


@pytest.mark.parametrize("name", FORGOTTEN)
def test_an_option_that_the_module_does_not_know_is_missed(name: str) -> None:
    torch.manual_seed(0)
    module = MultiHeadAttention(WIDTH, HEADS, causal=name == "window")
    assert FORGOTTEN[name] in names_of(diagnose(module, WIDTH, HEADS, **OPTIONS[name]))


def test_a_scale_of_zero_is_not_taken_for_none() -> None:
    assert not diagnose(built(), E, H, scale=0.0).verified


# Names, hints and lines


def words_in(node: ast.AST) -> set[str]:
    inner = (each for each in ast.walk(node) if isinstance(each, ast.Constant))
    return {each.value for each in inner if isinstance(each.value, str)}


def named_findings(tree: ast.AST) -> set[str]:
    """The names in calls that record a finding, and in lists that are called ``found``."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            called = node.func.id if isinstance(node.func, ast.Name) else called
            places = {"Mistake": slice(0, 1), "setdefault": slice(0, 1), "_record": slice(2, None)}
            for argument in node.args[places.get(called, slice(0, 0))]:
                names |= words_in(argument)
        if isinstance(node, ast.Assign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(each, ast.Name) and each.id == "found" for each in targets):
                names |= words_in(node.value) if isinstance(node.value, ast.List) else set()
    return names


def test_every_finding_has_a_hint_and_every_hint_a_finding() -> None:
    written: set[str] = set()
    words: set[str] = set()
    for module in (doctor, mistakes):
        tree = ast.parse(inspect.getsource(module))
        written |= named_findings(tree)
        words |= words_in(tree)
    tried = {m.name for options in OPTIONS.values() for m in known_mistakes(probed(options)[1])}
    assert len(written) > 30
    assert (written | tried) - HINTS.keys() == set()
    assert HINTS.keys() - words == set()
    assert LINES.keys() - HINTS.keys() == set()


def test_the_names_are_those_that_were_agreed() -> None:
    assert HINTS.keys() == REQUIRED | BESIDES
    assert {name for each in SPECIMENS for name in (each.bug, *each.also)} <= HINTS.keys()
    assert REQUIRED - {each.bug for each in SPECIMENS} == set()


@pytest.mark.parametrize("name", HINTS)
def test_a_hint_is_a_sentence(name: str) -> None:
    hint = HINTS[name]
    assert re.fullmatch(r"\S.{20,300}\.", hint)
    assert "  " not in hint
    assert re.fullmatch(r"[a-z]+(_[a-z]+)*", name)
    re.compile(LINES.get(name, ""))


def test_mistakes_have_names_and_say_what_they_do() -> None:
    for options in OPTIONS.values():
        for mistake in known_mistakes(probed(options)[1]):
            assert isinstance(mistake, Mistake)
            assert mistake.does
            assert mistake.changes.keys() <= vars(Recipe()).keys()


# Sizes, dtypes and time


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("build", [built, PerHead, named], ids=["packed", "per head", "separate"])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_dtypes_are_healthy(dtype: torch.dtype, build: Any, causal: bool) -> None:
    if causal and build is not built:
        build = functools.partial(named, ("qkv", "proj"), CausalNamed)
    module = (build(causal=True) if causal and build is built else build()).to(dtype)
    found = diagnose(module, E, H, causal=causal)
    assert found.verified, found
    assert next(module.parameters()).dtype == dtype


class CausalNamed(Module):
    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        scores: Tensor = einsum(q, k, "b h i d, b h j d -> b h i j") * q.shape[-1] ** -0.5
        size = scores.shape[-1]
        hidden = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
        return scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(dim=-1)


SIZES = [
    (width, heads, kv_heads)
    for width in (1, 2, 3, 4, 6)
    for heads in range(1, width + 1)
    if width % heads == 0
    for kv_heads in range(1, heads + 1)
    if heads % kv_heads == 0
]


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_small_sizes_are_healthy(sizes: tuple[int, int, int], causal: bool) -> None:
    width, heads, kv_heads = sizes
    torch.manual_seed(0)
    module = MultiHeadAttention(width, heads, num_kv_heads=kv_heads, causal=causal)
    found = diagnose(module, width, heads, num_kv_heads=kv_heads, causal=causal)
    assert found.verified, found


@pytest.mark.parametrize(
    "sizes", [(10, 3, 4), (8, 4, 5), (5, 2, 2), (12, 5, 1), (7, 1, 3)], ids=str
)
def test_heads_need_not_make_up_the_width(sizes: tuple[int, int, int]) -> None:
    width, heads, dim = sizes
    torch.manual_seed(0)
    found = diagnose(MultiHeadAttention(width, heads, head_dim=dim), width, heads)
    assert found.verified, found


class Fixed(Module):
    """Takes sequences of one length only."""

    length = 0

    def forward(self, x: Tensor) -> Any:
        assert x.shape[1] == self.length, "another length"
        return super().forward(x)


@pytest.mark.parametrize("length", [5, 6, 7, 8, 16, 32, 64])
def test_a_fixed_length_is_healthy(length: int) -> None:
    module = named(cls=Fixed)
    assert isinstance(module, Fixed)
    module.length = length
    found = diagnose(module, E, H)
    assert found.verified, found
    assert [note for note in found.notes if "length" in note] == [*found.notes]
    assert found.notes


class OneSample(Module):
    """Written for one sample: a batch is not what it takes."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x.view(1, -1, E) if len(x) == 1 else x[0, 0])


class ChecksOneSample(Module):
    def forward(self, x: Tensor) -> Any:
        assert len(x) == 1, "no batch"
        return super().forward(x)


def test_one_that_takes_no_batch_is_told_so() -> None:
    (finding,) = diagnose(named(cls=ChecksOneSample), E, H).findings
    assert finding.name == "raises"
    assert "one sample alone" in finding.evidence
    assert "no batch" in finding.evidence
    assert not diagnose(named(cls=OneSample), E, H).healthy


@pytest.mark.parametrize("weights", ["auto", None])
@pytest.mark.parametrize("cls", [NamedAttention, Unscaled])
def test_a_large_one_takes_seconds(cls: type[NamedAttention], weights: str | None) -> None:
    module = cls(768, 12, SEPARATE)
    start = time.process_time()
    found = diagnose(module, 768, 12, weights=weights)
    assert time.process_time() - start < SECONDS
    assert found.healthy == (weights is None or cls is NamedAttention), found


class Nothing(Module):
    """Explained by no known mistake."""

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        return F.softmax(-torch.cdist(q, k), dim=-1)


def test_a_large_one_that_nothing_explains_takes_seconds() -> None:
    start = time.process_time()
    found = diagnose(Nothing(768, 12, SEPARATE), 768, 12)
    assert time.process_time() - start < SECONDS
    assert (found.healthy, found.verified, len(found.notes)) == (True, False, 1), found


def test_one_line_in_a_test_of_the_readers() -> None:
    assert diagnose(built(causal=True), E, H, causal=True).healthy
    with pytest.raises(AssertionError, match="sees_future"):
        assert diagnose(built(), E, H, causal=True).healthy
