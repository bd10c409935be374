"""What is measured on a CPU, with one thread: the rows of the table of goals, and what the book draws besides."""

from __future__ import annotations

import contextlib
import functools
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import (
    MIB,
    ROOT,
    Action,
    Case,
    Effort,
    Result,
    UnavailableError,
    cpu_clock,
    difference,
    exact,
    inference,
    peak_bytes,
    quartiles,
    race,
    ratio,
    training,
)
from benchmarks.rivals import (
    LADDER,
    PackedFloor,
    SeparateFloor,
    Shape,
    compiled,
    parameters,
    torch_peer,
    x_transformers_peer,
)
from mha_lib import KVCache, MultiHeadAttention, attention

SHAPES = (
    Shape(8, 128, 256, 8),
    Shape(4, 512, 512, 8),
    Shape(1, 1024, 768, 12),
    Shape(1, 4096, 512, 8),
)
BFLOAT16_SHAPES = (Shape(8, 128, 256, 8), Shape(4, 256, 512, 8))
DROPOUT_SHAPES = (Shape(8, 128, 256, 8), Shape(4, 512, 512, 8), Shape(1, 2048, 512, 8))
TILED_SHAPE = Shape(1, 4096, 512, 8)
TOKEN_SHAPE = Shape(1, 1, 256, 8)
DECODE_SHAPES = (Shape(1, 1024, 512, 8), Shape(8, 1024, 512, 8))
WINDOW_SHAPE, WINDOW = Shape(1, 8192, 512, 8), 256

FLOOR = "packed nn.Linear, views, SDPA, nn.Linear"
PEERS = {
    "peer-train": "nn.MultiheadAttention, train mode, no weights",
    "peer-eval": "nn.MultiheadAttention, eval mode (fast path)",
    "x-transformers": "x-transformers' Attention, flash",
}


def cases() -> list[Case]:
    """All rows, in the order of the table."""
    return [
        *against_floor_and_peers(),
        *short_bfloat16(),
        *with_dropout(),
        *windows(),
        *decoding(),
        *tiles(),
        *module_memory(),
        *one_token(),
        import_time(),
        *ladder(),
    ]


def module_for(shape: Shape, dropout: float = 0.0) -> MultiHeadAttention:
    """The library's module."""
    return MultiHeadAttention(shape.e, shape.h, dropout=dropout)


