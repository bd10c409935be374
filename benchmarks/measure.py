"""How things are measured: time, memory, the machine, and what a result looks like.

Contestants take turns, A B A B, so that a machine that becomes slower is slower for all of them; the figure is the
median of the ratios of neighbours. On a CPU the clock counts what one thread computes, not what else the machine does.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import importlib.metadata
import importlib.util
import math
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mha_lib

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20

Action = Callable[[], object]
Function = Callable[[], Tensor | tuple[Tensor, ...]]
Clock = Callable[[Action, int], float]
"""Called with an action and how often to run it; returns the seconds of one run."""

Times = Mapping[str, Sequence[float]]
"""The seconds that each contestant took, in the order of the rounds."""


class UnavailableError(Exception):
    """What is to be measured does not exist on this machine."""


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        quick: Whether only to show that everything runs: tiny sizes, two rounds.
        budget: Seconds that one comparison may take.
        fewest: Rounds at least, whatever they take.
        most: Rounds at most.
        sample: Seconds of one sample at least; short actions are repeated to fill it.
    """

    quick: bool = False
    budget: float = 6.0
    fewest: int = 5
    most: int = 41
    sample: float = 0.002


QUICK = Effort(quick=True, budget=0.0, fewest=2, most=2, sample=0.0)


@dataclasses.dataclass(frozen=True)
class Result:
    """What was measured.

    Attributes:
        figure: The number that is compared with the goal.
        spread: Its first and third quartile over the rounds.
        unit: Of the figure, ``"ratio"`` included.
        medians: The absolute number of each contestant.
        medians_unit: Their unit.
        detail: What else is worth knowing, such as the kernel that was taken.
        tflops: The speed of each contestant, where it was counted.
    """

    figure: float
    spread: tuple[float, float]
    unit: str
    medians: dict[str, float]
    medians_unit: str
    detail: str = ""
    tflops: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table: what is measured, against what, and the goal.

    Attributes:
        name: The row's id; it does not change.
        workload: What is measured, in words.
        against: What it is compared with.
        shapes: The sizes.
        goal: Such as ``"<= 1.03"``; None if the row is for information.
        run: Measures.
    """

    name: str
    workload: str
    against: str
    shapes: str
    goal: str | None
    run: Callable[[Effort], Result]


def meets(figure: float, goal: str) -> bool:
    """Compare a figure with a goal such as ``"<= 1.03"``."""
    relation, limit = goal.split()
    return {"<=": figure <= float(limit), ">=": figure >= float(limit)}[relation]


def row(case: Case, result: Result) -> dict[str, Any]:
    """What is written down about a case; numbers have as many digits as a measurement has."""
    rounded = dataclasses.replace(
        result,
        figure=significant(result.figure),
        spread=(significant(result.spread[0]), significant(result.spread[1])),
        medians={name: significant(value) for name, value in result.medians.items()},
        tflops={name: significant(value) for name, value in result.tflops.items()},
    )
    return {
        "name": case.name,
        "workload": case.workload,
        "against": case.against,
        "shapes": case.shapes,
        **dataclasses.asdict(rounded),
        "goal": case.goal,
        "met": None if case.goal is None else meets(rounded.figure, case.goal),
    }


def significant(number: float, digits: int = 4) -> float:
    """Round to so many significant digits."""
    return float(f"{number:.{digits}g}")


def race(contestants: Mapping[str, Action], effort: Effort, clock: Clock) -> dict[str, list[float]]:
    """Let contestants take turns and return the seconds of each round; the first two runs are not counted."""
    calls = {}
    for name, action in contestants.items():
        clock(action, 1)
        calls[name] = max(1, math.ceil(effort.sample / clock(action, 1)))
    times: dict[str, list[float]] = {name: [] for name in contestants}
    began = time.perf_counter()
    with no_garbage_collection():
        for done in range(effort.most):
            if done >= effort.fewest and time.perf_counter() - began > effort.budget:
                break
            for name, action in contestants.items():
                times[name].append(clock(action, calls[name]))
    return times


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collect no garbage as long as this lasts: it would cost time, and free what was counted before."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def cpu_clock(action: Action, calls: int) -> float:
    """The seconds that this thread computed."""
    began = time.thread_time()
    for _ in range(calls):
        action()
    return (time.thread_time() - began) / calls


def gpu_clock(action: Action, calls: int) -> float:
    """The seconds between two events on the GPU."""
    start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        action()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000 / calls


def ratio(times: Times, ours: str, other: str, detail: str = "") -> Result:
    """How much longer ``ours`` takes than ``other``: below 1 is faster."""
    ratios = [a / b for a, b in zip(times[ours], times[other], strict=True)]
    medians = {name: 1000 * statistics.median(times[name]) for name in (ours, other)}
    return Result(statistics.median(ratios), quartiles(ratios), "ratio", medians, "ms", detail)


def difference(times: Times, ours: str, other: str, factor: float, unit: str) -> Result:
    """How much longer ``ours`` takes than ``other``, in ``unit``, of which a second has ``factor``."""
    gaps = [factor * (a - b) for a, b in zip(times[ours], times[other], strict=True)]
    medians = {name: factor * statistics.median(times[name]) for name in (ours, other)}
    return Result(statistics.median(gaps), quartiles(gaps), unit, medians, unit)


def exact(figure: float, unit: str, medians: dict[str, float], medians_unit: str) -> Result:
    """A result without noise."""
    return Result(figure, (figure, figure), unit, medians, medians_unit)


def quartiles(numbers: Sequence[float]) -> tuple[float, float]:
    """The first and the third quartile."""
    first, _, third = statistics.quantiles(numbers, n=4, method="inclusive")
    return first, third


def peak_bytes(action: Action) -> int:
    """The most memory that an action holds at once on the CPU, beyond what was there before; free of noise."""
    action()
    activities = [torch.profiler.ProfilerActivity.CPU]
    profile = torch.profiler.profile(activities=activities, profile_memory=True)
    with no_garbage_collection(), profile:
        action()
    recorded = profile.profiler
    assert recorded is not None
    assert recorded.kineto_results is not None
    everything: list[Any] = recorded.kineto_results.events()
    events = [event for event in everything if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def training(function: Function, leaves: Sequence[Tensor]) -> Action:
    """Forward and backward: the gradients of all ``leaves``."""
    outputs = function()
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    pulls = tuple(map(torch.randn_like, outputs))
    return lambda: torch.autograd.grad(function(), leaves, pulls, allow_unused=True)


def inference(function: Function) -> Action:
    """Forward without a graph for gradients."""
    return torch.no_grad()(function)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute with one thread, as long as this lasts."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def provenance(command: str, device: str) -> dict[str, Any]:
    """Where and with what the figures were measured; nothing that tells one machine of a kind from another."""
    on_gpu = device == "cuda"
    commit, dirty = git_state()
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
        "commit": commit,
        "dirty": dirty,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "driver": driver() if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "cudnn": version_of_cudnn() if on_gpu else None,
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "einops": version("einops"),
        "mha_lib": mha_lib.__version__,
    }


def version(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def slug(name: str) -> str:
    """A name as part of a file name: ``AMD EPYC`` becomes ``amd-epyc``."""
    words = re.sub(r"\((r|tm)\)", "", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-")


@functools.cache
def cpu_name() -> str:
    """What the processor calls itself."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text("utf-8"))
    except OSError:
        found = None
    if found:
        return found[1].strip()
    asked = output_of("sysctl", "-n", "machdep.cpu.brand_string")
    return asked or platform.processor() or platform.machine()


def version_of_cudnn() -> str:
    """Such as ``91900`` for 9.19.0."""
    return str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]


def driver() -> str:
    """The version of NVIDIA's driver."""
    shown = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return shown.splitlines()[0] if shown else "unknown"


def git_state() -> tuple[str, bool | None]:
    """The commit, and whether anything but results differs from it."""
    commit = output_of("git", "rev-parse", "HEAD")
    if not commit:
        return "unknown", None
    changed = output_of("git", "status", "--porcelain", "--", ".", ":!benchmarks/results")
    return commit, bool(changed)


def output_of(*command: str) -> str:
    """What a command prints; nothing if there is no such command or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def installed(package: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(package) is not None
