"""The benchmarks run, what they compare computes the same, and what was recorded is complete."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import cpu, gpu
from benchmarks.__main__ import RESULTS, main
from benchmarks.measure import (
    MIB,
    QUICK,
    Effort,
    cpu_name,
    meets,
    one_thread,
    peak_bytes,
    race,
    ratio,
    slug,
)
from benchmarks.rivals import LADDER, PackedFloor, SeparateFloor, eager_einsum
from mha_lib import MultiHeadAttention, attention
from tests.support import ROOT, assert_near
from tests.tolerances import MODULE

CASES = {case.name: case for case in (*cpu.cases(), *gpu.cases())}
PUBLISHED = ROOT / "benchmarks" / "published.json"
FROM_A_GPU = {"gpu", "driver", "cuda", "cudnn"}
MAY_BE_MISSING = {"triton", "dirty"}
"""Triton is not installed everywhere, and without git nobody knows what was changed."""

ROW = {
    *("name", "workload", "against", "shapes", "figure", "spread", "unit", "goal", "met"),
    *("medians", "medians_unit", "detail", "tflops"),
}
PROVENANCE = {
    *("date", "command", "commit", "dirty", "cpu", "cores", "threads", "os", "python"),
    *("torch", "triton", "einops", "mha_lib", *FROM_A_GPU),
}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("results")
    assert main(["--quick", "--device", "cpu", "--folder", str(folder)]) == 0
    (path,) = folder.iterdir()
    assert path.stem == slug(cpu_name())
    record: dict[str, Any] = read(path)
    return record


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_every_row_is_measured(quick: dict[str, Any]) -> None:
    names = [row["name"] for row in quick["rows"]]
    assert {*names, *quick["skipped"]} == {case.name for case in cpu.cases()}
    assert all("x-transformers" in name for name in quick["skipped"])
    assert quick["quick"]
    check_record(quick)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_row_is_measured_on_cuda(tmp_path: Path) -> None:
    assert main(["--quick", "--device", "cuda", "--folder", str(tmp_path)]) == 0
    record = read(next(tmp_path.iterdir()))
    names = {row["name"] for row in record["rows"]}
    assert {*names, *record["skipped"]} == {case.name for case in gpu.cases()}
    check_record(record)


def test_recorded_results() -> None:
    for path in RESULTS.glob("*.json"):
        record = read(path)
        check_record(record)
        assert path.stem == slug(record["machine"])
        assert not record["quick"], path
        assert not record["failed"], path
        assert "--only" not in record["provenance"]["command"], path


def check_record(record: dict[str, Any]) -> None:
    """Whether a result file is complete, known, consistent, and silent about its machine's owner."""
    check_provenance(record["provenance"], record["machine"])
    names = [row["name"] for row in record["rows"]]
    assert len(names) == len(set(names))
    assert {*names, *record["skipped"]} <= CASES.keys()
    for row in record["rows"]:
        check_row(row)
    text = json.dumps(record)
    assert not re.findall(
        r"/(?:home|root|Users|tmp|work|usr|opt)\b|[A-Z]:\\\\|localhost|\.local\b", text
    )


def check_provenance(found: dict[str, Any], machine: str) -> None:
    assert found.keys() == PROVENANCE
    on_gpu = found["gpu"] is not None
    assert machine == (found["gpu"] if on_gpu else found["cpu"])
    for name, value in found.items():
        if name in FROM_A_GPU:
            assert (value is not None) == on_gpu, name
        elif name not in MAY_BE_MISSING:
            assert value not in (None, ""), name
    assert found["threads"] == 1
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", found["date"])
    assert re.fullmatch(r"[0-9a-f]{40}|unknown", found["commit"])


