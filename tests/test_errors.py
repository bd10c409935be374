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
    KVCache,
    MultiHeadAttention,
    RotaryEmbedding,
    SimpleMultiHeadAttention,
    SplitMultiHeadAttention,
    alibi_bias,
    attention,
    causal_mask,
    choose_backend,
    diagnose,
    document_mask,
    explore_attention,
    explore_split,
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


def cache_of(length: int, **options: Any) -> KVCache:
    """A cache for the module below, with room for ten tokens, of which ``length`` are there."""
    sizes = {"batch_size": B, "num_kv_heads": 3, "head_dim": 4, "max_length": 10}
    cache = KVCache(**{**sizes, **options})
    cache.length = length
    return cache


def appended(key: Any, value: Any) -> KVCache:
    """``append`` on a cache of its own."""
    cache = cache_of(6)
    cache.append(key, value)
    return cache


def truncated(length: Any) -> KVCache:
    """``truncate`` on a cache of its own."""
    cache = cache_of(6)
    cache.truncate(length)
    return cache


@torch.no_grad()
def finished_forward(
    query: Any,
    key: Any = None,
    value: Any = None,
    *,
    mask: Any = None,
    bias: Any = None,
    cache: Any = None,
    return_weights: Any = False,
) -> object:
    """The forward pass of a module that is not trained now, so that it takes a cache."""
    module = MultiHeadAttention(E, 3, causal=True, window=9)
    return module(
        query, key, value, mask=mask, bias=bias, cache=cache, return_weights=return_weights
    )


def attention_arguments() -> dict[str, Any]:
    return {"query": zeros(B, H, I, D), "key": zeros(B, K, J, D), "value": zeros(B, K, J, 3)}


