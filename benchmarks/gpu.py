"""What is measured on an NVIDIA GPU, in half precision, with random numbers and events on the device.

Lengths of 2k to 16k share 16k tokens between them, as is usual for attention kernels. Nothing here touches the clocks.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.measure import (
    MIB,
    Action,
    Case,
    Effort,
    Result,
    UnavailableError,
    exact,
    gpu_clock,
    inference,
    race,
    ratio,
    training,
)
from benchmarks.rivals import LADDER, Shape, compiled, eager_einsum, parameters
from mha_lib import KVCache, MultiHeadAttention, attention, choose_backend

EFFORT = Effort(budget=0.8, fewest=7, most=25, sample=0.01)
TOKENS = 16384
MODULE_SHAPES = tuple(Shape(TOKENS // n, n, 2048, 16) for n in (2048, 4096, 8192, 16384))
LADDER_SHAPE = Shape(4, 4096, 1024, 16)
KERNEL_LENGTHS, KERNEL_WIDTH = (4096, 8192, 16384), 2048
TRITON_FORWARD_GOALS = {64: ">= 0.75", 128: ">= 0.60"}
TRITON_BACKWARD_GOAL = ">= 0.35"
SDPA_KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
WINDOW = 256
DEVICE = "cuda"
DECODE_SHAPE = Shape(32, 8192, 1024, 8)


def cases() -> list[Case]:
    """All rows, in the order of the table."""
    return [
        *against_parts(),
        *against_einsum(),
        *triton_kernel(),
        *sdpa_kernels(),
        *windows(),
        *decoding(),
        *ladder(),
    ]


def half() -> torch.dtype:
    """bfloat16 where the GPU's tensor cores know it, else float16."""
    return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16


def draw(*shape: int) -> Tensor:
    """Random numbers on the GPU."""
    return torch.randn(shape, device=DEVICE, dtype=half(), requires_grad=True)