def tokens(shape: Shape, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inputs of a module."""
    return torch.randn(shape.b, shape.n, shape.e, dtype=dtype, requires_grad=True)


def heads(shape: Shape) -> list[Tensor]:
    """Query, key and value."""
    size = shape.b, shape.h, shape.n, shape.e // shape.h
    return [torch.randn(size, requires_grad=True) for _ in range(3)]


def on_cpu(contestants: Mapping[str, Action], effort: Effort) -> dict[str, list[float]]:
    """Seconds of this thread."""
    return race(contestants, effort, cpu_clock)


def actions(
    contestants: Mapping[str, Callable[[Tensor], Tensor]], x: Tensor, trains: bool
) -> dict[str, Action]:
    """Modules applied to the same input, without gradients or with all of them."""
    found: dict[str, Action] = {}
    for name, contestant in contestants.items():
        call = functools.partial(contestant, x)
        found[name] = training(call, parameters(contestant, x)) if trains else inference(call)
    return found


@functools.cache
def contest(shape: Shape, trains: bool, effort: Effort) -> dict[str, list[float]]:
    """The module, the floor and the peers, all in one race."""
    shape = shape.fit(effort)
    contestants: dict[str, nn.Module] = {
        "module": module_for(shape),
        "floor": PackedFloor(shape.e, shape.h),
        "peer-train": torch_peer(shape, training=True),
    }
    if not trains:
        contestants["peer-eval"] = torch_peer(shape, training=False)
    with contextlib.suppress(UnavailableError):
        contestants["x-transformers"] = x_transformers_peer(shape)
    return on_cpu(actions(contestants, tokens(shape), trains), effort)


def against_floor_and_peers() -> Iterator[Case]:
    """The module in float32 against the floor and against peers, forward and in training."""
    for shape in SHAPES:
        for trains, work in ((False, "forward"), (True, "forward + backward")):
            for other, against in {"floor": FLOOR, **PEERS}.items():
                if trains and other == "peer-eval":
                    continue
                goal = "<= 1.03" if other == "floor" else "<= 1.00"
                if other == "peer-eval" and shape.n >= 512:
                    goal = "<= 0.85"

                def run(
                    effort: Effort, s: Shape = shape, t: bool = trains, o: str = other
                ) -> Result:
                    times = contest(s, t, effort)
                    if o not in times:
                        raise UnavailableError(f"{o} is not installed")
                    return ratio(times, "module", o)

                name = f"{'training' if trains else 'forward'}-n{shape.n}-{other}"
                yield Case(name, f"module, f32, {work}", against, str(shape), goal, run)


def short_bfloat16() -> Iterator[Case]:
    """Training in bfloat16 at short lengths, where SDPA's gradient is slow on a CPU."""
    for shape in BFLOAT16_SHAPES:

        def run(effort: Effort, shape: Shape = shape) -> Result:
            shape = shape.fit(effort)
            modules = {
                "module": module_for(shape).bfloat16(),
                "floor": PackedFloor(shape.e, shape.h).bfloat16(),
            }
            x = tokens(shape, torch.bfloat16)
            return ratio(on_cpu(actions(modules, x, True), effort), "module", "floor")

        yield Case(
            f"bfloat16-training-n{shape.n}",
            "module, bf16, forward + backward",
            FLOOR,
            str(shape),
            "<= 0.40",
            run,
        )


def with_dropout() -> Iterator[Case]:
    """Training with dropout, for which SDPA takes its slowest kernel on a CPU: time and memory."""
    for shape in DROPOUT_SHAPES:
        common = "module, f32, dropout 0.1, forward + backward", f"{FLOOR}, with dropout"

        yield Case(
            f"dropout-training-n{shape.n}",
            *common,
            str(shape),
            "<= 0.5",
            functools.partial(dropout_time, shape),
        )
        yield Case(
            f"dropout-memory-n{shape.n}",
            f"peak memory, {common[0]}",
            common[1],
            str(shape),
            None,
            functools.partial(dropout_memory, shape),
        )


def dropping(shape: Shape, effort: Effort) -> dict[str, Action]:
    """The module and the floor, both with dropout."""
    shape = shape.fit(effort)
    modules = {
        "module": module_for(shape, dropout=0.1),
        "floor": PackedFloor(shape.e, shape.h, dropout=0.1),
    }
    return actions(modules, tokens(shape), True)


def dropout_time(shape: Shape, effort: Effort) -> Result:
    """Time with dropout."""
    return ratio(on_cpu(dropping(shape, effort), effort), "module", "floor")


def dropout_memory(shape: Shape, effort: Effort) -> Result:
    """Peak memory with dropout."""
    return memory_ratio(dropping(shape, effort))


def memory_ratio(contestants: Mapping[str, Action]) -> Result:
    """The peak memory of the first against that of the second."""
    peaks = {name: peak_bytes(action) / MIB for name, action in contestants.items()}
    ours, other = peaks.values()
    return exact(ours / other, "ratio", peaks, "MiB")


def windowed(effort: Effort, length: int, trains: bool, window: int | None) -> Action:
    """Causal attention, in a window or without one."""
    shape = WINDOW_SHAPE._replace(n=length)
    if effort.quick:
        shape, window = shape.fit(effort), None if window is None else 4
        shape = shape._replace(n=64 * length // WINDOW_SHAPE.n)
    query, key, value = leaves = heads(shape)
    if window is None:
        call = functools.partial(F.scaled_dot_product_attention, query, key, value, is_causal=True)
    else:
        call = functools.partial(attention, query, key, value, causal=True, window=window)
    return training(call, leaves) if trains else inference(call)


def windows() -> Iterator[Case]:
    """A sliding window against full causal attention, and against half the length."""
    long, half = WINDOW_SHAPE.n, WINDOW_SHAPE.n // 2
    for trains, kind in ((False, "forward"), (True, "training")):
        work = "forward + backward" if trains else "forward"

        def full(effort: Effort, trains: bool = trains) -> Result:
            contestants = {
                "window": windowed(effort, long, trains, WINDOW),
                "full": windowed(effort, long, trains, None),
            }
            return ratio(on_cpu(contestants, effort), "window", "full")

        def lengths(trains: bool, effort: Effort) -> dict[str, Action]:
            return {f"n={n}": windowed(effort, n, trains, WINDOW) for n in (long, half)}

        def growth(effort: Effort, trains: bool = trains) -> Result:
            return ratio(on_cpu(lengths(trains, effort), effort), f"n={long}", f"n={half}")

        def memory(effort: Effort, trains: bool = trains) -> Result:
            return memory_ratio(lengths(trains, effort))

        what = f"attention, f32, causal, window {WINDOW}, {work}"
        shapes, twice = str(WINDOW_SHAPE), f"the same at n={half}"
        yield Case(f"window-{kind}", what, "SDPA, is_causal", shapes, "<= 0.15", full)
        yield Case(f"window-{kind}-growth", what, twice, shapes, "<= 2.2", growth)
        yield Case(
            f"window-{kind}-memory-growth", f"peak memory, {what}", twice, shapes, "<= 2.2", memory
        )


class Decoder:
    """One token after ``shape.n`` others: keys and values are kept in three ways."""

    def __init__(self, shape: Shape) -> None:
        b, n, e, h = shape
        self.length = n
        self.token = [torch.randn(b, h, 1, e // h) for _ in range(3)]
        self.cache = KVCache(b, h, e // h, max_length=n + 128)
        self.past = torch.randn(b, h, n, e // h), torch.randn(b, h, n, e // h)
        self.cache.append(*self.past)
        self.buffers = self.cache.keys.clone(), self.cache.values.clone()

    def library(self) -> Tensor:
        """``KVCache`` and ``attention``."""
        query, key, value = self.token
        self.cache.truncate(self.length)
        keys, values = self.cache.append(key, value)
        return attention(query, keys, values, causal=True, query_offset=self.length)

    def concatenated(self) -> Tensor:
        """``torch.cat`` copies all that is there for every token."""
        query, *new = self.token
        keys, values = (torch.cat(pair, dim=2) for pair in zip(self.past, new, strict=True))
        return F.scaled_dot_product_attention(query, keys, values)

    def sliced(self) -> Tensor:
        """A buffer that is written and sliced."""
        query, *new = self.token
        end = self.length + 1
        for buffer, token in zip(self.buffers, new, strict=True):
            buffer[:, :, self.length : end] = token
        keys, values = (buffer[:, :, :end] for buffer in self.buffers)
        return F.scaled_dot_product_attention(query, keys, values)


@functools.cache
def decoders(shape: Shape, effort: Effort) -> dict[str, list[float]]:
    """All three in one race."""
    decoder = Decoder(shape.fit(effort))
    contestants = {
        "KVCache": inference(decoder.library),
        "cat": inference(decoder.concatenated),
        "sliced": inference(decoder.sliced),
    }
    return on_cpu(contestants, effort)


def decode_time(shape: Shape, other: str, effort: Effort) -> Result:
    """The time of one token against that of another way."""
    return ratio(decoders(shape, effort), "KVCache", other)


def decoding() -> Iterator[Case]:
    """One token after 1024."""
    for shape in DECODE_SHAPES:
        for other, against, goal in (
            ("cat", "torch.cat and SDPA", "<= 0.65"),
            ("sliced", "a sliced buffer of plain tensors and SDPA", "<= 1.05"),
        ):
            yield Case(
                f"decode-b{shape.b}-{other}",
                "KVCache and attention, f32, one token after n",
                against,
                str(shape),
                goal,
                functools.partial(decode_time, shape, other),
            )


def tiles() -> Iterator[Case]:
    """The tiled backend against SDPA: time and memory."""

    def contestants(effort: Effort, trains: bool) -> dict[str, Action]:
        query, key, value = leaves = heads(TILED_SHAPE.fit(effort))
        calls = {
            "tiled": functools.partial(attention, query, key, value, backend="tiled"),
            "sdpa": functools.partial(F.scaled_dot_product_attention, query, key, value),
        }
        return {
            name: training(call, leaves) if trains else inference(call)
            for name, call in calls.items()
        }

    for trains, kind, limit in ((False, "forward", 25), (True, "training", 100)):
        what = f"backend 'tiled', f32, {'forward + backward' if trains else 'forward'}"

        def time(effort: Effort, trains: bool = trains) -> Result:
            return ratio(on_cpu(contestants(effort, trains), effort), "tiled", "sdpa")

        def memory(effort: Effort, trains: bool = trains) -> Result:
            relative = memory_ratio(contestants(effort, trains))
            return exact(relative.medians["tiled"], "MiB", relative.medians, "MiB")

        shapes = str(TILED_SHAPE)
        yield Case(f"tiled-{kind}", what, "SDPA", shapes, "<= 2.0", time)
        yield Case(
            f"tiled-{kind}-memory", f"peak memory, {what}", "a limit", shapes, f"<= {limit}", memory
        )


def module_memory() -> Iterator[Case]:
    """What the module holds at once, against the floor."""
    for shape in SHAPES:
        for trains, kind in ((False, "forward"), (True, "training")):

            def run(effort: Effort, shape: Shape = shape, trains: bool = trains) -> Result:
                shape = shape.fit(effort)
                modules = {"module": module_for(shape), "floor": PackedFloor(shape.e, shape.h)}
                return memory_ratio(actions(modules, tokens(shape), trains))

            work = "forward + backward" if trains else "forward"
            yield Case(
                f"memory-{kind}-n{shape.n}",
                f"peak memory, module, f32, {work}",
                FLOOR,
                str(shape),
                "<= 1.05",
                run,
            )


@functools.cache
def token_race(compiles: bool, effort: Effort) -> dict[str, list[float]]:
    """One token through the module, the floor, and the floor with separate projections."""
    shape = TOKEN_SHAPE.fit(effort)
    modules: dict[str, nn.Module] = {
        "module": module_for(shape).eval(),
        "floor": PackedFloor(shape.e, shape.h),
        "separate": SeparateFloor(shape.e, shape.h),
    }
    calls: Mapping[str, Callable[[Tensor], Tensor]] = modules
    if compiles:
        calls = dict(zip(modules, compiled(list(modules.values()), effort), strict=True))
    return on_cpu(actions(calls, tokens(shape), False), effort)


def token_difference(other: str, effort: Effort) -> Result:
    """What the module adds to a floor, in microseconds."""
    return difference(token_race(False, effort), "module", other, 1e6, "us")


def token_ratio(other: str, effort: Effort) -> Result:
    """The compiled module against a compiled floor."""
    return ratio(token_race(True, effort), "module", other)


def one_token() -> Iterator[Case]:
    """What a call costs when there is hardly anything to compute."""
    what, shapes = "module, f32, one token, forward", str(TOKEN_SHAPE)
    separate = "three nn.Linear, views, SDPA, nn.Linear"
    for other, name, against in (("floor", "", FLOOR), ("separate", "-separate", separate)):
        goals = ("<= 30", "<= 1.05") if other == "floor" else (None, None)
        eager, after = (functools.partial(f, other) for f in (token_difference, token_ratio))
        yield Case(f"token-eager{name}", f"{what}, difference", against, shapes, goals[0], eager)
        yield Case(
            f"token-compiled{name}",
            f"{what}, compiled",
            f"{against}, compiled",
            shapes,
            goals[1],
            after,
        )


IMPORTS = """
import sys, time
start = time.process_time()
import torch, einops
middle = time.process_time()
sys.pycache_prefix, sys.dont_write_bytecode = sys.argv[1], False
import mha_lib
print(middle - start, time.process_time() - middle)
"""


def import_time() -> Case:
    """What the library adds to importing torch and einops, once Python has compiled it."""

    def run(effort: Effort) -> Result:
        with tempfile.TemporaryDirectory() as folder:
            seconds = [fresh_import(folder) for _ in range(3 if effort.quick else 10)][1:]
        theirs, ours = (
            [1000 * second for second in column] for column in zip(*seconds, strict=True)
        )
        medians = {
            "mha_lib": statistics.median(ours),
            "torch and einops": statistics.median(theirs),
        }
        return Result(medians["mha_lib"], quartiles(ours), "ms", medians, "ms")

    against = "import torch, einops, before it in the same fresh interpreter"
    return Case("import", "import mha_lib, in addition", against, "none", "<= 20", run)


def fresh_import(folder: str) -> tuple[float, float]:
    """Seconds to import torch and einops, and then the library; its bytecode is kept in ``folder``."""
    command = [sys.executable, "-c", IMPORTS, folder]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    theirs, ours = map(float, done.stdout.split())
    return theirs, ours


@functools.cache
def rungs(shape: Shape, effort: Effort) -> dict[str, list[float]]:
    """All rungs of the ladder in one race, on the same weights."""
    shape = shape.fit(effort)
    module, x = module_for(shape), tokens(shape)
    contestants: dict[str, Action] = {
        name: inference(functools.partial(function, module, x))
        for name, (function, _) in LADDER.items()
    }
    (fast,) = compiled([module], effort)
    contestants["compiled"] = inference(functools.partial(fast, x))
    return on_cpu(contestants, effort)


def ladder() -> Iterator[Case]:
    """The same function in several ways; for the book, without goals."""
    named = {name: text for name, (_, text) in LADDER.items() if name != "sdpa"}
    for shape in SHAPES:
        for rung, text in {**named, "compiled": "the module, compiled"}.items():
            yield Case(
                f"ladder-n{shape.n}-{rung}",
                f"{text}, f32, forward",
                "SDPA, three projections",
                str(shape),
                None,
                functools.partial(rung_time, shape, rung),
            )
    for rung, text in named.items():
        yield Case(
            f"ladder-memory-{rung}",
            f"peak memory, {text}, f32, forward",
            "SDPA, three projections",
            str(TILED_SHAPE),
            None,
            functools.partial(rung_memory, rung),
        )


def rung_time(shape: Shape, rung: str, effort: Effort) -> Result:
    """The time of one rung against that of SDPA."""
    return ratio(rungs(shape, effort), rung, "sdpa")


def rung_memory(rung: str, effort: Effort) -> Result:
    """The peak memory of one rung against that of SDPA."""
    shape = TILED_SHAPE.fit(effort)
    module, x = module_for(shape), tokens(shape)
    return memory_ratio(
        {name: inference(functools.partial(LADDER[name][0], module, x)) for name in (rung, "sdpa")}
    )
