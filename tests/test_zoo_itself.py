"""The zoo is what its labels say: the right styles are right, and each specimen is broken."""

from __future__ import annotations

import inspect
from collections import defaultdict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mha_lib import causal_mask, merge_heads, reference_attention, sliding_window_mask
from tests import zoo_styles as styles
from tests.zoo import RIGHT, SPECIMENS, Specimen
from tests.zoo_names import NamedAttention, PackedByHead

CLEARLY = 1e-4
"""Float64 of a small module is reproducible to 1e-12; a mistake moves the output by far more than this."""

NO_NUMBERS = {"output_shape", "output_type", "raises", "output_changes_between_calls"}
"""What cannot be compared with numbers."""

SAME_NUMBERS = {
    "nan_when_all_masked",
    "overflow_in_half",
    "parameter_without_gradient",
    "softmax_overflows",
    "dropout_in_eval",
}
"""Right on ordinary input in float64, but for the dropout."""

ROLES: dict[type[nn.Module], tuple[str, ...]] = {
    styles.MultiHeadAttention: ("W_q", "W_k", "W_v", "W_o"),
    styles.MultiHeadedAttention: ("linears.0", "linears.1", "linears.2", "linears.3"),
    styles.SelfAttention: ("queries", "keys", "values", "fc_out"),
    styles.BertAttention: ("self.query", "self.key", "self.value", "output.dense"),
    styles.RaschkaAttention: ("W_query", "W_key", "W_value", "out_proj"),
    styles.LlamaAttention: ("wq", "wk", "wv", "wo"),
    styles.NeoxAttention: ("q_proj", "k_proj", "v_proj", "o_proj"),
    styles.DotProductAttention: ("W_q", "W_k", "W_v", "W_o"),
    styles.LabmlAttention: ("query.linear", "key.linear", "value.linear", "output"),
}
PACKED: dict[type[nn.Module], tuple[str, str]] = {
    styles.CausalSelfAttention: ("c_attn", "c_proj"),
    styles.VitAttention: ("qkv", "proj"),
    styles.MultiheadAttention: ("qkv_proj", "o_proj"),
}
PER_HEAD: dict[type[nn.Module], tuple[str, ...]] = {
    styles.LectureAttention: ("query", "key", "value", "proj"),
    styles.EncoderHeads: ("q", "k", "v", "output_linear"),
}


def one_of(table: dict[type[nn.Module], Any], module: nn.Module) -> Any:
    return next((entry for cls, entry in table.items() if isinstance(module, cls)), None)


def linear(module: nn.Module) -> tuple[Tensor, Tensor]:
    weight = module.weight.T if isinstance(module, styles.Conv1D) else module.weight
    assert isinstance(weight, Tensor)
    bias = module.bias if isinstance(module.bias, Tensor) else torch.zeros(len(weight))
    return weight.detach(), bias.detach()


