"""Attention and rotary embedding of the ONNX standard: the cases that the onnx package ships, and its reference.

Their inputs, options and outputs come from code that nobody here wrote. A small adapter says each of their options in
the words of ``attention``; it is shared by the test that shows that wrong implementations fail.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from onnx.backend.test.case import node as onnx_cases
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from mha_lib import RotaryEmbedding, attention, causal_mask, merge_heads, padding_mask, split_heads
from tests import tolerances
from tests.support import DRAWS, Draw, assert_near, by_dtype
from tests.tolerances import ROTATED

ONNX = by_dtype(tolerances.ONNX)
NUMBER_OF_CASES = {"Attention": 93, "RotaryEmbedding": 8}
MODULES = ["attention", "rotaryembedding"]
REFUSALS = {
    "auto": (),
    "reference": (),
    "tiled": ("return_weights",),
    "sdpa": ("softcap", "return_weights"),
}
ANSWERED = {"auto": 93, "reference": 93, "tiled": 87, "sdpa": 77}
BACKENDS = list(REFUSALS)


class OnnxCase(NamedTuple):
    """One node with numbers: everything by the name that the standard gives it."""

    name: str
    attributes: dict[str, Any]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


def to_torch(array: Any) -> Tensor:
    """A tensor of the array's own type; torch does not read numpy's bfloat16."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.astype(np.float32)).bfloat16()
    return torch.from_numpy(array.copy())


