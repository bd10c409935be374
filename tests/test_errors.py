"""Every bad argument is refused with a ValueError or TypeError that names it, what was expected and what came."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import mha_lib
from mha_lib import (
    SimpleMultiHeadAttention,
    SplitMultiHeadAttention,
    alibi_bias,
    causal_mask,
    document_mask,
    merge_heads,
    padding_mask,
    plot_attention,
    reference_attention,
    sliding_window_mask,
    split_heads,
)

B, H, K, I, J, D, E = 2, 8, 4, 5, 7, 6, 12  # noqa: E741
zeros, long = torch.zeros, torch.long
FLOAT8 = zeros(B, H, I, D).to(torch.float8_e4m3fn)
SPARSE = zeros(B, H, I, D).to_sparse()
NESTED = torch.nested.nested_tensor([zeros(3), zeros(4)], layout=torch.jagged)


def module_arguments() -> dict[str, Any]:
    return {"query": zeros(B, I, E), "key": zeros(B, J, E), "value": zeros(B, J, E)}


def pruned() -> SplitMultiHeadAttention:
    module = SplitMultiHeadAttention(E, 3)
    module.heads = nn.ModuleList(module.heads[1:])
    return module


GOOD: dict[str, tuple[Callable[..., object], dict[str, Any]]] = {
    "reference_attention": (
        reference_attention,
        {"query": zeros(B, H, I, D), "key": zeros(B, K, J, D), "value": zeros(B, K, J, 3)},
    ),
    "causal_mask": (causal_mask, {"query_length": 3, "key_length": 3}),
    "sliding_window_mask": (
        sliding_window_mask,
        {"query_length": 3, "key_length": 3, "window": 2},
    ),
    "padding_mask": (padding_mask, {"lengths": torch.tensor([1, 3]), "max_length": 3}),
    "document_mask": (document_mask, {"document_ids": torch.tensor([[0, 0, 1]])}),
    "alibi_bias": (alibi_bias, {"num_heads": 2, "query_length": 3, "key_length": 3}),
    "split_heads": (split_heads, {"x": zeros(B, I, E), "head_dim": 4}),
    "merge_heads": (merge_heads, {"x": zeros(B, 3, I, 4)}),
    "SimpleMultiHeadAttention": (
        SimpleMultiHeadAttention,
        {"embed_dim": E, "num_heads": 3},
    ),
    "SplitMultiHeadAttention": (SplitMultiHeadAttention, {"embed_dim": E, "num_heads": 3}),
    **{
        f"{module.__name__}({'causal' if causal else ''}).forward": (
            module(E, 3, causal=causal).forward,
            module_arguments(),
        )
        for module in (SimpleMultiHeadAttention, SplitMultiHeadAttention)
        for causal in (False, True)
    },
    "plot_attention": (
        plot_attention,
        {"weights": zeros(2, 2, 3), "query_tokens": ["a", "b"], "key_tokens": ["c", "d", "e"]},
    ),
}


@dataclass(frozen=True)
class Refused:
    """A call with one bad argument: what must be raised, and the words that its message must hold."""

    function: str
    argument: str
    exception: type[Exception]
    words: tuple[str, ...]
    changes: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.function}({self.argument}): {' '.join(self.words)}"


def refused(
    functions: str, argument: str, exception: type[Exception], *words: str, **changes: Any
) -> list[Refused]:
    return [
        Refused(function, argument, exception, words, changes) for function in functions.split()
    ]


Wrong = list[tuple[Any, str]]


def each(
    functions: str, argument: str, exception: type[Exception], expected: str, wrong: Wrong
) -> list[Refused]:
    """One case for each wrong value and the words that must describe it."""
    return [
        case
        for value, got in wrong
        for case in refused(functions, argument, exception, expected, got, **{argument: value})
    ]


def counts(functions: str, argument: str, minimum: int) -> list[Refused]:
    """What every argument that counts something refuses."""
    wrong: Wrong = [
        (1.5, "float 1.5"),
        ("3", "str '3'"),
        (True, "bool True"),
        (None, "NoneType"),
        (torch.tensor(3), "Tensor"),
    ]
    low: Wrong = [(minimum - 1, f"got {minimum - 1}"), (-5, "got -5")]
    return [
        *each(functions, argument, TypeError, "int", wrong),
        *each(functions, argument, ValueError, f"at least {minimum}", low),
    ]


def flags(functions: str, argument: str) -> list[Refused]:
    """What every argument that is on or off refuses."""
    wrong: Wrong = [(1, "int 1"), ("no", "str 'no'"), (None, "NoneType")]
    return each(functions, argument, TypeError, "True or False", wrong)


def numbers(function: str, argument: str) -> list[Refused]:
    """What every argument that is a number refuses."""
    wrong: Wrong = [("1", "str '1'"), (True, "bool True"), (1j, "complex")]
    wrong += [(torch.tensor(1.0), "Tensor")]
    unbounded: Wrong = [(value, f"got {value}") for value in (math.nan, math.inf, -math.inf)]
    return [
        *each(function, argument, TypeError, "a number", wrong),
        *each(function, argument, ValueError, "finite", unbounded),
    ]


def tensors(functions: str, argument: str) -> list[Refused]:
    """What every tensor argument refuses."""
    wrong: Wrong = [([[1.0]], "list"), (np.zeros(3), "ndarray"), (1.0, "float 1.0")]
    layouts: Wrong = [(SPARSE, "sparse_coo"), (NESTED, "nested")]
    return [
        *each(functions, argument, TypeError, "tensor", wrong),
        *each(functions, argument, ValueError, "dense", layouts),
    ]


def integers(function: str, argument: str, *shape: int) -> list[Refused]:
    """What every tensor of integers refuses."""
    dtypes = (torch.float32, torch.bool, torch.complex64)
    wrong: Wrong = [(zeros(shape, dtype=dtype), str(dtype)) for dtype in dtypes]
    return each(function, argument, TypeError, "integer", wrong)


def offsets(function: str) -> list[Refused]:
    """What every ``query_offset`` refuses."""
    wrong: Wrong = [(1.5, "float 1.5"), ("1", "str '1'"), ([1, 2], "list"), (True, "bool True")]
    shapes: Wrong = [(zeros(1, 2, dtype=long), "(1, 2)"), (torch.tensor(3), "()")]
    missing = "lengths differ", "3 and 5", "query_offset=0 if", "query_offset=2 if"
    return [
        *each(function, "query_offset", TypeError, "an int or an integer tensor", wrong),
        *each(function, "query_offset", ValueError, "(batch,), got", shapes),
        *integers(function, "query_offset", 2),
        *refused(function, "query_offset", ValueError, *missing, key_length=5),
    ]


def unfit(functions: str, argument: str, heads: int, got: str, *shape: int) -> list[Refused]:
    """A mask or bias of a shape that does not broadcast to the scores."""
    expected = f"{argument} must broadcast to (batch=2, heads={heads}, query=5, key=7), got {got}"
    value = zeros(shape, dtype=torch.bool if argument == "mask" else torch.float32)
    return refused(functions, argument, ValueError, expected, **{argument: value})


def masking(functions: str, heads: int) -> list[Refused]:
    """What every ``mask`` and ``bias`` refuses."""
    cases = [
        case
        for name in ("mask", "bias")
        for case in [
            *tensors(functions, name),
            *unfit(
                functions,
                name,
                heads,
                f"(2, 7); for a padding {name} write {name}[:, None, None, :]",
                2,
                7,
            ),
            *unfit(
                functions,
                name,
                heads,
                f"(2, 5, 7); for one {name} a sample write {name}[:, None]",
                2,
                5,
                7,
            ),
            *unfit(functions, name, heads, "(7, 5)", 7, 5),
            *unfit(functions, name, heads, "(2, 2, 5, 7)", 2, 2, 5, 7),
            *unfit(functions, name, heads, "(1, 1, 1, 5, 7)", 1, 1, 1, 5, 7),
        ]
    ]
    numeric: Wrong = [
        (zeros(I, J, dtype=dtype), f"{dtype}; numbers to be added to the scores go in bias")
        for dtype in (torch.float32, torch.int64, torch.uint8)
    ]
    other: Wrong = [
        (zeros(I, J, dtype=dtype), f"{dtype}")
        for dtype in (torch.int64, torch.complex64, torch.float8_e5m2)
    ]
    boolean = torch.ones(I, J, dtype=torch.bool)
    return [
        *cases,
        *each(functions, "mask", TypeError, "boolean, True where attention is allowed", numeric),
        *each(functions, "bias", TypeError, "floating", other),
        *refused(functions, "bias", TypeError, "torch.bool", "goes in mask", bias=boolean),
        *refused(
            functions, "bias", ValueError, "device", "cpu", "meta", bias=zeros(I, J, device="meta")
        ),
        *refused(functions, "mask", ValueError, "device", "cpu", "meta", mask=boolean.to("meta")),
    ]


ATTENTION = "reference_attention"
MODULES = "SimpleMultiHeadAttention SplitMultiHeadAttention"
FORWARDS = " ".join(name for name in GOOD if name.endswith(".forward"))
LENGTHS = "causal_mask sliding_window_mask alibi_bias"

CASES = [
    *tensors(ATTENTION, "query"),
    *tensors(ATTENTION, "key"),
    *tensors(ATTENTION, "value"),
    *refused(
        ATTENTION,
        "query",
        ValueError,
        "(batch, heads, query, head_dim), got (8, 5, 6)",
        "query[None]",
        query=zeros(H, I, D),
    ),
    *refused(
        ATTENTION, "key", ValueError, "(batch, heads, key, head_dim)", "(7, 6)", key=zeros(J, D)
    ),
    *refused(
        ATTENTION,
        "value",
        ValueError,
        "value_dim",
        "(4, 7, 3)",
        "value[None]",
        value=zeros(K, J, 3),
    ),
    *refused(
        ATTENTION,
        "query",
        TypeError,
        "floating",
        "torch.int64",
        query=zeros(B, H, I, D, dtype=long),
    ),
    *refused(ATTENTION, "query", TypeError, "floating", "torch.float8_e4m3fn", query=FLOAT8),
    *refused(
        ATTENTION,
        "key",
        TypeError,
        "floating",
        "torch.bool",
        key=zeros(B, K, J, D, dtype=torch.bool),
    ),
    *refused(
        ATTENTION,
        "value",
        TypeError,
        "floating",
        "complex64",
        value=zeros(B, K, J, 3, dtype=torch.complex64),
    ),
    *refused(
        ATTENTION, "key", ValueError, "dtype", "float32", "float64", key=zeros(B, K, J, D).double()
    ),
    *refused(
        ATTENTION,
        "value",
        ValueError,
        "dtype",
        "float32",
        "float16",
        value=zeros(B, K, J, 3).half(),
    ),
    *refused(
        ATTENTION, "key", ValueError, "device", "cpu", "meta", key=zeros(B, K, J, D, device="meta")
    ),
    *refused(
        ATTENTION,
        "value",
        ValueError,
        "device",
        "cpu",
        "meta",
        value=zeros(B, K, J, 3, device="meta"),
    ),
    *refused(ATTENTION, "key", ValueError, "batch", "2", "got 3", key=zeros(3, K, J, D)),
    *refused(ATTENTION, "value", ValueError, "batch", "2", "got 1", value=zeros(1, K, J, 3)),
    *refused(ATTENTION, "query", ValueError, "head_dim", "(2, 8, 5, 0)", query=zeros(B, H, I, 0)),
    *refused(ATTENTION, "key", ValueError, "head_dim", "6", "got 5", key=zeros(B, K, J, 5)),
    *refused(
        ATTENTION,
        "key",
        ValueError,
        "heads",
        "8 and 3",
        key=zeros(B, 3, J, D),
        value=zeros(B, 3, J, D),
    ),
    *refused(
        ATTENTION,
        "key",
        ValueError,
        "heads",
        "8 and 0",
        key=zeros(B, 0, J, D),
        value=zeros(B, 0, J, D),
    ),
    *refused(ATTENTION, "value", ValueError, "heads", "4", "got 2", value=zeros(B, 2, J, 3)),
    *refused(
        ATTENTION, "value", ValueError, "as long as key", "7", "got 6", value=zeros(B, K, 6, 3)
    ),
    *masking(ATTENTION, H),
    *numbers(ATTENTION, "scale"),
    *numbers(ATTENTION, "softcap"),
    *refused(ATTENTION, "softcap", ValueError, "positive", "got 0", softcap=0),
    *refused(ATTENTION, "softcap", ValueError, "positive", "got -1.5", softcap=-1.5),
    *tensors(ATTENTION, "sinks"),
    *refused(ATTENTION, "sinks", ValueError, "(heads,), got (1, 8)", sinks=zeros(1, H)),
    *refused(ATTENTION, "sinks", ValueError, "8 query heads", "(4,)", sinks=zeros(K)),
    *refused(ATTENTION, "sinks", TypeError, "floating", "torch.int64", sinks=zeros(H, dtype=long)),
    *refused(
        ATTENTION, "sinks", ValueError, "device", "cpu", "meta", sinks=zeros(H, device="meta")
    ),
    *numbers(ATTENTION, "dropout_p"),
    *refused(ATTENTION, "dropout_p", TypeError, "a number", "NoneType", dropout_p=None),
    *refused(ATTENTION, "dropout_p", ValueError, "between 0 and 1", "got -0.1", dropout_p=-0.1),
    *refused(ATTENTION, "dropout_p", ValueError, "between 0 and 1", "got 1.1", dropout_p=1.1),
    *counts(LENGTHS, "query_length", 0),
    *counts(LENGTHS, "key_length", 0),
    *counts("sliding_window_mask", "window", 1),
    *flags("sliding_window_mask", "causal"),
    *counts("alibi_bias", "num_heads", 1),
    *refused("alibi_bias", "dtype", TypeError, "floating", "torch.int64", dtype=long),
    *refused(
        "alibi_bias", "dtype", TypeError, "floating", "float8_e4m3fn", dtype=torch.float8_e4m3fn
    ),
    *refused("alibi_bias", "dtype", TypeError, "floating", "str 'float32'", dtype="float32"),
    *offsets("causal_mask"),
    *offsets("sliding_window_mask"),
    *offsets("alibi_bias"),
    *refused(LENGTHS, "device", RuntimeError, "device string: nonsense", device="nonsense"),
    *counts("padding_mask", "max_length", 0),
    *integers("padding_mask", "lengths", 2),
    *refused("padding_mask", "lengths", TypeError, "tensor", "int 3", lengths=3),
    *refused("padding_mask", "lengths", TypeError, "integers", "['a']", lengths=["a"]),
    *refused("padding_mask", "lengths", TypeError, "integers", str(2**70), lengths=[2**70]),
    *refused(
        "padding_mask", "lengths", ValueError, "(batch,)", "(1, 2)", lengths=zeros(1, 2, dtype=long)
    ),
    *refused(
        "padding_mask",
        "lengths",
        ValueError,
        "max_length=3",
        "[4, 1]",
        lengths=torch.tensor([4, 1]),
    ),
    *refused(
        "padding_mask", "lengths", ValueError, "0 and", "[-1, 1]", lengths=torch.tensor([-1, 1])
    ),
    *refused("padding_mask", "side", ValueError, "'left' or 'right'", "'top'", side="top"),
    *refused("padding_mask", "side", ValueError, "'left' or 'right'", "None", side=None),
    *refused("padding_mask", "side", ValueError, "'left' or 'right'", "array", side=np.zeros(2)),
    *integers("document_mask", "document_ids", 1, 2),
    *refused("document_mask", "document_ids", TypeError, "tensor", "NoneType", document_ids=None),
    *refused(
        "document_mask",
        "document_ids",
        TypeError,
        "integers",
        "[[1], [2, 3]]",
        document_ids=[[1], [2, 3]],
    ),
    *refused(
        "document_mask",
        "document_ids",
        ValueError,
        "(batch, sequence), got (3,)",
        "document_ids[None]",
        document_ids=zeros(3, dtype=long),
    ),
    *tensors("split_heads merge_heads", "x"),
    *refused(
        "split_heads",
        "x",
        ValueError,
        "(batch, sequence, embed_dim), got (5, 12)",
        "x[None]",
        x=zeros(I, E),
    ),
    *refused(
        "split_heads",
        "x",
        ValueError,
        "(batch, sequence, embed_dim)",
        "(2, 3, 5, 4)",
        x=zeros(B, 3, I, 4),
    ),
    *refused(
        "merge_heads",
        "x",
        ValueError,
        "(batch, heads, sequence, head_dim), got (3, 5, 4)",
        x=zeros(3, I, 4),
    ),
    *counts("split_heads", "head_dim", 1),
    *refused("split_heads", "head_dim", ValueError, "head_dim=5", "x (2, 5, 12)", head_dim=5),
    *counts(MODULES, "embed_dim", 1),
    *counts(MODULES, "num_heads", 1),
    *refused(
        MODULES, "num_heads", ValueError, "head_dim", "embed_dim=12 and num_heads=5", num_heads=5
    ),
    *flags(MODULES, "bias"),
    *flags(MODULES, "causal"),
    *tensors(FORWARDS, "query"),
    *tensors(FORWARDS, "key"),
    *tensors(FORWARDS, "value"),
    *refused(
        FORWARDS,
        "query",
        ValueError,
        "(batch, query, embed_dim), got (5, 12)",
        "query[None]",
        query=zeros(I, E),
    ),
    *refused(
        FORWARDS,
        "key",
        ValueError,
        "(batch, key, embed_dim), got (7, 12)",
        "key[None]",
        key=zeros(J, E),
    ),
    *refused(FORWARDS, "value", ValueError, "(2, 1, 7, 12)", value=zeros(B, 1, J, E)),
    *refused(FORWARDS, "query", TypeError, "query must be a tensor, got NoneType", query=None),
    *refused(FORWARDS, "key", ValueError, "when value is given", "None", key=None),
    *refused(
        FORWARDS, "query", TypeError, "floating", "torch.int64", query=zeros(B, I, E, dtype=long)
    ),
    *refused(
        FORWARDS, "key", TypeError, "floating", "torch.bool", key=zeros(B, J, E, dtype=torch.bool)
    ),
    *refused(FORWARDS, "query", ValueError, "embed_dim=12", "(2, 5, 10)", query=zeros(B, I, 10)),
    *refused(FORWARDS, "key", ValueError, "embed_dim=12", "(2, 7, 3)", key=zeros(B, J, 3)),
    *refused(FORWARDS, "value", ValueError, "embed_dim=12", "(2, 7, 1)", value=zeros(B, J, 1)),
    *refused(FORWARDS, "key", ValueError, "batch", "2", "got 3", key=zeros(3, J, E)),
    *refused(FORWARDS, "value", ValueError, "batch", "2", "got 1", value=zeros(1, J, E)),
    *refused(
        FORWARDS, "key", ValueError, "dtype", "float32", "float64", key=zeros(B, J, E).double()
    ),
    *refused(
        FORWARDS,
        "value",
        ValueError,
        "dtype",
        "float32",
        "bfloat16",
        value=zeros(B, J, E).bfloat16(),
    ),
    *refused(
        FORWARDS, "key", ValueError, "device", "cpu", "meta", key=zeros(B, J, E, device="meta")
    ),
    *refused(FORWARDS, "value", ValueError, "as long as key", "7", "got 6", value=zeros(B, 6, E)),
    *masking(FORWARDS, 3),
    *flags(FORWARDS, "return_weights"),
    *refused("plot_attention", "weights", TypeError, "tensor", "ndarray", weights=np.zeros((2, 3))),
    *refused(
        "plot_attention",
        "weights",
        TypeError,
        "floating",
        "torch.bool",
        weights=zeros(2, 3, dtype=torch.bool),
    ),
    *refused(
        "plot_attention", "weights", ValueError, "(heads, query, key), got (3,)", weights=zeros(3)
    ),
    *refused(
        "plot_attention",
        "weights",
        ValueError,
        "(1, 2, 2, 3)",
        "weights[0]",
        weights=zeros(1, 2, 2, 3),
    ),
    *refused("plot_attention", "weights", ValueError, "empty", "(0, 2, 3)", weights=zeros(0, 2, 3)),
    *refused(
        "plot_attention",
        "weights",
        ValueError,
        "between 0 and 1",
        "1.5",
        weights=torch.full((2, 3), 1.5),
    ),
    *refused(
        "plot_attention",
        "weights",
        ValueError,
        "between 0 and 1",
        "-0.5",
        weights=torch.full((2, 3), -0.5),
    ),
    *refused(
        "plot_attention",
        "weights",
        ValueError,
        "between 0 and 1",
        "nan",
        weights=torch.full((2, 3), torch.nan),
    ),
    *refused(
        "plot_attention",
        "weights",
        ValueError,
        "numbers",
        "meta",
        weights=zeros(2, 3, device="meta"),
    ),
    *refused(
        "plot_attention",
        "query_tokens",
        TypeError,
        "sequence of strings",
        "str 'ab'",
        query_tokens="ab",
    ),
    *refused(
        "plot_attention",
        "query_tokens",
        TypeError,
        "sequence of strings",
        "list",
        query_tokens=[1, 2],
    ),
    *refused(
        "plot_attention",
        "query_tokens",
        TypeError,
        "sequence of strings",
        "NoneType",
        query_tokens=None,
    ),
    *refused(
        "plot_attention",
        "query_tokens",
        ValueError,
        "2 strings",
        "weights",
        "got 1",
        query_tokens=["a"],
    ),
    *refused(
        "plot_attention", "key_tokens", TypeError, "sequence of strings", "int 3", key_tokens=3
    ),
    *refused(
        "plot_attention", "key_tokens", ValueError, "3 strings", "got 2", key_tokens=["a", "b"]
    ),
    *refused("plot_attention", "titles", TypeError, "sequence of strings", "str 'ab'", titles="ab"),
    *refused("plot_attention", "titles", ValueError, "2 strings", "got 1", titles=["a"]),
    *refused(
        "plot_attention",
        "titles",
        ValueError,
        "1 strings",
        "got 2",
        titles=["a", "b"],
        weights=zeros(2, 3),
    ),
    *flags("plot_attention", "annotate"),
    *counts("plot_attention", "columns", 1),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_bad_argument_is_named(case: Refused) -> None:
    function, arguments = GOOD[case.function]
    with pytest.raises(case.exception) as caught:
        function(**{**arguments, **case.changes})
    message = str(caught.value)
    assert type(caught.value) is case.exception, message
    assert re.search(rf"\b{case.argument}\b", message), message
    for words in case.words:
        assert words in message


@pytest.mark.parametrize("name", GOOD)
def test_the_good_call_passes(name: str) -> None:
    function, arguments = GOOD[name]
    assert function(**arguments) is not None


@pytest.mark.parametrize("name", GOOD)
def test_each_argument_has_a_case(name: str) -> None:
    parameters = set(inspect.signature(GOOD[name][0]).parameters)
    tried = {case.argument for case in CASES if case.function == name}
    assert parameters - tried == set()


def test_each_public_function_has_cases() -> None:
    public = {name for name in mha_lib.__all__ if callable(getattr(mha_lib, name))}
    assert public - GOOD.keys() == {"AttentionOutput"}


def test_fuse_of_a_pruned_module_is_refused() -> None:
    with pytest.raises(ValueError, match=r"embed_dim=12, got 2 heads of head_dim=4"):
        pruned().fuse()


def test_the_message_of_the_first_page() -> None:
    query, key = zeros(2, 8, 5, 6), zeros(2, 8, 7, 6)
    with pytest.raises(ValueError, match="mask") as caught:
        reference_attention(query, key, key, mask=torch.ones(2, 7, dtype=torch.bool))
    assert str(caught.value) == (
        "mask must broadcast to (batch=2, heads=8, query=5, key=7), got (2, 7); "
        "for a padding mask write mask[:, None, None, :]"
    )
