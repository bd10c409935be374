"""Every backend of ``attention`` against the reference on explicit masks, against PyTorch, and at its edges."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from mha_lib import AttentionOutput, attention, causal_mask, reference_attention
from mha_lib.attention import choose_backend
from mha_lib.local import local_attention
from mha_lib.masks import combine_masks
from tests import tolerances
from tests.support import BACKWARD, DRAWS, FORWARD, Draw, assert_near, by_dtype
from tests.test_onnx import failures
from tests.tolerances import (
    DIRECTION,
    DROPOUT_STANDARD_ERRORS,
    EXACT,
    HAND_WRITTEN,
    STEP,
)

ROUNDED_INSIDE = by_dtype(tolerances.ROUNDED_INSIDE)
TRITON = tolerances.TRITON["float32"]

B, H, I, J, D = 2, 4, 5, 7, 8  # noqa: E741
BACKENDS = ["auto", "reference", "tiled", "sdpa", "triton"]
ON_CPU = BACKENDS[:-1]
PLACES = [("cpu", backend) for backend in ON_CPU]
PLACES += [("cuda", backend) for backend in BACKENDS] * torch.cuda.is_available()
REFUSED = {
    "sdpa": {"return_weights", "softcap", "sinks"},
    "tiled": {"return_weights"},
    "triton": {"return_weights", "softcap", "sinks", "bias", "mask", "dropout_p"},
}
Shape = tuple[int, ...]
Attend = Callable[..., Any]
Build = Callable[[Draw], "Problem"]


def identity(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Problem:
    """The arguments of one call. ``arrange`` makes query, key and value from leaves that lie otherwise in memory."""

    inputs: tuple[Tensor, Tensor, Tensor]
    options: Mapping[str, Any] = field(default_factory=dict)
    arrange: Callable[[Tensor], Tensor] = identity

    @property
    def leaves(self) -> list[Tensor]:
        """Everything that gets a gradient."""
        tensors = [*self.inputs, self.options.get("bias"), self.options.get("sinks")]
        return [x for x in tensors if x is not None and x.requires_grad]

    def call(self, attend: Attend, **more: Any) -> Any:
        """Call a function with the signature of ``attention``."""
        return attend(*map(self.arrange, self.inputs), **self.options, **more)

    def to(self, target: torch.dtype | str) -> Problem:
        """The same numbers in another dtype or on another device; masks and offsets keep their dtype."""

        def moved(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            if isinstance(target, torch.dtype) and not x.is_floating_point():
                return x
            return x.detach().to(target).requires_grad_(x.requires_grad)

        query, key, value = map(moved, self.inputs)
        options = {name: moved(option) for name, option in self.options.items()}
        return replace(self, inputs=(query, key, value), options=options)


def problem(
    draw: Draw,
    *,
    batch: int = B,
    heads: int = H,
    kv_heads: int = 2,
    queries: int = I,
    keys: int = J,
    width: int = D,
    value_dim: int = 3,
    mask_shape: Shape | None = None,
    bias_shape: Shape | None = None,
    forbidding: bool = False,
    with_sinks: bool = False,
    **options: Any,
) -> Problem:
    """Random numbers of these sizes. A third of what a mask covers is hidden, and all of query 2; ``forbidding`` does
    the same with a bias. All other options are passed on.
    """
    sizes = [(heads, queries, width), (kv_heads, keys, width), (kv_heads, keys, value_dim)]
    query, key, value = (draw.normal(batch, *size, grad=True) for size in sizes)
    if mask_shape is not None:
        options["mask"] = some(draw, mask_shape)
    if bias_shape is not None:
        bias = draw.normal(*bias_shape)
        bias = bias.masked_fill(~some(draw, bias_shape), -math.inf) if forbidding else bias
        options["bias"] = bias.requires_grad_()
    if with_sinks:
        options["sinks"] = draw.normal(heads, grad=True)
    return Problem((query, key, value), options)


def some(draw: Draw, shape: Shape) -> Tensor:
    """A random mask that hides query 2 from everything."""
    mask = draw.normal(*shape) > -0.4
    if len(shape) > 1:
        mask[..., 2:3, :] = False
    return mask


def visible(query: Tensor, key: Tensor, causal: bool, window: int | None, offset: Any) -> Tensor:
    """Which keys causal and window let each query see, straight from the definition of both."""
    queries, keys = (torch.arange(x.shape[2], device=x.device) for x in (query, key))
    first = torch.as_tensor(0 if offset is None else offset, device=query.device)
    distance = first.reshape(-1, 1, 1, 1) + rearrange(queries, "i -> i 1") - keys
    seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    return seen if window is None else seen & (distance.abs() < window)


def explicit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    query_offset: int | Tensor | None = None,
    return_weights: bool = False,
    **options: Any,
) -> Tensor | AttentionOutput:
    """What ``attention`` means: the reference, with positions written out as a mask."""
    if causal or window is not None:
        mask = combine_masks(mask, visible(query, key, causal, window, query_offset))
    result = reference_attention(query, key, value, mask=mask, **options)
    return result if return_weights else result.output


def outcome(given: Problem, attend: Attend) -> dict[str, Tensor]:
    """Output, weights if they are asked for, and the gradient of every leaf."""
    result = given.call(attend)
    names = ["output", "weights"] if isinstance(result, AttentionOutput) else ["output"]
    results = dict(zip(names, [*result] if len(names) > 1 else [result], strict=True))
    draw = Draw(99)
    # Rounded so that every dtype holds the same numbers.
    upstream = [draw.normal(*x.shape).half().bfloat16().to(x) for x in results.values()]
    gradients = torch.autograd.grad(list(results.values()), given.leaves, upstream)
    return results | {f"gradient {n}": gradient for n, gradient in enumerate(gradients)}


def same_outcome(given: Problem, attend: Attend) -> None:
    wanted, got = outcome(given, explicit), outcome(given, attend)
    assert got.keys() == wanted.keys()
    for name, expected in wanted.items():
        assert got[name].shape == expected.shape, name
        assert_near(got[name], expected, EXACT)


def refuses(device: str, backend: str, options: Mapping[str, Any]) -> bool:
    """Whether the backend may refuse; then it must."""
    asked = {name for name, value in options.items() if value is not None and value is not False}
    return (device, backend) == ("cpu", "triton") or bool(REFUSED.get(backend, set()) & asked)


def check(given: Problem, device: str, backend: str) -> None:
    """Either the outcome is the reference's, or the refusal names the backend; nothing else."""
    attend = partial(attention, backend=backend)
    here = given.to(device)
    if refuses(device, backend, given.options):
        with pytest.raises(ValueError, match=backend):
            here.call(attend)
        return
    if backend != "triton":
        same_outcome(here, attend)
        return
    wanted, got = outcome(given, explicit), outcome(here.to(torch.float32), attend)
    for name, expected in wanted.items():
        assert_near(got[name].cpu(), expected, TRITON)