def heads(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as a projection leaves them: views of ``(b, n, h d)``."""

    def one() -> Tensor:
        features = draw(shape.b, shape.n, shape.e).detach()
        return rearrange(features, "b n (h d) -> b h n d", h=shape.h).requires_grad_()

    return one(), one(), one()


def module_for(shape: Shape) -> MultiHeadAttention:
    """The library's module."""
    return MultiHeadAttention(shape.e, shape.h, device=DEVICE, dtype=half())


def on_gpu(contestants: Mapping[str, Action], effort: Effort) -> dict[str, list[float]]:
    """Seconds of the GPU."""
    return race(contestants, effort, gpu_clock)


def step(
    function: Callable[[], Tensor | tuple[Tensor, ...]], leaves: Sequence[Tensor], trains: bool
) -> Action:
    """Forward without gradients, or forward and backward."""
    return training(function, leaves) if trains else inference(function)


def graphed(action: Action) -> Action:
    """An action as a CUDA graph: the GPU repeats what it recorded, the host only says go."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            action()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = action()

    def replay(graph: torch.cuda.CUDAGraph = graph, kept: object = kept) -> None:
        graph.replay()

    return replay


def sdpa_choice(query: Tensor, key: Tensor, value: Tensor, causal: bool = False) -> str:
    """Which of its kernels SDPA takes."""
    choice = torch._fused_sdp_choice(query, key, value, is_causal=causal)
    return f"SDPA takes {SDPBackend(choice).name.lower()}"


def operations(shape: Shape, *, causal: bool = False, products: int = 2) -> float:
    """Floating-point operations of attention: ``2 b n n e`` a product, of which forward has 2 and backward 5."""
    return 2.0 * products * shape.b * shape.n**2 * shape.e / (2 if causal else 1)


def against_parts() -> Iterator[Case]:
    """The module against its own matrix products and SDPA, timed separately."""
    for shape in MODULE_SHAPES:
        for trains, kind in ((False, "forward"), (True, "training")):
            for graph, how, goal in ((False, "eager", "<= 1.03"), (True, "graph", "<= 1.01")):

                def run(
                    effort: Effort, shape: Shape = shape, trains: bool = trains, graph: bool = graph
                ) -> Result:
                    times = module_and_parts(shape.fit(effort), trains, graph, effort)
                    return ratio(times, "module", "parts", sdpa_choice(*heads(shape.fit(effort))))

                work = "forward + backward" if trains else "forward"
                yield Case(
                    f"gpu-{kind}-n{shape.n}-{how}",
                    f"module, half precision, {work}, {'CUDA graph' if graph else 'eager'}",
                    "its projections, SDPA and last projection, timed separately and added",
                    str(shape),
                    goal,
                    run,
                )


def module_and_parts(
    shape: Shape, trains: bool, graph: bool, effort: Effort
) -> dict[str, list[float]]:
    """The seconds of the module, of its parts, and of the parts together."""
    module, x, y = (
        module_for(shape),
        draw(shape.b, shape.n, shape.e),
        draw(shape.b, shape.n, shape.e),
    )
    layers = module.q_proj, module.k_proj, module.v_proj
    qkv = heads(shape)
    contestants = {
        "module": step(lambda: module(x), parameters(module, x), trains),
        "projections": step(
            lambda: tuple(layer(x) for layer in layers), parameters(*layers, x), trains
        ),
        "attention": step(lambda: F.scaled_dot_product_attention(*qkv), qkv, trains),
        "output": step(lambda: module.out_proj(y), parameters(module.out_proj, y), trains),
    }
    if graph:
        contestants = {name: graphed(action) for name, action in contestants.items()}
    times = on_gpu(contestants, effort)
    parts = [times[name] for name in ("projections", "attention", "output")]
    return {**times, "parts": [sum(round_) for round_ in zip(*parts, strict=True)]}


def against_einsum() -> Iterator[Case]:
    """The attention function against two einsums and a softmax."""
    shape = LADDER_SHAPE
    for trains, kind in ((False, "forward"), (True, "training")):

        def run(effort: Effort, trains: bool = trains) -> Result:
            query, key, value = leaves = heads(shape.fit(effort))
            contestants = {
                "einsum": step(lambda: eager_einsum(query, key, value), leaves, trains),
                "attention": step(lambda: attention(query, key, value), leaves, trains),
            }
            choice = choose_backend(query, key, value)
            detail = f"auto takes {choice.backend}; {sdpa_choice(query, key, value)}"
            return ratio(on_gpu(contestants, effort), "einsum", "attention", detail)

        work = "forward + backward" if trains else "forward"
        yield Case(
            f"gpu-einsum-{kind}",
            f"eager einsum attention, half precision, {work}: how many times longer it takes",
            "attention, backend 'auto'",
            str(shape),
            ">= 4",
            run,
        )


def triton_kernel() -> Iterator[Case]:
    """The book's Triton kernel against SDPA as PyTorch chooses it."""
    for head_dim, forward_goal in TRITON_FORWARD_GOALS.items():
        for n in KERNEL_LENGTHS:
            shape = Shape(TOKENS // n, n, KERNEL_WIDTH, KERNEL_WIDTH // head_dim)
            for causal in (False, True):
                for backward in (False, True):
                    yield Case(
                        f"gpu-triton-{'backward' if backward else 'forward'}-d{head_dim}-n{n}"
                        + "-causal" * causal,
                        f"Triton kernel, half precision, {'causal, ' * causal}"
                        f"{'backward' if backward else 'forward'}: share of the speed",
                        "SDPA",
                        f"{shape} d={head_dim}",
                        TRITON_BACKWARD_GOAL if backward else forward_goal,
                        functools.partial(triton_against_sdpa, shape, causal, backward),
                    )


def triton_against_sdpa(shape: Shape, causal: bool, backward: bool, effort: Effort) -> Result:
    """The speed of the Triton kernel as a share of SDPA's."""
    shape = shape.fit(effort)
    query, key, value = leaves = heads(shape)
    calls = {
        "triton": lambda: attention(query, key, value, causal=causal, backend="triton"),
        "sdpa": lambda: F.scaled_dot_product_attention(query, key, value, is_causal=causal),
    }
    contestants = {
        name: backward_only(call, leaves) if backward else inference(call)
        for name, call in calls.items()
    }
    times = on_gpu(contestants, effort)
    result = ratio(times, "sdpa", "triton", sdpa_choice(query, key, value, causal))
    count = operations(shape, causal=causal, products=5 if backward else 2)
    return with_speeds(result, count)


def with_speeds(result: Result, count: float) -> Result:
    """Add TFLOP/s, from the median milliseconds."""
    speeds = {name: count / (value * 1e-3) / 1e12 for name, value in result.medians.items()}
    return dataclasses.replace(result, tflops=speeds)


def backward_only(call: Callable[[], Tensor], leaves: Sequence[Tensor]) -> Action:
    """The gradients of an output that is already there."""
    output = call()
    pull = torch.randn_like(output)
    return lambda: torch.autograd.grad(output, leaves, pull, retain_graph=True)


def sdpa_kernels() -> Iterator[Case]:
    """Each kernel of SDPA, forced, against the one that PyTorch chooses."""
    for n in (4096, 16384):
        shape = Shape(TOKENS // n, n, KERNEL_WIDTH, KERNEL_WIDTH // 128)
        for name in SDPA_KERNELS:
            if name == "math" and n > 4096:
                continue
            for causal in (False, True):
                yield Case(
                    f"gpu-sdpa-{name}-n{n}" + "-causal" * causal,
                    f"SDPA, half precision, {'causal, ' * causal}forward, kernel {name}",
                    "SDPA, its own choice",
                    f"{shape} d=128",
                    None,
                    functools.partial(forced_kernel, name, shape, causal),
                )


def forced_kernel(name: str, shape: Shape, causal: bool, effort: Effort) -> Result:
    """One kernel of SDPA against its default."""
    shape = shape.fit(effort)
    query, key, value = heads(shape)

    def default() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal)

    def forced() -> Tensor:
        with sdpa_kernel(SDPA_KERNELS[name]):
            return default()

    try:
        forced()
    except RuntimeError as error:
        raise UnavailableError(f"SDPA has no {name} kernel for these inputs here") from error
    times = on_gpu({name: inference(forced), "default": inference(default)}, effort)
    result = ratio(times, name, "default", sdpa_choice(query, key, value, causal))
    return with_speeds(result, operations(shape, causal=causal))


def windows() -> Iterator[Case]:
    """A sliding window against full causal attention."""
    shape = Shape(1, 16384, KERNEL_WIDTH, 16)
    for backend in ("auto", "triton"):
        for trains, kind in ((False, "forward"), (True, "training")):

            def run(effort: Effort, backend: str = backend, trains: bool = trains) -> Result:
                query, key, value = leaves = heads(shape.fit(effort))
                window = 4 if effort.quick else WINDOW

                def ours() -> Tensor:
                    return attention(query, key, value, causal=True, window=window, backend=backend)

                def full() -> Tensor:
                    return F.scaled_dot_product_attention(query, key, value, is_causal=True)

                contestants = {
                    "window": step(ours, leaves, trains),
                    "full": step(full, leaves, trains),
                }
                choice = choose_backend(
                    query, key, value, causal=True, window=window, backend=backend
                )
                detail = f"backend {choice.backend}"
                return ratio(on_gpu(contestants, effort), "window", "full", detail)

            work = "forward + backward" if trains else "forward"
            yield Case(
                f"gpu-window-{kind}-{backend}",
                f"attention, half precision, causal, window {WINDOW}, {work}, backend {backend!r}",
                "SDPA, is_causal",
                str(shape),
                None,
                run,
            )


def decoding() -> Iterator[Case]:
    """One token after many, against the time that reading keys and values takes."""
    for group in (1, 4):

        def run(effort: Effort, group: int = group) -> Result:
            b, n, e, h = DECODE_SHAPE.fit(effort)
            new = [torch.randn(b, h, 1, e // h, device=DEVICE, dtype=half()) for _ in range(2)]
            past = [torch.randn(b, h, n, e // h, device=DEVICE, dtype=half()) for _ in range(2)]
            query = torch.randn(b, h * group, 1, e // h, device=DEVICE, dtype=half())
            cache = KVCache(b, h, e // h, max_length=n + 128, device=DEVICE, dtype=half())
            cache.append(past[0], past[1])

            def decode() -> Tensor:
                cache.truncate(n)
                keys, values = cache.append(new[0], new[1])
                return attention(query, keys, values, causal=True, query_offset=n)

            contestants = {
                "decode": inference(decode),
                "graph": graphed(inference(decode)),
                "copy": inference(lambda: past[0].copy_(past[1])),
            }
            times = on_gpu(contestants, effort)
            moved = 2 * past[0].nbytes
            speeds = {name: moved / min(values) / 1e12 for name, values in times.items()}
            detail = ", ".join(f"{name} {speed:.3g} TB/s" for name, speed in speeds.items())
            return ratio(times, "graph", "copy", detail)

        heads_in_words = f"{group * DECODE_SHAPE.h} query heads, {DECODE_SHAPE.h} key heads"
        yield Case(
            f"gpu-decode-group{group}",
            f"KVCache and attention, half precision, one token after n, CUDA graph, {heads_in_words}",
            "copying as many bytes as keys and values have",
            str(DECODE_SHAPE),
            None,
            run,
        )


@functools.cache
def rungs(effort: Effort) -> dict[str, list[float]]:
    """All rungs of the ladder in one race, on the same weights."""
    shape = LADDER_SHAPE.fit(effort)
    module, x = module_for(shape), draw(shape.b, shape.n, shape.e)
    contestants: dict[str, Action] = {
        name: inference(functools.partial(function, module, x))
        for name, (function, _) in LADDER.items()
    }
    contestants["module"] = inference(functools.partial(module, x))
    (fast,) = compiled([module], effort)
    contestants["compiled"] = inference(functools.partial(fast, x))
    return on_gpu(contestants, effort)


def ladder() -> Iterator[Case]:
    """The same function in several ways, time and memory; for the book, without goals."""
    named = {name: text for name, (_, text) in LADDER.items() if name != "sdpa"}
    more = {"module": "the module, eager", "compiled": "the module, compiled"}
    for rung, text in {**named, **more}.items():
        yield Case(
            f"gpu-ladder-{rung}",
            f"{text}, half precision, forward",
            "SDPA, three projections",
            str(LADDER_SHAPE),
            None,
            functools.partial(rung_time, rung),
        )
    for rung, text in named.items():
        yield Case(
            f"gpu-ladder-memory-{rung}",
            f"peak memory, {text}, half precision, forward",
            "SDPA, three projections",
            str(LADDER_SHAPE),
            None,
            functools.partial(rung_memory, rung),
        )


def rung_time(rung: str, effort: Effort) -> Result:
    """The time of one rung against that of SDPA."""
    return ratio(rungs(effort), rung, "sdpa")


def rung_memory(rung: str, effort: Effort) -> Result:
    """The peak memory of one rung against that of SDPA, beyond what was there before."""
    shape = LADDER_SHAPE.fit(effort)
    module, x = module_for(shape), draw(shape.b, shape.n, shape.e)
    peaks = {}
    for name in (rung, "sdpa"):
        action = inference(functools.partial(LADDER[name][0], module, x))
        action()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        torch.cuda.synchronize()
        peaks[name] = (torch.cuda.max_memory_allocated() - before) / MIB
    return exact(peaks[rung] / peaks["sdpa"], "ratio", peaks, "MiB")