def check_row(row: dict[str, Any]) -> None:
    case = CASES[row["name"]]
    assert row.keys() == ROW
    assert row["goal"] == case.goal
    assert row["met"] == (None if case.goal is None else meets(row["figure"], case.goal))
    low, high = row["spread"]
    numbers = [row["figure"], low, high, *row["medians"].values(), *row["tflops"].values()]
    assert all(math.isfinite(number) for number in numbers)
    assert low <= row["figure"] <= high
    assert row["medians"]


def test_names_are_unique_and_goals_are_readable() -> None:
    assert len(CASES) == len(cpu.cases()) + len(gpu.cases())
    assert all(meets(1.0, case.goal) in (True, False) for case in CASES.values() if case.goal)


def test_published_figures_have_a_source() -> None:
    published = read(PUBLISHED)
    for figure in published["figures"]:
        assert figure["value"] > 0, figure
        assert {"what", "unit"} <= figure.keys(), figure
        assert published["sources"][figure["source"]]["url"].startswith("https://"), figure


@pytest.mark.parametrize(("function"), [f for f, _ in LADDER.values()], ids=LADDER)
def test_rungs_compute_what_the_module_computes(
    function: Callable[[MultiHeadAttention, Tensor], Tensor],
) -> None:
    module, x = MultiHeadAttention(12, 3).double(), torch.randn(2, 5, 12, dtype=torch.float64)
    assert_near(function(module, x), module(x), MODULE)


def test_the_floors_compute_what_the_module_computes() -> None:
    module, packed = MultiHeadAttention(12, 3).double(), PackedFloor(12, 3).double()
    layers = [module.q_proj, module.k_proj, module.v_proj]
    state = {
        name: torch.cat([layer.get_parameter(name) for layer in layers])
        for name in ("weight", "bias")
    }
    packed.qkv_proj.load_state_dict(state)
    packed.out_proj.load_state_dict(module.out_proj.state_dict())
    separate = SeparateFloor(12, 3).double()
    separate.load_state_dict(module.state_dict())
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    for floor in (packed, separate):
        assert_near(floor(x), module(x), MODULE)


def test_einsum_computes_attention() -> None:
    query, key, value = torch.randn(3, 2, 3, 5, 4, dtype=torch.float64)
    assert_near(eager_einsum(query, key, value), attention(query, key, value), MODULE)


def test_ways_to_decode_agree() -> None:
    decoder = cpu.Decoder(cpu.DECODE_SHAPES[0].fit(QUICK))
    decoder.buffers = decoder.cache.keys.clone(), decoder.cache.values.clone()
    for output in (decoder.concatenated(), decoder.sliced()):
        torch.testing.assert_close(decoder.library(), output)


def test_peak_memory_counts_what_lives_at_once() -> None:
    def action() -> Tensor:
        both = torch.empty(MIB) + torch.empty(MIB)
        return both.sum()

    assert 12 * MIB <= peak_bytes(action) < 12.01 * MIB


def test_the_figure_is_the_median_of_ratios() -> None:
    seconds = {"a": iter([9, 9, 1, 2, 3]), "b": iter([9, 9, 2, 2, 2])}
    turns: list[str] = []

    def clock(action: Callable[[], object], calls: int) -> float:
        name = str(action())
        turns.append(name)
        return float(next(seconds[name]))

    effort = Effort(budget=0.0, fewest=3, most=3)
    times = race({"a": lambda: "a", "b": lambda: "b"}, effort, clock)
    assert turns == [*"aabb", *"ababab"]
    result = ratio(times, "a", "b")
    assert (result.figure, result.spread) == (1.0, (0.75, 1.25))
    assert result.medians == {"a": 2000.0, "b": 2000.0}


def test_threads_are_set_back() -> None:
    before = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_slug() -> None:
    assert slug("Intel(R) Xeon(R) Platinum 8488C") == "intel-xeon-platinum-8488c"
    assert slug("NVIDIA H200") == "nvidia-h200"


def test_only_and_quick_leave_recorded_results_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "write_text", None)
    assert main(["--quick", "--device", "cpu", "--only", "memory-forward-n128"]) == 0