MASK_SHAPES: list[Shape] = [
    (), (1,), (J,), (I, 1), (1, J), (I, J), (H, 1, 1), (H, I, J), (1, 1, J),
    (B, 1, 1, J), (B, 1, I, 1), (B, 1, I, J), (1, H, 1, J), (B, H, 1, 1), (B, H, I, J), (1, 1, 1, 1),
]  # fmt: skip
SQUARE = {"queries": J}
OFFSETS: dict[str, Any] = {
    "0": 0,
    "2": 2,
    "-2": -2,
    "nothing to see": -I,
    "all to see": J,
    "far before": -1000,
    "far behind": 1000,
    "one a sample": torch.tensor([2, -2]),
    "int32": torch.tensor([-1, 30], dtype=torch.int32),
    "negative": torch.tensor([-30, -3]),
}
NOTHING: dict[str, dict[str, Any]] = {
    "queries": {"queries": 0, "mask_shape": (1, J)},
    "keys": {"keys": 0, "mask_shape": (I, 1)},
    "samples": {"batch": 0, "mask_shape": (I, J)},
    "queries and keys": {"queries": 0, "keys": 0},
}
SEVERAL_TILES: dict[str, Any] = {
    "batch": 1,
    "heads": 2,
    "kv_heads": 1,
    "queries": 300,
    "keys": 700,
    "width": 4,
}
POSITIONS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window 1": {"window": 1},
    "window 3": {"window": 3},
    "causal window 1": {"causal": True, "window": 1},
    "causal window 3": {"causal": True, "window": 3},
    "causal window 100": {"causal": True, "window": 100},
}
CLOSED = torch.tensor([-math.inf, 0.0, -math.inf, 1.0], requires_grad=True)
PLAIN: dict[str, dict[str, Any]] = {
    "nothing": {},
    "self-attention": {"queries": J, "kv_heads": H, "value_dim": D},
    "one key head": {"kv_heads": 1},
    "as many key heads": {"kv_heads": H},
    "five heads": {"heads": 15, "kv_heads": 3},
    "values of width 1": {"value_dim": 1},
    "wide values": {"value_dim": 2 * D},
    "heads of width 1": {"width": 1},
    "one query": {"queries": 1},
    "one key": {"keys": 1},
    "scale": {"scale": 0.3},
    "scale 0": {"scale": 0},
    "negative scale": {"scale": -2.0},
    "softcap": {"softcap": 0.5},
    "softcap, mask": {"softcap": 0.5, "mask_shape": (B, H, I, J)},
    "softcap, forbidding bias": {"softcap": 2.0, "bias_shape": (H, I, J), "forbidding": True},
    "softcap, causal": {"softcap": 0.5, "causal": True, "query_offset": 1},
    "sinks": {"with_sinks": True},
    "closed sinks": {"sinks": CLOSED, "mask_shape": (I, J)},
    "closed sinks, forbidding bias": {
        "sinks": CLOSED,
        "bias_shape": (H, I, J),
        "forbidding": True,
    },
    "closed sinks, no keys": {"sinks": CLOSED, "keys": 0},
    "closed sinks, nothing to see": {"sinks": CLOSED, "causal": True, "query_offset": -I},
    "large scores": {"scale": 3e3, "mask_shape": (I, J)},
    "large scores, sinks": {"scale": 3e3, "with_sinks": True},
    "weights": {"return_weights": True},
    "weights, causal": {"return_weights": True, "causal": True, "query_offset": 1},
    "everything dropped": {"dropout_p": 1.0},
    "single precision bias": {"bias": torch.linspace(-1, 1, J)},
    "offset without causal": {"query_offset": -3},
    "mask, bias": {"mask_shape": (B, 1, 1, J), "bias_shape": (H, I, J)},
    "mask, forbidding bias, sinks": {
        "mask_shape": (I, J),
        "bias_shape": (B, H, I, J),
        "forbidding": True,
        "with_sinks": True,
    },
    "softcap, bias, sinks, mask": {
        "softcap": 1.5,
        "bias_shape": (H, I, J),
        "with_sinks": True,
        "mask_shape": (B, 1, I, J),
    },
}