GOOD: dict[str, tuple[Callable[..., object], dict[str, Any]]] = {
    "reference_attention": (reference_attention, attention_arguments()),
    "attention": (attention, attention_arguments()),
    "choose_backend": (choose_backend, attention_arguments()),
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
    "MultiHeadAttention": (MultiHeadAttention, {"embed_dim": E, "num_heads": 3}),
    "MultiHeadAttention.forward": (finished_forward, module_arguments()),
    "KVCache": (
        KVCache,
        {"batch_size": B, "num_kv_heads": 3, "head_dim": 4, "max_length": 10},
    ),
    "KVCache.append": (appended, {"key": zeros(B, 3, 2, 4), "value": zeros(B, 3, 2, 4)}),
    "KVCache.truncate": (truncated, {"length": 3}),
    "RotaryEmbedding": (RotaryEmbedding, {"dim": 6}),
    "RotaryEmbedding.forward": (
        RotaryEmbedding(6).forward,
        {"x": zeros(B, 3, I, 8), "offset": torch.tensor([0, 4])},
    ),
    "diagnose": (
        diagnose,
        {"candidate": SimpleMultiHeadAttention(E, 3), "embed_dim": E, "num_heads": 3},
    ),
    "plot_attention": (
        plot_attention,
        {"weights": zeros(2, 2, 3), "query_tokens": ["a", "b"], "key_tokens": ["c", "d", "e"]},
    ),
    "explore_attention": (
        explore_attention,
        {"weights": zeros(4, 2, 2, 3), "tokens": ["a", "b"], "key_tokens": ["c", "d", "e"]},
    ),
    "explore_split": (explore_split, {"tokens": ["a", "b"], "num_heads": 2, "head_dim": 3}),
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


def counts(functions: str, argument: str, minimum: int, *, optional: bool = False) -> list[Refused]:
    """What every argument that counts something refuses."""
    wrong: Wrong = [
        (1.5, "float 1.5"),
        ("3", "str '3'"),
        (True, "bool True"),
        (torch.tensor(3), "Tensor"),
    ]
    wrong += [] if optional else [(None, "NoneType")]
    low: Wrong = [(minimum - 1, f"got {minimum - 1}"), (-5, "got -5")]
    return [
        *each(functions, argument, TypeError, "int", wrong),
        *each(functions, argument, ValueError, f"at least {minimum}", low),
    ]


def flags(functions: str, argument: str, *, optional: bool = False) -> list[Refused]:
    """What every argument that is on or off refuses."""
    wrong: Wrong = [(1, "int 1"), ("no", "str 'no'")]
    wrong += [] if optional else [(None, "NoneType")]
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


def dtypes(function: str) -> list[Refused]:
    """What every ``dtype`` refuses."""
    wrong: Wrong = [
        (long, "torch.int64"),
        (torch.float8_e4m3fn, "float8_e4m3fn"),
        ("float32", "str 'float32'"),
        (float, "type"),
    ]
    return each(function, "dtype", TypeError, "floating", wrong)


def dropouts(function: str, argument: str) -> list[Refused]:
    """What every probability refuses."""
    wrong: Wrong = [(-0.1, "got -0.1"), (1.1, "got 1.1")]
    return [
        *numbers(function, argument),
        *refused(function, argument, TypeError, "a number", "NoneType", **{argument: None}),
        *each(function, argument, ValueError, "between 0 and 1", wrong),
    ]


def softcaps(function: str) -> list[Refused]:
    """What every ``softcap`` refuses."""
    wrong: Wrong = [(0, "got 0"), (-1.5, "got -1.5")]
    return [
        *numbers(function, "softcap"),
        *each(function, "softcap", ValueError, "positive", wrong),
    ]


def backends(function: str) -> list[Refused]:
    """What every ``backend`` refuses."""
    wrong: Wrong = [("flash", "got str 'flash'"), ("SDPA", "'SDPA'"), (None, "NoneType"), (1, "1")]
    words = "one of 'auto', 'reference', 'tiled', 'sdpa', 'triton'"
    return each(function, "backend", ValueError, words, wrong)


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


def in_cache(argument: str, words: str, value: torch.Tensor) -> list[Refused]:
    """Tokens that do not fit into a cache."""
    return refused("KVCache.append", argument, ValueError, words, **{argument: value})


FINISHED = "attention choose_backend"
ATTENTION = f"reference_attention {FINISHED}"
MODULES = "SimpleMultiHeadAttention SplitMultiHeadAttention"
FORWARDS = " ".join(name for name in GOOD if "Attention" in name and name.endswith(".forward"))
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
    *softcaps(ATTENTION),
    *tensors(ATTENTION, "sinks"),
    *refused(ATTENTION, "sinks", ValueError, "(heads,), got (1, 8)", sinks=zeros(1, H)),
    *refused(ATTENTION, "sinks", ValueError, "8 query heads", "(4,)", sinks=zeros(K)),
    *refused(ATTENTION, "sinks", TypeError, "floating", "torch.int64", sinks=zeros(H, dtype=long)),
    *refused(
        ATTENTION, "sinks", ValueError, "device", "cpu", "meta", sinks=zeros(H, device="meta")
    ),
    *dropouts(ATTENTION, "dropout_p"),
    *flags(FINISHED, "causal"),
    *counts(FINISHED, "window", 1, optional=True),
    *flags(FINISHED, "return_weights"),
    *backends(FINISHED),
    *each(
        FINISHED,
        "query_offset",
        TypeError,
        "an int or an integer tensor of shape (batch,)",
        [(1.5, "float 1.5"), ("1", "str '1'"), ([1, 2], "list"), (True, "bool True")],
    ),
    *integers(FINISHED, "query_offset", B),
    *each(
        FINISHED,
        "query_offset",
        ValueError,
        "(batch,), got",
        [(zeros(1, 2, dtype=long), "(1, 2)"), (torch.tensor(3), "()")],
    ),
    *refused(
        FINISHED,
        "query_offset",
        ValueError,
        "batch of query, 2",
        "got 3",
        query_offset=zeros(3, dtype=long),
    ),
    *refused(
        FINISHED,
        "query_offset",
        ValueError,
        "device",
        "cpu",
        "meta",
        query_offset=zeros(B, dtype=long, device="meta"),
    ),
    *refused(
        FINISHED, "query_offset", ValueError, "lengths differ", "5 and 7", "=2 if", causal=True
    ),
    *refused(FINISHED, "query_offset", ValueError, "lengths differ", "5 and 7", "=2 if", window=3),
    *refused(FINISHED, "backend", ValueError, "'sdpa'", "softcap", softcap=1.0, backend="sdpa"),
    *refused(FINISHED, "backend", ValueError, "'sdpa'", "sinks", sinks=zeros(H), backend="sdpa"),
    *refused(
        FINISHED, "backend", ValueError, "'tiled'", "weights", return_weights=True, backend="tiled"
    ),
    *refused(
        FINISHED, "backend", ValueError, "'triton'", "dropout", dropout_p=0.1, backend="triton"
    ),
    *counts(LENGTHS, "query_length", 0),
    *counts(LENGTHS, "key_length", 0),
    *counts("sliding_window_mask", "window", 1),
    *flags("sliding_window_mask", "causal"),
    *counts("alibi_bias", "num_heads", 1),
    *dtypes("alibi_bias"),
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
    *refused(FORWARDS, "key", ValueError, "dim=12", "(2, 7, 3)", key=zeros(B, J, 3)),
    *refused(FORWARDS, "value", ValueError, "dim=12", "(2, 7, 1)", value=zeros(B, J, 1)),
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
    *each(
        "MultiHeadAttention.forward",
        "cache",
        TypeError,
        "KVCache",
        [
            ([], "list"),
            ({}, "dict"),
            ((zeros(1), zeros(1)), "tuple"),
            (True, "bool"),
            (KVCache, "type"),
        ],
    ),
    *(
        case
        for words, cache in (
            ("batch of the cache, 3, got 2", cache_of(0, batch_size=3)),
            ("heads of the cache, 1, got 3", cache_of(0, num_kv_heads=1)),
            ("head_dim of the cache, 5, got 4", cache_of(0, head_dim=5)),
            (
                "dtype of the cache, torch.float64, got torch.float32",
                cache_of(0, dtype=torch.double),
            ),
            ("device of the cache, meta, got cpu", cache_of(0, device="meta")),
            ("fit into the cache, max_length=10, got 7 tokens after 4", cache_of(4)),
        )
        for case in refused("MultiHeadAttention.forward", "cache", ValueError, words, cache=cache)
    ),
    *counts("MultiHeadAttention", "embed_dim", 1),
    *counts("MultiHeadAttention", "num_heads", 1),
    *refused(
        "MultiHeadAttention",
        "num_heads",
        ValueError,
        "head_dim",
        "embed_dim=12 and num_heads=5",
        num_heads=5,
    ),
    *counts("MultiHeadAttention", "num_kv_heads", 1, optional=True),
    *refused(
        "MultiHeadAttention", "num_kv_heads", ValueError, "num_heads=3", "got 2", num_kv_heads=2
    ),
    *refused(
        "MultiHeadAttention", "num_kv_heads", ValueError, "num_heads=3", "got 6", num_kv_heads=6
    ),
    *(
        case
        for name in ("head_dim", "kdim", "vdim", "window")
        for case in counts("MultiHeadAttention", name, 1, optional=True)
    ),
    *flags("MultiHeadAttention", "bias"),
    *flags("MultiHeadAttention", "out_bias", optional=True),
    *flags("MultiHeadAttention", "causal"),
    *flags("MultiHeadAttention", "sinks"),
    *dropouts("MultiHeadAttention", "dropout"),
    *numbers("MultiHeadAttention", "scale"),
    *softcaps("MultiHeadAttention"),
    *backends("MultiHeadAttention"),
    *dtypes("MultiHeadAttention"),
    *each(
        "MultiHeadAttention",
        "rotary",
        TypeError,
        "RotaryEmbedding(head_dim)",
        [
            (True, "bool True"),
            (4, "int 4"),
            (zeros(2), "Tensor"),
            (RotaryEmbedding, "RotaryEmbedding"),
        ],
    ),
    *refused(
        "MultiHeadAttention", "rotary", ValueError, "head_dim=4", "dim=6", rotary=RotaryEmbedding(6)
    ),
    *each(
        "MultiHeadAttention",
        "qk_norm",
        TypeError,
        "torch.nn.RMSNorm",
        [(True, "bool True"), ("rms", "str 'rms'"), (nn.RMSNorm(4), "RMSNorm")],
    ),
    *refused(
        "MultiHeadAttention KVCache",
        "device",
        ValueError,
        "name a device",
        "'nonsense'",
        device="nonsense",
    ),
    *each("MultiHeadAttention KVCache", "device", TypeError, "torch.device", [(3.5, "float 3.5")]),
    *counts("KVCache", "batch_size", 1),
    *counts("KVCache", "num_kv_heads", 1),
    *counts("KVCache", "head_dim", 1),
    *counts("KVCache", "max_length", 0),
    *dtypes("KVCache"),
    *(
        case
        for name in ("key", "value")
        for case in [
            *tensors("KVCache.append", name),
            *in_cache(name, "(batch, heads, sequence, head_dim), got (3, 2, 4)", zeros(3, 2, 4)),
            *in_cache(name, f"{name}[None]", zeros(3, 2, 4)),
            *in_cache(name, "batch of the cache, 2, got 1", zeros(1, 3, 2, 4)),
            *in_cache(name, "heads of the cache, 3, got 6", zeros(B, 6, 2, 4)),
            *in_cache(name, "head_dim of the cache, 4, got 5", zeros(B, 3, 2, 5)),
            *in_cache(name, "dtype of the cache, torch.float32, got", zeros(B, 3, 2, 4).half()),
            *in_cache(name, "device of the cache, cpu, got meta", zeros(B, 3, 2, 4).to("meta")),
            *in_cache(name, "gradient", zeros(B, 3, 2, 4, requires_grad=True)),
        ]
    ),
    *in_cache("value", "length of key, 2, got 1", zeros(B, 3, 1, 4)),
    *refused(
        "KVCache.append",
        "key",
        ValueError,
        "max_length=10, got 5 tokens after 6",
        key=zeros(B, 3, 5, 4),
        value=zeros(B, 3, 5, 4),
    ),
    *counts("KVCache.truncate", "length", 0),
    *refused("KVCache.truncate", "length", ValueError, "at most", "6, got 7", length=7),
    *counts("RotaryEmbedding", "dim", 2),
    *refused("RotaryEmbedding", "dim", ValueError, "even", "got 5", dim=5),
    *numbers("RotaryEmbedding", "base"),
    *refused("RotaryEmbedding", "base", TypeError, "a number", "NoneType", base=None),
    *each("RotaryEmbedding", "base", ValueError, "positive", [(0, "got 0"), (-2.0, "got -2.0")]),
    *flags("RotaryEmbedding", "interleaved"),
    *tensors("RotaryEmbedding", "frequencies"),
    *each(
        "RotaryEmbedding",
        "frequencies",
        TypeError,
        "floating",
        [(zeros(3, dtype=dtype), str(dtype)) for dtype in (long, torch.bool, torch.complex64)],
    ),
    *each(
        "RotaryEmbedding",
        "frequencies",
        ValueError,
        "dim/2",
        [(zeros(1, 3), "(1, 3)"), (zeros(6), "(6,)"), (zeros(0), "(0,)")],
    ),
    *each(
        "RotaryEmbedding",
        "frequencies",
        ValueError,
        "finite",
        [
            (torch.tensor([1.0, math.nan, 1.0]), "nan"),
            (torch.tensor([1.0, 1.0, -math.inf]), "-inf"),
            (zeros(3, device="meta"), "meta"),
        ],
    ),
    *tensors("RotaryEmbedding.forward", "x"),
    *each(
        "RotaryEmbedding.forward",
        "x",
        ValueError,
        "(batch, heads, sequence, head_dim), got",
        [(zeros(3, I, 8), "(3, 5, 8); for a single sample write x[None]"), (zeros(8), "(8,)")],
    ),
    *each(
        "RotaryEmbedding.forward",
        "x",
        TypeError,
        "floating",
        [
            (zeros(B, 3, I, 8, dtype=dtype), str(dtype))
            for dtype in (long, torch.bool, torch.complex64)
        ],
    ),
    *refused(
        "RotaryEmbedding.forward",
        "x",
        ValueError,
        "head_dim of at least dim=6, got (2, 3, 5, 4)",
        x=zeros(B, 3, I, 4),
    ),
    *each(
        "RotaryEmbedding.forward",
        "offset",
        TypeError,
        "an int or an integer tensor of shape (batch,)",
        [(1.5, "float 1.5"), ("1", "str '1'"), ([1, 2], "list"), (True, "bool"), (None, "None")],
    ),
    *integers("RotaryEmbedding.forward", "offset", B),
    *each(
        "RotaryEmbedding.forward",
        "offset",
        ValueError,
        "(batch,), got",
        [(zeros(1, 2, dtype=long), "(1, 2)"), (torch.tensor(3), "()")],
    ),
    *refused(
        "RotaryEmbedding.forward",
        "offset",
        ValueError,
        "batch of x, 2",
        "got 3",
        offset=zeros(3, dtype=long),
    ),
    *refused(
        "RotaryEmbedding.forward",
        "offset",
        ValueError,
        "device of x",
        "meta",
        offset=zeros(B, dtype=long, device="meta"),
    ),
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
    *refused(
        "explore_attention", "weights", TypeError, "tensor", "ndarray", weights=np.zeros((2, 3))
    ),
    *refused(
        "explore_attention",
        "weights",
        TypeError,
        "floating",
        "torch.bool",
        weights=zeros(2, 3, dtype=torch.bool),
    ),
    *refused(
        "explore_attention",
        "weights",
        ValueError,
        "(layers, heads, query, key)",
        "got (3,)",
        weights=zeros(3),
    ),
    *refused(
        "explore_attention",
        "weights",
        ValueError,
        "(layers, heads, query, key)",
        "got (1, 1, 1, 2, 3)",
        weights=zeros(1, 1, 1, 2, 3),
    ),
    *refused(
        "explore_attention", "weights", ValueError, "empty", "(0, 2, 3)", weights=zeros(0, 2, 3)
    ),
    *refused(
        "explore_attention",
        "weights",
        ValueError,
        "between 0 and 1",
        "1.5",
        weights=torch.full((2, 3), 1.5),
    ),
    *refused(
        "explore_attention",
        "weights",
        ValueError,
        "between 0 and 1",
        "nan",
        weights=torch.full((2, 3), torch.nan),
    ),
    *refused(
        "explore_attention",
        "weights",
        ValueError,
        "numbers",
        "meta",
        weights=zeros(2, 3, device="meta"),
    ),
    *refused(
        "explore_attention",
        "weights",
        ValueError,
        "one tensor (heads, query, key) a layer",
        "(1, 2, 2, 3)",
        "layer[0]",
        weights=[zeros(1, 2, 2, 3)],
    ),
    *refused(
        "explore_attention",
        "weights",
        ValueError,
        "all of one shape",
        "(2, 2, 3), (3, 2, 3)",
        weights=[zeros(2, 2, 3), zeros(3, 2, 3)],
    ),
    *refused("explore_attention", "weights", ValueError, "one tensor", "[]", weights=[]),
    *refused(
        "explore_attention",
        "weights",
        TypeError,
        "weights[1]",
        "tensor",
        "list",
        weights=[zeros(2, 2, 3), [1.0]],
    ),
    *refused(
        "explore_attention", "tokens", TypeError, "sequence of strings", "str 'ab'", tokens="ab"
    ),
    *refused("explore_attention", "tokens", ValueError, "2 strings", "got 1", tokens=["a"]),
    *refused(
        "explore_attention", "key_tokens", TypeError, "sequence of strings", "int 3", key_tokens=3
    ),
    *refused(
        "explore_attention", "key_tokens", ValueError, "3 strings", "got 2", key_tokens=["a", "b"]
    ),
    *refused("explore_attention", "caption", TypeError, "string", "int 3", caption=3),
    *refused("explore_attention", "layer", ValueError, "below 4", "got 4", layer=4),
    *counts("explore_attention", "layer", 0),
    *refused("explore_attention", "head", ValueError, "below 2", "got 2", head=2),
    *counts("explore_attention", "head", 0),
    *refused("explore_attention", "query", ValueError, "below 2", "got 2", query=2),
    *counts("explore_attention", "query", 0),
    *refused("explore_attention", "view", ValueError, "'lines', 'matrix'", "'tree'", view="tree"),
    *each(
        "explore_split",
        "tokens",
        TypeError,
        "an int or a sequence of strings",
        [(1.5, "float 1.5"), ("ab", "str 'ab'"), (True, "bool True"), (None, "NoneType")],
    ),
    *refused("explore_split", "tokens", TypeError, "strings", "int", tokens=["a", 3]),
    *refused("explore_split", "tokens", ValueError, "at least 1 string", "got 0", tokens=[]),
    *refused("explore_split", "tokens", ValueError, "at least 1", "got 0", tokens=0),
    *counts("explore_split", "num_heads", 1),
    *counts("explore_split", "head_dim", 1),
    *refused("explore_split", "head_dim", ValueError, "at most 256", "2 * 2 * 99", head_dim=99),
    *each(
        "diagnose",
        "candidate",
        TypeError,
        "a module or a function",
        [
            (None, "NoneType"),
            (3, "int 3"),
            ("x", "str 'x'"),
            (zeros(B, I, E), "Tensor"),
            (nn.MultiheadAttention, "the class MultiheadAttention"),
        ],
    ),
    *counts("diagnose", "embed_dim", 1),
    *counts("diagnose", "num_heads", 1),
    *counts("diagnose", "num_kv_heads", 1, optional=True),
    *refused("diagnose", "num_kv_heads", ValueError, "divide num_heads=3", "got 2", num_kv_heads=2),
    *flags("diagnose", "causal"),
    *flags("diagnose", "takes_mask"),
    *each(
        "diagnose",
        "weights",
        TypeError,
        "'auto', a dict of matrices or None",
        [(3, "int 3"), ([zeros(E, E)], "list"), (zeros(E, E), "Tensor"), (True, "bool True")],
    ),
    *each(
        "diagnose",
        "weights",
        ValueError,
        "'auto', a dict of matrices or None",
        [("Auto", "'Auto'"), ("none", "'none'"), ("", "''")],
    ),
    *each(
        "diagnose",
        "weights",
        ValueError,
        "the projections of one attention",
        [
            ({}, "query, key, value"),
            ({"q": zeros(E, E)}, "key, value"),
            (dict.fromkeys("qkv", zeros(E, 5)), "5 features"),
            (dict.fromkeys("qkv", zeros(10, E)), "10, 10, 10] rows do not make num_heads=3"),
        ],
    ),
    *counts("diagnose", "window", 1, optional=True),
    *numbers("diagnose", "scale"),
    *softcaps("diagnose"),
    *each(
        "diagnose",
        "rotary",
        TypeError,
        "RotaryEmbedding",
        [(3, "int 3"), ("yes", "str 'yes'"), (zeros(2), "Tensor")],
    ),
    *each("diagnose", "qk_norm", TypeError, "nn.RMSNorm", [(3, "int 3"), ("rms", "str 'rms'")]),
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
    assert public - GOOD.keys() == {"AttentionOutput", "BackendChoice"}


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


def test_the_widths_of_key_and_value_go_by_their_names() -> None:
    module = MultiHeadAttention(E, 3, kdim=10, vdim=11)
    query, key, value = zeros(B, I, E), zeros(B, J, 10), zeros(B, J, 11)
    with pytest.raises(ValueError, match=r"query must have .* embed_dim=12, got \(2, 5, 10\)"):
        module(zeros(B, I, 10), key, value)
    with pytest.raises(ValueError, match=r"key must have .* kdim=10, got \(2, 7, 11\)"):
        module(query, value, value)
    with pytest.raises(ValueError, match=r"value must have .* vdim=11, got \(2, 7, 10\)"):
        module(query, key)
    with pytest.raises(ValueError, match=r"key must have .* kdim=10, got \(2, 5, 12\)"):
        module(query)