def weights_of(module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias of query, key, value and output."""
    if roles := one_of(ROLES, module):
        return [linear(module.get_submodule(name)) for name in roles]
    if per_head := one_of(PER_HEAD, module):
        *names, out = per_head
        heads = module.get_submodule("heads").children()
        parts = [[linear(head.get_submodule(name)) for name in names] for head in heads]
        roles_of_heads = zip(*parts, strict=True)
        joined = [[torch.cat(x) for x in zip(*role, strict=True)] for role in roles_of_heads]
        return [(w, b) for w, b in joined] + [linear(module.get_submodule(out))]
    if isinstance(module, NamedAttention) and len(module.names) == 4:
        return [linear(module.get_submodule(name)) for name in module.names]
    packed = module.names if isinstance(module, NamedAttention) else one_of(PACKED, module)
    if packed:
        weight, bias = linear(module.get_submodule(packed[0]))
        order = "(three r) e -> three r e"
        sizes: Any = {}
        if isinstance(module, styles.MultiheadAttention | PackedByHead):
            order = "(h three d) e -> three (h d) e"
            sizes = {"h": module.n_heads if packed[1] == "dense" else module.num_heads}
        rows = rearrange(torch.cat([weight, bias[:, None]], dim=1), order, three=3, **sizes)
        out = linear(module.get_submodule(packed[1]))
        return [(part[:, :-1], part[:, -1]) for part in rows] + [out]
    assert isinstance(module, styles.EinopsAttention)
    (k, v), nothing = linear(module.to_kv)[0].chunk(2), torch.zeros(len(module.to_q.weight))
    return [linear(module.to_q), (k, nothing), (v, nothing), linear(module.to_out[0])]


def from_dict(w: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    names = ("q", "k", "v", "out")
    return [(w[name], w.get(f"{name}_bias", torch.zeros(len(w[name])))) for name in names]


def module_in(candidate: Any) -> Any:
    """The module itself, or the one that a lambda holds."""
    if isinstance(candidate, nn.Sequential):
        return candidate[0]
    if isinstance(candidate, nn.Module):
        return candidate
    cells = [cell.cell_contents for cell in candidate.__closure__ or ()]
    return next((cell for cell in cells if isinstance(cell, nn.Module)), None)


def call(candidate: Any, x: Tensor, mask: Tensor | None) -> Any:
    """What the doctor's contract says: self-attention, with the mask where one is taken."""
    masks = () if mask is None else (mask,)
    names = {"query", "queries", "values"}
    forward = candidate.forward if isinstance(candidate, nn.Module) else candidate
    inputs = 3 if next(iter(inspect.signature(forward).parameters)) in names else 1
    if isinstance(module_in(candidate), styles.SelfAttention) and inputs == 3:
        masks = (mask,)  # type: ignore[assignment]
    with torch.no_grad():
        out = candidate(*[x] * inputs, *masks)
    return out[0] if isinstance(out, tuple) else out


def prepared(candidate: Any, dtype: torch.dtype = torch.float64) -> Any:
    module = module_in(candidate)
    if module is not None:
        module.eval().to(dtype)
    return candidate


def inputs(specimen: Specimen, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(3, 7, specimen.arguments["embed_dim"], generator=generator).to(dtype)
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[1, 4:] = mask[2, :2] = False
    return 4 * x, mask if specimen.arguments.get("takes_mask") else None


def expected(specimen: Specimen, candidate: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    """The reference with the weights of the candidate, under the contract of the specimen."""
    arguments = specimen.arguments
    given = arguments.get("weights")
    matrices = from_dict(given) if given else weights_of(module_in(candidate))
    (wq, bq), (wk, bk), (wv, bv), (wo, bo) = ((w.to(x), b.to(x)) for w, b in matrices)
    d = arguments["embed_dim"] // arguments["num_heads"]
    q, k, v = (
        rearrange(F.linear(x, w, b), "b n (h d) -> b h n d", d=d)
        for w, b in ((wq, bq), (wk, bk), (wv, bv))
    )
    if arguments.get("qk_norm"):
        q, k = (arguments["qk_norm"](d).to(x)(t) for t in (q, k))
    if arguments.get("rotary"):
        q, k = (arguments["rotary"](t) for t in (q, k))
    n, causal, window = x.shape[1], arguments.get("causal", False), arguments.get("window")
    allowed = torch.ones(n, n, dtype=torch.bool)
    if causal:
        allowed = causal_mask(n, n)
    if window:
        allowed = sliding_window_mask(n, n, window, causal=causal)
    if mask is not None:
        allowed = allowed & mask[:, None, None, :]
    softcap = arguments.get("softcap")
    out = reference_attention(q, k, v, mask=allowed, softcap=softcap).output
    return F.linear(merge_heads(out), wo, bo).detach()


def ids(specimens: list[Specimen]) -> list[str]:
    return [specimen.name for specimen in specimens]


def with_bug(*bugs: str) -> list[Specimen]:
    return [specimen for specimen in SPECIMENS if specimen.bug in bugs]


def test_names_are_unique_and_every_bug_comes_in_several_styles() -> None:
    assert len({specimen.name for specimen in SPECIMENS}) == len(SPECIMENS)
    found = defaultdict(set)
    for specimen in SPECIMENS:
        found[specimen.bug].add(specimen.style.partition("-")[0])
    assert {bug: seen for bug, seen in found.items() if len(seen) < 2} == {}
    assert sum(bool(specimen.also) for specimen in SPECIMENS) >= 12


@pytest.mark.parametrize("specimen", RIGHT, ids=ids(RIGHT))
def test_the_right_styles_equal_the_reference(specimen: Specimen) -> None:
    candidate = prepared(specimen.build())
    x, mask = inputs(specimen)
    torch.testing.assert_close(
        call(candidate, x, mask), expected(specimen, candidate, x, mask), rtol=1e-6, atol=1e-6
    )


DIFFERENT = [
    specimen
    for specimen in SPECIMENS
    if specimen.bug not in NO_NUMBERS | SAME_NUMBERS and specimen.right is not None
]


@pytest.mark.parametrize("specimen", DIFFERENT, ids=ids(DIFFERENT))
def test_a_specimen_differs_from_what_is_meant(specimen: Specimen) -> None:
    assert specimen.right is not None
    x, mask = inputs(specimen)
    out = call(prepared(specimen.build()), x, mask)
    right = prepared(specimen.right())
    difference = (out - expected(specimen, right, x, mask)).abs().max()
    assert not difference < CLEARLY


@pytest.mark.parametrize("specimen", with_bug(*SAME_NUMBERS), ids=ids(with_bug(*SAME_NUMBERS)))
def test_a_hidden_mistake_does_not_show_in_the_numbers(specimen: Specimen) -> None:
    if specimen.also or specimen.right is None or specimen.bug == "dropout_in_eval":
        return
    x, mask = inputs(specimen)
    out, right = call(prepared(specimen.build()), x / 4, mask), prepared(specimen.right())
    torch.testing.assert_close(out, call(right, x / 4, mask))


CHANGING = [
    specimen
    for specimen in SPECIMENS
    if {"dropout_in_eval", "output_changes_between_calls"} & {specimen.bug, *specimen.also}
]


@pytest.mark.parametrize("specimen", CHANGING, ids=ids(CHANGING))
def test_two_calls_differ(specimen: Specimen) -> None:
    candidate = prepared(specimen.build())
    x, mask = inputs(specimen)
    first, second = call(candidate, x, mask), call(candidate, x, mask)
    assert (first - second).abs().max() > CLEARLY


NOT_FINITE = with_bug("nan_when_all_masked", "not_finite", "overflow_in_half", "softmax_overflows")


@pytest.mark.parametrize("specimen", NOT_FINITE, ids=ids(NOT_FINITE))
def test_it_is_not_finite_or_raises(specimen: Specimen) -> None:
    half = specimen.bug == "overflow_in_half"
    candidate = prepared(specimen.build(), torch.float16 if half else torch.float64)
    x, mask = inputs(specimen, torch.float16 if half else torch.float64)
    if specimen.bug == "softmax_overflows":
        x = x * 1000
    if specimen.bug == "nan_when_all_masked":
        mask = torch.zeros(3, 7, dtype=torch.bool)
    if half:
        with pytest.raises(RuntimeError, match="overflow"):
            call(candidate, x, mask)
    else:
        assert not call(candidate, x, mask).isfinite().all()


@pytest.mark.parametrize("specimen", with_bug("raises"), ids=ids(with_bug("raises")))
def test_it_raises(specimen: Specimen) -> None:
    x, mask = inputs(specimen)
    with pytest.raises((RuntimeError, TypeError, AssertionError)):
        call(prepared(specimen.build()), x, mask)


OTHER_OUTPUT = with_bug("output_shape", "output_type")


@pytest.mark.parametrize("specimen", OTHER_OUTPUT, ids=ids(OTHER_OUTPUT))
def test_the_output_is_another(specimen: Specimen) -> None:
    x, mask = inputs(specimen)
    out = call(prepared(specimen.build()), x, mask)
    same = isinstance(out, Tensor) and (out.shape, out.dtype) == (x.shape, x.dtype)
    assert not same


@pytest.mark.parametrize(
    "specimen",
    with_bug("parameter_without_gradient"),
    ids=ids(with_bug("parameter_without_gradient")),
)
def test_a_parameter_gets_no_gradient(specimen: Specimen) -> None:
    candidate = prepared(specimen.build())
    module = module_in(candidate)
    x, _ = inputs(specimen)
    out = module(x, x, x) if isinstance(module, styles.MultiHeadAttention) else module(x)
    (out[0] if isinstance(out, tuple) else out).square().sum().backward()
    blocks = {
        name: parameter.grad.chunk(3)
        for name, parameter in module.named_parameters()
        if parameter.grad is not None and parameter.dim() > 1
    }
    unused = [name for name, parameter in module.named_parameters() if parameter.grad is None]
    unused += [name for name, parts in blocks.items() if any(not part.any() for part in parts)]
    assert unused