def table() -> dict[str, dict[str, Any]]:
    """Each option alone, and the pairs that meet inside the backends."""
    rows = dict(PLAIN)
    for shape in MASK_SHAPES:
        rows[f"mask {shape}"] = {"mask_shape": shape}
        rows[f"bias {shape}"] = {"bias_shape": shape}
        rows[f"forbidding bias {shape}"] = {"bias_shape": shape, "forbidding": True}
    for name, options in POSITIONS.items():
        rows[name] = {**options, **SQUARE}
        rows[f"{name}, 37 tokens"] = {**options, "queries": 37, "keys": 37}
        rows[f"{name}, mask"] = {**options, **SQUARE, "mask_shape": (J, J)}
        rows[f"{name}, bias"] = {**options, **SQUARE, "bias_shape": (H, J, J), "forbidding": True}
        rows[f"{name}, sinks"] = {**options, **SQUARE, "with_sinks": True}
        for offset_name, offset in OFFSETS.items():
            rows[f"{name}, offset {offset_name}"] = {**options, "query_offset": offset}
    for name, sizes in NOTHING.items():
        rows[f"no {name}"] = sizes
        rows[f"no {name}, causal"] = {**sizes, "causal": True, "query_offset": 1}
        rows[f"no {name}, window"] = {**sizes, "window": 3, "query_offset": -1}
        rows[f"no {name}, sinks"] = {**sizes, "with_sinks": True}
    rows["no samples, offset"] = {
        "batch": 0, "causal": True, "window": 2, "query_offset": torch.zeros(0, dtype=torch.long)
    }  # fmt: skip
    tiles: dict[str, dict[str, Any]] = {
        "": {},
        ", causal": {"causal": True, "query_offset": 350},
        ", window": {"window": 50, "query_offset": 7, "causal": True},
        ", both sides": {"window": 90, "query_offset": -20},
        ", everything": {
            "softcap": 2.0, "with_sinks": True, "bias_shape": (2, 300, 700), "forbidding": True,
            "mask_shape": (300, 700), "causal": True, "query_offset": 400,
        },
    }  # fmt: skip
    rows |= {
        f"several tiles{name}": {**SEVERAL_TILES, **options} for name, options in tiles.items()
    }
    return rows


TABLE = table()


@pytest.mark.parametrize(("device", "backend"), PLACES)
@pytest.mark.parametrize("row", TABLE)
def test_equals_the_reference_or_refuses(row: str, device: str, backend: str) -> None:
    check(problem(Draw(1), **TABLE[row]), device, backend)


def random_problem(draw: Draw) -> Problem:
    """Any combination of options, with any sizes."""
    pick = draw.sizes.choice
    batch, kv_heads, group = draw.size(1, 3), draw.size(1, 3), draw.size(1, 3)
    queries, keys = draw.size(1, 40), draw.size(1, 40)
    full = (batch, kv_heads * group, queries, keys)

    def shape() -> Shape:
        start = draw.size(0, 3)
        return tuple(pick([1, size]) for size in full[start:])

    options: dict[str, Any] = {
        "causal": pick([True, False]),
        "window": pick([None, draw.size(1, 45)]),
        "query_offset": pick([
            draw.size(-45, 45),
            torch.tensor([draw.size(-45, 45) for _ in range(batch)]),
        ]),
        "scale": pick([None, 0.7]),
        "softcap": pick([None, None, 2.0]),
        "mask_shape": pick([None, shape()]),
        "bias_shape": pick([None, shape()]),
        "forbidding": pick([True, False]),
        "with_sinks": pick([False, False, True]),
        "return_weights": pick([False, False, True]),
    }  # fmt: skip
    options |= {"batch": batch, "heads": kv_heads * group, "kv_heads": kv_heads}
    options |= {"queries": queries, "keys": keys}
    options |= {"width": draw.size(1, 9), "value_dim": draw.size(1, 9)}
    return problem(draw, **options)


@pytest.mark.parametrize(("device", "backend"), PLACES)
@pytest.mark.parametrize("seed", range(3 * DRAWS))
def test_random_combinations_equal_the_reference(seed: int, device: str, backend: str) -> None:
    check(random_problem(Draw(seed)), device, backend)