def collect() -> dict[str, list[OnnxCase]]:
    """The cases by operator. Of all modules with cases only two are imported: the others take long and warn."""
    np.random.seed(0)
    for module in MODULES:
        importlib.import_module(f"{onnx_cases.__name__}.{module}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_cases, "import_recursive", lambda package: None)
        collected = onnx_cases.collect_testcases()
    cases: dict[str, list[OnnxCase]] = {}
    for case in collected:
        if "expanded" not in case.name:
            assert case.model is not None
            assert case.data_sets is not None
            (node,), (arrays,) = case.model.graph.node, case.data_sets
            cases.setdefault(node.op_type, []).append(to_case(case.name, node, *arrays))
    return cases


def to_case(name: str, node: Any, inputs: Any, outputs: Any) -> OnnxCase:
    """Give the arrays of a case their names; an empty name stands for an input that is left out."""
    named = [
        dict(zip(filter(None, names), map(to_torch, arrays), strict=True))
        for names, arrays in ((node.input, inputs), (node.output, outputs))
    ]
    attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    return OnnxCase(name.removeprefix("test_"), attributes, *named)


CASES = collect()
ATTENTION, ROTARY = CASES["Attention"], CASES["RotaryEmbedding"]


class Question(NamedTuple):
    """A case in the words of ``attention``."""

    query: Tensor
    key: Tensor
    value: Tensor
    options: dict[str, Any]


def to_question(case: OnnxCase) -> Question:
    """Split the heads, append to the past, and translate the options."""
    given, attributes = case.inputs, case.attributes
    query, key, value = (given[name] for name in "QKV")
    if query.ndim == 3:
        heads, kv_heads = attributes["q_num_heads"], attributes["kv_num_heads"]
        query = split_heads(query, query.shape[-1] // heads)
        key, value = (split_heads(x, x.shape[-1] // kv_heads) for x in (key, value))
    if "past_key" in given:
        key = torch.cat([given["past_key"], key], dim=2)
        value = torch.cat([given["past_value"], value], dim=2)
    options = {
        "scale": attributes.get("scale"),
        "softcap": attributes.get("softcap") or None,
        "return_weights": attributes.get("qk_matmul_output_mode") == 3,
        **positions(case, query.shape[2]),
        **masks(case, key.shape[2]),
    }
    return Question(query, key, value, options)


def positions(case: OnnxCase, queries: int) -> dict[str, Any]:
    """Causal, window and offset. ``left`` keys before and ``right`` after are a causal window that looks ahead."""
    left, right = (case.attributes.get(f"{side}_window_size", -1) for side in ("left", "right"))
    right = 0 if case.attributes.get("is_causal") else right
    if left < 0 and right < 0:
        return {}
    assert right >= 0, "a window that is open on the right only has no words here"
    offset: int | Tensor = case.inputs["past_key"].shape[2] if "past_key" in case.inputs else 0
    if "nonpad_kv_seqlen" in case.inputs:
        offset = case.inputs["nonpad_kv_seqlen"] - queries
    window = None if left < 0 else left + right + 1
    return {"causal": True, "window": window, "query_offset": offset + right}


def masks(case: OnnxCase, keys: int) -> dict[str, Tensor]:
    """Mask or bias, forbidden where it is too short, and the mask for keys that are padding."""
    found: dict[str, Tensor] = {}
    if "attn_mask" in case.inputs:
        given = case.inputs["attn_mask"]
        is_mask = given.dtype == torch.bool
        missing, fill = keys - given.shape[-1], False if is_mask else -torch.inf
        padded = F.pad(given, (0, missing), value=fill) if missing else given
        found["mask" if is_mask else "bias"] = padded
    if "nonpad_kv_seqlen" in case.inputs:
        real = padding_mask(case.inputs["nonpad_kv_seqlen"], keys)
        found["mask"] = found.get("mask", torch.tensor(True)) & real
    return found


def answer(case: OnnxCase, attend: Callable[..., Any]) -> dict[str, Tensor]:
    """All outputs of the case, by name, in the layout of its inputs."""
    query, key, value, options = to_question(case)
    result = attend(query, key, value, **options)
    output, weights = result if options["return_weights"] else (result, None)
    answers = {"present_key": key, "present_value": value}
    answers["Y"] = merge_heads(output) if case.inputs["Q"].ndim == 3 else output
    mode = case.attributes.get("qk_matmul_output_mode", 0)
    answers["qk_matmul_output"] = stage(case, mode) if weights is None else weights
    return {name: answers[name] for name in case.outputs}


def stage(case: OnnxCase, mode: int) -> Tensor:
    """What the scores are before the softmax: scaled (0), after softcap (1), with bias and masks (2)."""
    query, key, _, options = to_question(case)
    key = repeat(key, "b k j d -> b (k g) j d", g=query.shape[1] // key.shape[1])
    scores: Tensor = einsum(query, key, "b h i d, b h j d -> b h i j")
    scores = scores * (options["scale"] or query.shape[-1] ** -0.5)
    cap = options["softcap"]
    scores = cap * torch.tanh(scores / cap) if mode > 0 and cap else scores
    if mode < 2:
        return scores
    if options.get("causal"):
        assert options["window"] is None, "no case shows biased scores under a window"
        seen = causal_mask(*scores.shape[2:], query_offset=options["query_offset"])
        scores = scores.masked_fill(~seen, -torch.inf)
    scores = scores + options.get("bias", 0)
    return scores.masked_fill(~options.get("mask", torch.tensor(True)), -torch.inf)


def differs(case: OnnxCase, attend: Callable[..., Any]) -> str | None:
    """What is wrong with the answer to a case, if anything."""
    try:
        answers = answer(case, attend)
        for name, expected in case.outputs.items():
            assert answers[name].dtype == expected.dtype
            assert_near(answers[name], expected, ONNX[expected.dtype])
    except AssertionError as error:
        return f"{case.name}: {error}"
    return None


def failures(attend: Callable[..., Any]) -> list[str]:
    """The attention cases that an implementation fails."""
    return [case.name for case in ATTENTION if differs(case, attend)]


def refused(backend: str, options: dict[str, Any]) -> bool:
    """Whether the backend cannot do what the case asks."""
    return any(options[name] for name in REFUSALS[backend])


def test_no_case_is_lost() -> None:
    counts = {operator: len(CASES.get(operator, [])) for operator in NUMBER_OF_CASES}
    assert counts == NUMBER_OF_CASES
    names = [case.name for cases in CASES.values() for case in cases]
    assert len(names) == len(set(names)) == sum(NUMBER_OF_CASES.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ATTENTION, ids=lambda case: case.name)
def test_attention_answers_as_the_standard_demands(case: OnnxCase, backend: str) -> None:
    attend = partial(attention, backend=backend)
    if refused(backend, to_question(case).options):
        with pytest.raises(ValueError, match=backend):
            answer(case, attend)
    else:
        assert differs(case, attend) is None


def test_each_backend_answers_as_many_as_ever() -> None:
    questions = [to_question(case).options for case in ATTENTION]
    answered = {
        backend: sum(not refused(backend, options) for options in questions) for backend in BACKENDS
    }
    assert answered == ANSWERED


def random_case(draw: Draw) -> OnnxCase:
    """Any sizes and options that the operator has; its own reference gives the answer."""
    batch, kv_heads, group = draw.size(1, 3), draw.size(1, 3), draw.size(1, 3)
    queries, keys, past = draw.size(1, 6), draw.size(1, 6), draw.size(0, 4)
    width, value_dim = draw.size(1, 6), draw.size(1, 6)
    inputs = {
        "Q": draw.normal(batch, kv_heads * group, queries, width),
        "K": draw.normal(batch, kv_heads, keys, width),
        "V": draw.normal(batch, kv_heads, keys, value_dim),
    }
    # The reference takes the number of queries from the mask: it must not be broadcast along them.
    shape = draw.sizes.choice([(), (kv_heads * group,), (batch, 1), (batch, kv_heads * group)])
    mask_shape = (*shape, queries, keys + past)
    kind = draw.sizes.choice(["none", "bool", "float"])
    if kind != "none":
        inputs["attn_mask"] = draw.mask(*mask_shape) if kind == "bool" else draw.normal(*mask_shape)
    if past:
        inputs["past_key"] = draw.normal(batch, kv_heads, past, width)
        inputs["past_value"] = draw.normal(batch, kv_heads, past, value_dim)
    elif draw.size(0, 1):
        lengths = [draw.size(1, keys) for _ in range(batch)]
        inputs["nonpad_kv_seqlen"] = torch.tensor(lengths)
    right = draw.size(-1, 3)
    attributes = {
        "is_causal": draw.size(0, 1),
        "scale": draw.sizes.choice([0.25, 1.0]),
        "softcap": draw.sizes.choice([0.0, 1.5]),
        "left_window_size": draw.size(-1, 3) if right >= 0 else -1,
        "right_window_size": right,
    }
    return OnnxCase("random", attributes, inputs, answer_of_onnx(attributes, inputs))


def answer_of_onnx(attributes: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    order = ["Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen"]
    names = [name if name in inputs else "" for name in order]
    outputs = ["Y", "present_key", "present_value"]
    node = onnx.helper.make_node("Attention", names, outputs, **attributes)
    feeds = {name: tensor.numpy() for name, tensor in inputs.items()}
    answers = ReferenceEvaluator(node).run(None, feeds)
    return dict(zip(outputs, map(to_torch, answers), strict=True))


@pytest.mark.parametrize("seed", range(5 * DRAWS))
def test_attention_answers_as_the_reference_of_onnx(seed: int) -> None:
    case = random_case(Draw(seed))
    options = to_question(case).options
    for backend in BACKENDS:
        if not refused(backend, options):
            assert differs(case, partial(attention, backend=backend)) is None


@pytest.mark.parametrize("case", ROTARY, ids=lambda case: case.name)
def test_rotary_embedding_turns_as_the_standard_demands(case: OnnxCase) -> None:
    """The tables of the cases hold random numbers, not the cosines and sines of any frequencies.

    But each pair of them is a cosine and a sine times a length. So each token is turned by a module of its own, whose
    frequencies lead to the angles of the table at the token's position, and then stretched.
    """
    x = case.inputs["input"]
    heads = case.attributes.get("num_heads")
    tokens = split_heads(x, x.shape[-1] // heads) if heads else x
    expected = case.outputs["output"]
    interleaved = bool(case.attributes.get("interleaved"))
    tables = [case.inputs[name] for name in ("cos_cache", "sin_cache")]
    places = case.inputs.get("position_ids")
    if places is not None:
        tables = [table[places] for table in tables]
    else:
        places = repeat(torch.arange(x.shape[-2]), "n -> b n", b=x.shape[0])
    turned = torch.empty_like(tokens)
    for sample, token in np.ndindex(*places.shape):
        cosine, sine = (table[sample, token] for table in tables)
        turned[sample, :, token] = turn(
            tokens[sample, :, token], cosine, sine, interleaved, int(places[sample, token])
        )
    assert_near(merge_heads(turned) if heads else turned, expected, ROTATED)


def turn(token: Tensor, cosine: Tensor, sine: Tensor, interleaved: bool, position: int) -> Tensor:
    """One token, ``(h, d)``, turned and stretched."""
    dim = 2 * len(cosine)
    rotary = RotaryEmbedding(
        dim, interleaved=interleaved, frequencies=torch.atan2(sine, cosine) / (position + 1)
    )
    turned = rotary(rearrange(token, "h d -> 1 h 1 d"), position + 1)
    layout = "f -> (f two)" if interleaved else "f -> (two f)"
    length = repeat(torch.hypot(sine, cosine), layout, two=2)
    stretched: Tensor = turned * F.pad(length, (0, token.shape[-1] - dim), value=1.0)
    return stretched[0, :, 0]