def locally(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    query_offset: int | Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Attention in blocks, with the reference in each."""

    def attend(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        return reference_attention(query, key, value, mask=mask, bias=bias, **options).output

    offset = 0 if query_offset is None else query_offset
    where: dict[str, Any] = {"window": window, "causal": causal, "query_offset": offset}
    return local_attention(attend, query, key, value, mask=mask, bias=bias, **where)


IN_BLOCKS = [row for row, options in TABLE.items() if options.get("window") and row[:3] != "no "]


@pytest.mark.parametrize("row", IN_BLOCKS)
def test_windows_in_blocks_equal_the_reference(row: str) -> None:
    same_outcome(problem(Draw(1), **TABLE[row]), locally)


@pytest.mark.parametrize("seed", range(5 * DRAWS))
def test_random_windows_in_blocks_equal_the_reference(seed: int) -> None:
    given = random_problem(Draw(seed))
    options = {**given.options, "window": given.options["window"] or 1 + seed}
    del options["return_weights"]
    same_outcome(replace(given, options=options), locally)


LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "tokens first": (
        lambda x: rearrange(x, "b h n d -> b n h d"),
        lambda x: rearrange(x, "b n h d -> b h n d"),
    ),
    "features before tokens": (lambda x: x.mT, lambda x: x.mT),
    "every other token": (
        lambda x: repeat(x, "b h n d -> b h (n two) d", two=2),
        lambda x: x[:, :, ::2],
    ),
    "every other feature": (
        lambda x: repeat(x, "b h n d -> b h n (d two)", two=2),
        lambda x: x[..., ::2],
    ),
    "a part of a row": (lambda x: F.pad(x, (3, 2)), lambda x: x[..., 3:-2]),
    "one sample for all": (lambda x: x[:1], lambda x: x.expand(B, -1, -1, -1)),
    "one token for all": (lambda x: x[:, :, :1], lambda x: x.expand(-1, -1, J, -1)),
}


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout: str, backend: str) -> None:
    store, arrange = LAYOUTS[layout]
    given = problem(Draw(2), queries=J, mask_shape=(B, 1, 1, J), bias_shape=(J, J), causal=True)
    stored = (store(x.detach()).contiguous().requires_grad_() for x in given.inputs)
    query, key, value = stored
    check(replace(given, inputs=(query, key, value), arrange=arrange), "cpu", backend)


@pytest.mark.parametrize("backend", ON_CPU)
def test_any_strides_of_mask_and_bias(backend: str) -> None:
    draw = Draw(3)
    mask = some(draw, (B, 1, I, 1)).expand(B, H, I, J)
    bias = draw.normal(J, H, B).requires_grad_()
    given = problem(draw, mask=mask, bias=rearrange(bias, "j h b -> b h 1 j"))

    def gradients(attend: Attend) -> tuple[Tensor, ...]:
        return torch.autograd.grad(given.call(attend).square().sum(), [*given.inputs, bias])

    got = gradients(partial(attention, backend=backend))
    for actual, expected in zip(got, gradients(explicit), strict=True):
        assert_near(actual, expected, EXACT)


@pytest.mark.parametrize("backend", ON_CPU)
def test_only_what_requires_it_gets_a_gradient(backend: str) -> None:
    given = problem(Draw(4), bias_shape=(H, I, J))
    for leaf in given.leaves:
        alone = [x.detach().requires_grad_(x is leaf) for x in given.leaves]
        query, key, value, bias = alone
        this = Problem((query, key, value), {"bias": bias})
        (wanted,) = (x for x in alone if x.requires_grad)
        got, expected = (
            torch.autograd.grad(this.call(attend).square().sum(), wanted)[0]
            for attend in (partial(attention, backend=backend), explicit)
        )
        assert_near(got, expected, EXACT)
    with torch.no_grad():
        assert not given.call(attention, backend=backend).requires_grad


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("row", ["nothing", "causal", "causal window 3", "mask, bias", "no keys"])
def test_runs_on_meta_tensors(row: str, backend: str) -> None:
    given = problem(Draw(4), **TABLE[row])
    there = given.to("meta").call(attention, backend=backend)
    assert there.is_meta
    assert there.shape == given.call(explicit).shape


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("options", [{"causal": True}, {"window": 3}], ids=str)
def test_lengths_that_differ_need_an_offset(options: dict[str, Any], backend: str) -> None:
    given = problem(Draw(5), **options)
    with pytest.raises(ValueError, match="query_offset"):
        given.call(attention, backend=backend)
    with pytest.raises(ValueError, match="query_offset"):
        given.call(choose_backend, backend=backend)


def test_triton_without_a_gpu_is_a_value_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where triton itself is missing. TRITON_INTERPRET=1 would let it run here; it has tests of its own."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for _ in range(2):
        for row in TABLE.values():
            given = problem(Draw(6), **row)
            for function in (attention, choose_backend):
                with pytest.raises(ValueError, match="triton"):
                    given.call(function, backend="triton")
        monkeypatch.setitem(sys.modules, "triton", None)
        monkeypatch.delitem(sys.modules, "mha_lib.triton_kernel", raising=False)


def test_an_unknown_backend_is_a_value_error() -> None:
    for function in (attention, choose_backend):
        with pytest.raises(ValueError, match=r"backend .*flash"):
            problem(Draw(6)).call(function, backend="flash")


# The choice


@contextmanager
def spied() -> Iterator[list[str]]:
    """Which of the functions that compute attention are called, in order."""
    called: list[str] = []
    module = sys.modules["mha_lib.attention"]

    def watch(backend: str, function: Attend) -> Attend:
        def watched(*args: Any, **options: Any) -> Any:
            called.append(backend)
            return function(*args, **options)

        return watched

    with pytest.MonkeyPatch.context() as patch:
        for name in ("reference", "tiled", "triton"):
            function = getattr(module, f"{name}_attention", None)
            if function is not None:
                patch.setattr(module, f"{name}_attention", watch(name, function))
        watched = watch("sdpa", F.scaled_dot_product_attention)
        patch.setattr(F, "scaled_dot_product_attention", watched)
        yield called


def refusal(function: Attend, given: Problem, backend: str) -> str | None:
    try:
        given.call(function, backend=backend)
    except ValueError as error:
        return str(error)
    return None


def nothing_in_sight(given: Problem) -> bool:
    """Whether every query is hidden from every key, so that no backend has anything to compute."""
    result = given.call(attention)
    output = result.output if isinstance(result, AttentionOutput) else result
    return not output.any()


@pytest.mark.parametrize("row", TABLE)
def test_the_chosen_backend_is_the_one_that_computes(row: str) -> None:
    given = problem(Draw(7), **TABLE[row])
    empty = any(size == 0 for x in given.inputs for size in x.shape)
    for backend in BACKENDS:
        reason = refusal(choose_backend, given, backend)
        assert (reason is not None) == refuses("cpu", backend, given.options)
        with spied() as called:
            assert refusal(attention, given, backend) == reason
        if reason is not None:
            assert not called
            continue
        choice = given.call(choose_backend, backend=backend)
        assert choice._fields == ("backend", "reason")
        possible = BACKENDS[1:] if backend == "auto" else [backend]
        hidden = "reference" if nothing_in_sight(given) else ""
        assert choice.backend in (["reference"] if empty else [*possible, hidden])
        assert set(called) <= {choice.backend}
        assert called or empty
        assert len(choice.reason.split()) > 2


@pytest.mark.parametrize("seed", range(10 * DRAWS))
def test_auto_never_refuses(seed: int) -> None:
    draw = Draw(seed)
    given = random_problem(draw)
    dtype = draw.sizes.choice(list(FORWARD))
    dropout = draw.sizes.choice([0.0, 0.5])
    result = given.to(dtype).call(attention, dropout_p=dropout)
    output = result.output if given.options["return_weights"] else result
    assert output.isfinite().all()
    assert output.dtype == dtype


@pytest.mark.parametrize("backend", ["auto", "reference", "tiled", "sdpa"])
@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_scales_that_turn_the_order_of_scores_round(backend: str, scale: float) -> None:
    query = Draw(61).normal(1, 2, 8, D)
    expected = reference_attention(query, query, query, mask=causal_mask(8, 8), scale=scale).output
    got = attention(query, query, query, causal=True, scale=scale, backend=backend)
    assert_near(got, expected, EXACT)


def test_no_queries_in_a_window_with_an_offset_for_each_sample() -> None:
    query, key = torch.zeros(2, 2, 0, 4), torch.zeros(2, 2, 150, 4)
    output = attention(query, key, key, causal=True, window=5, query_offset=torch.tensor([3, 4]))
    assert output.shape == (2, 2, 0, 4)


@pytest.mark.parametrize("queries", [1, 16])
def test_few_queries_are_not_cut_into_tiles(queries: int) -> None:
    query, key = torch.zeros(1, 8, queries, D), torch.zeros(1, 8, 4096, D)
    assert choose_backend(query, key, key, softcap=30.0).backend == "reference"


# Dropout


@pytest.mark.parametrize("backend", ON_CPU)
def test_dropout_drops_or_scales_each_weight(backend: str) -> None:
    torch.manual_seed(0)
    draw, copies, dropout_p = Draw(8), 4000, 0.25
    query, key = draw.normal(1, 2, 2, D), draw.normal(1, 1, 3, D)
    one_hot = torch.eye(3, dtype=torch.float64)[None, None]
    weights = reference_attention(query, key, one_hot).weights
    inputs = (tensor.expand(copies, -1, -1, -1) for tensor in (query, key, one_hot))
    output = attention(*inputs, dropout_p=dropout_p, backend=backend)
    kept = output != 0
    assert_near(output[kept], (weights / (1 - dropout_p)).expand_as(output)[kept], HAND_WRITTEN)
    error = DROPOUT_STANDARD_ERRORS * math.sqrt(dropout_p * (1 - dropout_p) / copies)
    assert (kept.double().mean(0) - (1 - dropout_p)).abs().max() < error
    spread = weights[0] * math.sqrt(dropout_p / (1 - dropout_p) / copies)
    assert ((output.mean(0) - weights[0]).abs() < DROPOUT_STANDARD_ERRORS * spread).all()


@pytest.mark.parametrize("backend", ON_CPU)
def test_weights_are_dropped_independently(backend: str) -> None:
    """No two rows or columns of the pattern resemble each other, in any sample and head; nor does a shifted pattern."""
    torch.manual_seed(0)
    batch, heads, queries, keys, dropout_p = 2, 2, 320, 640, 0.5
    query, key = torch.zeros(batch, heads, queries, 1), torch.zeros(batch, 1, keys, 1)
    one_hot = torch.eye(keys).expand(batch, 1, -1, -1)
    kept = attention(query, key, one_hot, dropout_p=dropout_p, backend=backend) != 0
    signal = 2 * kept.float() - 1
    for pattern in ("b h i j -> (b h i) j", "b h i j -> (b h j) i"):
        lines = rearrange(signal, pattern)
        resemblance = (lines @ lines.mT / math.sqrt(lines.shape[1])).fill_diagonal_(0)
        assert resemblance.abs().max() < DROPOUT_STANDARD_ERRORS
    spectrum = torch.fft.rfftn(signal).abs().square()
    shifted = torch.fft.irfftn(spectrum, s=signal.shape) / math.sqrt(signal.numel())
    shifted[0, 0, 0, 0] = 0
    assert shifted.abs().max() < DROPOUT_STANDARD_ERRORS


DROPPED: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True, "query_offset": 2},
    "window": {"causal": True, "window": 3, "query_offset": 2},
    "mask, bias": {"mask_shape": (I, J), "bias_shape": (H, I, J), "forbidding": True},
    "sinks, softcap": {"with_sinks": True, "softcap": 1.5},
    "several tiles": {**SEVERAL_TILES, "bias_shape": (2, 300, 700)},
    "window, several tiles": {**SEVERAL_TILES, "window": 90, "query_offset": -20},
}


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("row", DROPPED)
def test_backward_drops_what_forward_dropped(row: str, backend: str) -> None:
    draw = Draw(10)
    given = problem(draw, **DROPPED[row])
    if refuses("cpu", backend, given.options):
        return
    output = seeded(given, backend)
    upstream, directions = draw.normal(*output.shape), [draw.normal(*x.shape) for x in given.leaves]
    state = torch.get_rng_state()
    gradients = torch.autograd.grad(output, given.leaves, upstream)
    assert torch.equal(torch.get_rng_state(), state), "the backward pass moved the generator"

    def along(step: float) -> Tensor:
        moved = [x.detach() + step * way for x, way in zip(given.leaves, directions, strict=True)]
        query, key, value, *rest = moved
        names = [name for name in ("bias", "sinks") if given.options.get(name) is not None]
        options = {**given.options, **dict(zip(names, rest, strict=True))}
        return (seeded(Problem((query, key, value), options), backend) * upstream).sum()

    slope = sum((gradient * way).sum() for gradient, way in zip(gradients, directions, strict=True))
    assert isinstance(slope, Tensor)
    assert_near(slope, (along(STEP) - along(-STEP)) / (2 * STEP), DIRECTION)
    assert torch.equal(seeded(given, backend), output)
    assert not torch.equal(given.call(attention, dropout_p=0.3, backend=backend), output)


def seeded(given: Problem, backend: str) -> Tensor:
    """The output with dropout, always with the same weights dropped."""
    torch.manual_seed(11)
    output: Tensor = given.call(attention, dropout_p=0.3, backend=backend)
    return output


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_weights_come_before_dropout(backend: str) -> None:
    given = problem(Draw(12), causal=True, query_offset=1, return_weights=True)
    plain = given.call(attention, backend=backend)
    dropped = given.call(attention, backend=backend, dropout_p=0.5)
    assert_near(dropped.weights, plain.weights, EXACT)
    assert not torch.allclose(dropped.output, plain.output)


# Against PyTorch

TORCH_MASKS = ["nothing", "is_causal", "bool", "float"]


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("dtype", FORWARD, ids=str)
@pytest.mark.parametrize("masked", TORCH_MASKS)
@pytest.mark.parametrize("scale", [None, 0.3], ids=lambda scale: f"scale {scale}")
@pytest.mark.parametrize("kv_heads", [H, 2, 1], ids=lambda heads: f"kv {heads}")
@pytest.mark.parametrize("value_dim", [D, 3], ids=lambda width: f"v {width}")
def test_equals_torch_forward_and_backward(
    value_dim: int,
    kv_heads: int,
    scale: float | None,
    masked: str,
    dtype: torch.dtype,
    backend: str,
) -> None:
    draw = Draw(13)
    given = problem(draw, kv_heads=kv_heads, value_dim=value_dim, scale=scale).to(dtype)
    mask = draw.mask(B, 1, I, J)
    bias = draw.normal(B, H, I, J).to(dtype)
    ours: dict[str, dict[str, Any]] = {
        "nothing": {},
        "is_causal": {"causal": True, "query_offset": 0},
        "bool": {"mask": mask},
        "float": {"bias": bias},
    }
    theirs: dict[str, dict[str, Any]] = {
        "nothing": {},
        "is_causal": {"is_causal": True},
        "bool": {"attn_mask": mask},
        "float": {"attn_mask": bias.double()},
    }
    exact = given.to(torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        wanted = exact.call(
            partial(F.scaled_dot_product_attention, enable_gqa=True), **theirs[masked]
        )
    output = given.call(attention, backend=backend, **ours[masked])
    assert output.dtype == dtype
    upstream = draw.normal(*output.shape, dtype=dtype)
    gradients = torch.autograd.grad(output, given.leaves, upstream)
    exact_gradients = torch.autograd.grad(wanted, exact.leaves, upstream.double())
    inside = dtype in ROUNDED_INSIDE and backend in ("sdpa", "auto")
    assert_near(output, wanted, ROUNDED_INSIDE[dtype] if inside else FORWARD[dtype])
    for got, expected in zip(gradients, exact_gradients, strict=True):
        assert got.dtype == dtype
        assert_near(got, expected, BACKWARD[dtype])


HALF_ROWS = [
    "self-attention", "one key head", "scale", "softcap", "sinks", "weights", "mask (2, 1, 1, 7)",
    "forbidding bias (4, 5, 7)", "mask, bias", "softcap, bias, sinks, mask", "causal", "no keys",
    "causal window 3, 37 tokens", "window 3, offset one a sample", "causal, offset negative",
    "several tiles, causal", "several tiles, window",
]  # fmt: skip


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("dtype", ROUNDED_INSIDE, ids=str)
@pytest.mark.parametrize("row", HALF_ROWS)
def test_half_types_are_rounded_and_no_worse(row: str, dtype: torch.dtype, backend: str) -> None:
    given = problem(Draw(14), **TABLE[row]).to(dtype)
    if refuses("cpu", backend, given.options):
        return
    wanted = outcome(given.to(torch.float64), explicit)
    got = outcome(given, partial(attention, backend=backend))
    inside = backend in ("sdpa", "auto")
    forward = ROUNDED_INSIDE[dtype] if inside else FORWARD[dtype]
    for name, expected in wanted.items():
        assert got[name].dtype == dtype
        assert_near(got[name], expected, BACKWARD[dtype] if "gradient" in name else forward)


@pytest.mark.parametrize("backend", ON_CPU)
def test_autocast_changes_nothing(backend: str) -> None:
    given = problem(Draw(15), bias_shape=(H, I, J)).to(torch.float32)

    def under_autocast(*inputs: Tensor, **options: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return attention(*inputs, **options, backend=backend)

    wanted, got = outcome(given, explicit), outcome(given, under_autocast)
    for name, expected in wanted.items():
        assert got[name].dtype == torch.float32
        assert_near(got[name], expected, FORWARD[torch.float32])


# Derivatives

SMALL: dict[str, Any] = {
    "batch": 1,
    "heads": 2,
    "kv_heads": 1,
    "queries": 3,
    "keys": 4,
    "width": 2,
    "value_dim": 2,
}
DERIVED: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True, "query_offset": -1},
    "window": {"window": 2, "query_offset": 1},
    "mask, bias": {"mask_shape": (3, 4), "bias_shape": (2, 3, 4)},
    "bias of one number": {"bias_shape": (1, 1, 1)},
    "softcap": {"softcap": 1.5},
    "sinks": {"with_sinks": True},
    "softcap, sinks, bias, causal": {
        "softcap": 1.5, "with_sinks": True, "bias_shape": (3, 1), "causal": True, "query_offset": 0,
    },
}  # fmt: skip


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("row", DERIVED)
def test_gradients_are_the_numerical_ones(row: str, backend: str) -> None:
    given = problem(Draw(16), **SMALL, **DERIVED[row])
    if not refuses("cpu", backend, given.options):
        assert torch.autograd.gradcheck(as_function(given, backend), given.leaves)


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("row", DERIVED)
def test_second_derivatives_are_the_numerical_ones(row: str, backend: str) -> None:
    given = problem(Draw(17), **SMALL, **DERIVED[row])
    assert torch.autograd.gradgradcheck(as_function(given, backend), given.leaves, fast_mode=True)


def as_function(given: Problem, backend: str) -> Callable[..., Tensor]:
    """The output as a function of the leaves."""
    names = [name for name in ("bias", "sinks") if given.options.get(name) is not None]

    def function(query: Tensor, key: Tensor, value: Tensor, *rest: Tensor) -> Tensor:
        options = {**given.options, **dict(zip(names, rest, strict=True))}
        output: Tensor = attention(query, key, value, backend=backend, **options)
        return output

    return function


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # PyTorch's own kernel
@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": 3}], ids=str)
def test_vmap_and_grad_transform_it(options: dict[str, Any], backend: str) -> None:
    draw = Draw(18)
    stacked = [draw.normal(3, B, H, J, D, grad=True) for _ in range(3)]

    def loss(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output: Tensor = attention(query, key, value, backend=backend, **options)
        return output.square().sum()

    got = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(*stacked)
    for n in range(3):
        alone = [x[n].detach().requires_grad_() for x in stacked]
        result: Any = explicit(*alone, **options)
        wanted = torch.autograd.grad(result.square().sum(), alone)
        for gradients, expected in zip(got, wanted, strict=True):
            assert_near(gradients[n], expected, EXACT)


# Memory


class Memory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the largest storage that is made inside, and of all that live at the same time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = 0
        self.peak = 0
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                weak = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                self.live[storage._cdata] = weak, storage.nbytes()
                self.largest = max(self.largest, storage.nbytes())
        self.live = {
            name: (weak, size)
            for name, (weak, size) in self.live.items()
            if not weak.expired()  # type: ignore[no-untyped-call]
        }
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


def memory(length: int, attend: Attend, options: dict[str, Any]) -> Memory:
    """What forward and backward make for one head and this many queries and keys."""
    given = problem(
        Draw(19), batch=1, heads=1, kv_heads=1, queries=length, keys=length, value_dim=D, **options
    ).to(torch.float32)
    seen = Memory()
    with seen:
        output = given.call(attend)
        torch.autograd.grad(output, given.leaves, torch.ones_like(output))
    return seen


LINEAR: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "causal, offset": {"causal": True, "query_offset": -40},
    "window": {"causal": True, "window": 48},
    "window, offset": {"causal": True, "window": 48, "query_offset": 31},
    "both sides": {"window": 48},
    "both sides, offset": {"window": 48, "query_offset": -70},
    "offset a sample": {"causal": True, "window": 48, "query_offset": torch.tensor([-70])},
    "dropout": {"dropout_p": 0.1},
    "sinks, softcap": {"with_sinks": True, "softcap": 2.0},
}
SHORT, LONG = 700, 1400


@pytest.mark.parametrize("row", LINEAR)
def test_tiles_take_linear_memory(row: str) -> None:
    is_linear(partial(attention, backend="tiled"), LINEAR[row])


@pytest.mark.parametrize("row", [name for name, row in LINEAR.items() if "window" in row])
@pytest.mark.parametrize("backend", ON_CPU)
def test_windows_take_linear_memory(row: str, backend: str) -> None:
    is_linear(partial(attention, backend=backend), LINEAR[row])
    is_linear(locally, LINEAR[row])


def is_linear(attend: Attend, options: dict[str, Any]) -> None:
    """Nothing is as large as one byte for each pair of query and key, and twice the length takes twice the memory."""
    short, long = (memory(length, attend, options) for length in (SHORT, LONG))
    assert long.largest < LONG * LONG
    slack = 1.1  # both lengths are rounded up to whole blocks
    assert long.largest <= slack * short.largest * LONG / SHORT
    assert long.peak <= slack * short.peak * LONG / SHORT


def test_the_memory_of_the_reference_is_quadratic() -> None:
    """The measurement sees what the tiles avoid."""
    short, long = (
        memory(length, partial(attention, backend="reference"), {}) for length in (SHORT, LONG)
    )
    assert long.largest == 4 * LONG * LONG
    assert long.peak > 3.9 * short.peak


# Wrong implementations


def reordered(*steps: str) -> Attend:
    """Attention whose scores go through these steps in this order."""

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        softcap: float | None = None,
        scale: float | None = None,
        sinks: Tensor | None = None,
        causal: bool = False,
        window: int | None = None,
        query_offset: int | Tensor | None = None,
        return_weights: bool = False,
        dropout_p: float = 0.0,
    ) -> Any:
        seen = visible(query, key, causal, window, query_offset)
        seen = seen if mask is None else seen & mask
        group = query.shape[1] // key.shape[1]
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        scores = query @ repeat(key, "b k j d -> b (k g) d j", g=group) * scale
        for step in steps:
            if step == "softcap" and softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            elif step == "bias" and bias is not None:
                scores = scores + bias.to(scores)
            elif step == "mask":
                scores = scores.masked_fill(~seen, -math.inf)
        # Equal queries and keys of width one have no scores: these pass through the bias as they are.
        nothing = torch.zeros_like(query)
        return explicit(
            nothing,
            torch.zeros_like(key),
            value,
            bias=scores,
            sinks=sinks,
            return_weights=return_weights,
            dropout_p=dropout_p,
        )

    return attend


def changed(**changes: Callable[..., Any]) -> Attend:
    """Attention with other options: each is made from query, key, value and the options."""

    def attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
        given = dict(options)
        for name, change in changes.items():
            options[name] = change(query, key, value, given)
        return explicit(query, key, value, **options)

    return attend


def d_major(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
    """Heads are cut out of the features as ``(d h)``."""
    wrong = (
        rearrange(rearrange(x, "b h n d -> b n (h d)"), "b n (d h) -> b h n d", h=x.shape[1])
        for x in (query, key, value)
    )
    return explicit(*wrong, **options)


def heads_in_turn(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
    """Query head ``q`` reads key head ``q % k``."""
    group = query.shape[1] // key.shape[1]
    key, value = (repeat(x, "b k j d -> b (g k) j d", g=group) for x in (key, value))
    return explicit(query, key, value, **options)


def unguarded(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
    """The softmax of nothing is NaN."""
    output, weights = explicit(query, key, value, **{**options, "return_weights": True})
    empty = (weights == 0).all(-1, keepdim=True)
    result = AttentionOutput(*(x.masked_fill(empty, math.nan) for x in (output, weights)))
    return result if options.get("return_weights") else result.output


def finite_fill(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
    """What is forbidden gets a large negative number."""
    names = ("causal", "window", "query_offset")
    positions = {name: options.pop(name, None) for name in names}
    seen = visible(query, key, *positions.values())
    seen = seen if options.get("mask") is None else seen & options["mask"]
    bias = torch.zeros(()) if options.get("bias") is None else options["bias"].float()
    filled = bias.clamp(min=-1e9).where(seen, -1e9)
    return explicit(query, key, value, **{**options, "mask": None, "bias": filled})


def in_part(x: Tensor) -> Tensor:
    """The same numbers with half of their gradient."""
    return x / 2 + x.detach() / 2


def unguarded_gradient(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
    """Zeros are put where nothing is attended to, but only after a softmax that is NaN there."""
    result = explicit(query, key, value, **{**options, "return_weights": True})
    empty = (result[1] == 0).all(-1, keepdim=True)
    scores = query.sum(-1, keepdim=True) + torch.zeros(()).where(~empty, -math.inf)
    return result[0] + (scores.softmax(-1) - 1).masked_fill(empty, 0.0)


MUTANTS: dict[str, Attend] = {
    "heads split d-major": d_major,
    "bottom-right always": changed(query_offset=lambda q, k, v, given: k.shape[2] - q.shape[2]),
    "top-left despite a cache": changed(query_offset=lambda q, k, v, given: 0),
    "offset of the first sample": changed(
        query_offset=lambda q, k, v, given: (
            given["query_offset"][:1].expand(len(q))
            if isinstance(given.get("query_offset"), Tensor)
            else given.get("query_offset")
        )
    ),
    "grouped heads in turn": heads_in_turn,
    "scale from the value width": changed(
        scale=lambda q, k, v, given: given.get("scale") or v.shape[-1] ** -0.5
    ),
    "finite fill": finite_fill,
    "mask polarity": changed(
        mask=lambda q, k, v, given: None if given.get("mask") is None else ~given["mask"]
    ),
    "window one too wide": changed(
        window=lambda q, k, v, given: given["window"] + 1 if given.get("window") else None
    ),
    "window one too narrow": changed(
        window=lambda q, k, v, given: max(given["window"] - 1, 1) if given.get("window") else None
    ),
    "no guard for empty rows": unguarded,
    "softcap after the mask": reordered("bias", "mask", "softcap"),
    "softcap after the bias": reordered("bias", "softcap", "mask"),
    "softcap forgotten": reordered("bias", "mask"),
    "bias forgotten": reordered("softcap", "mask"),
    "sinks forgotten": changed(sinks=lambda q, k, v, given: None),
}
UNKNOWN_TO_ONNX = {"sinks forgotten"}
WRONG_GRADIENTS: dict[str, Attend] = {
    "query": lambda q, k, v, **options: explicit(in_part(q), k, v, **options),
    "key": lambda q, k, v, **options: explicit(q, in_part(k), v, **options),
    "value": lambda q, k, v, **options: explicit(q, k, in_part(v), **options),
    "bias": changed(bias=lambda q, k, v, given: in_part(given["bias"])),
    "sinks": changed(sinks=lambda q, k, v, given: in_part(given["sinks"])),
    "empty rows": unguarded_gradient,
}
INTACT: dict[str, Attend] = {
    "explicit": explicit,
    "reordered": reordered("softcap", "bias", "mask"),
}


@functools.cache
def answers() -> list[tuple[str, Problem, Any]]:
    """The rows of the table with what the reference says; the large ones take too long here."""
    rows = {name: row for name, row in TABLE.items() if not name.startswith("several tiles")}
    problems = {name: problem(Draw(20), **row) for name, row in rows.items()}
    return [(name, given, given.call(explicit)) for name, given in problems.items()]


def disagreements(attend: Attend) -> list[str]:
    """The rows of the table on which an implementation is wrong."""
    wrong = []
    for name, given, wanted in answers():
        got = given.call(attend)
        pairs = (
            zip(got, wanted, strict=True) if isinstance(got, AttentionOutput) else [(got, wanted)]
        )
        if not all(torch.allclose(x, y, rtol=EXACT.rtol, atol=EXACT.atol) for x, y in pairs):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("name", MUTANTS)
def test_wrong_implementations_are_noticed(name: str) -> None:
    assert bool(failures(MUTANTS[name])) == (name not in UNKNOWN_TO_ONNX)
    assert disagreements(MUTANTS[name])


@pytest.mark.parametrize("name", INTACT)
def test_right_implementations_are_not(name: str) -> None:
    assert failures(INTACT[name]) == []
    assert disagreements(INTACT[name]) == []


@pytest.mark.parametrize("name", WRONG_GRADIENTS)
def test_wrong_gradients_are_noticed(name: str) -> None:
    given = problem(Draw(21), **TABLE["mask, forbidding bias, sinks"])
    given.options["mask"][2] = False
    wanted, got = outcome(given, explicit), outcome(given, WRONG_GRADIENTS[name])
    near = {
        key: torch.allclose(got[key], expected, rtol=EXACT.rtol, atol=EXACT.atol)
        for key, expected in wanted.items()
    }
    assert near.pop("output")
    assert not all(near.values())
