"""Teaches nbval to compare figures and interactive views, and to run the notebooks on the device that the run is for.

MHA_BOOK_DEVICE=cpu (the default) hides every GPU from the notebooks. MHA_BOOK_DEVICE=cuda demands one, and each
notebook that chooses a device must then have allocated memory on it. Where CI=true, a run whose skipped tests are not
those of tests/expected_skips.txt fails. Where Triton is not installed (it has wheels for Linux only), what needs it is
left out.
"""

from __future__ import annotations

import base64
import copy
import io
import os
import re
from collections.abc import Generator, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nbval.plugin
import numpy as np
import pytest
from PIL import Image

from tests.tolerances import FIGURE_RMS

NEED_TRITON = ["mha_lib/triton_kernel.py", "tests/test_triton.py", "book/05_tiling.ipynb"]
collect_ignore = [] if find_spec("triton") else NEED_TRITON
EXPECTED_SKIPS = "tests/expected_skips.txt"
BOOK_DEVICE = os.environ.get("MHA_BOOK_DEVICE", "cpu")
CHOOSES_DEVICE = "torch.cuda.is_available()"
CUDA_THERE = "import torch; assert torch.cuda.is_available(), 'no CUDA device'"
CUDA_USED = (
    "assert torch.cuda.max_memory_allocated() > 0, 'the notebook allocated nothing on the GPU'"
)


VIEW = 'class="mha-explorer"'
VIEW_WEIGHTS = re.compile(r'data-weights="([^"]*)"')
VIEW_ROUNDED = re.compile(r"<tbody>.*?</tbody>|<path .*?</svg>", re.DOTALL)
VIEW_STEPS = 1


class BookCell(nbval.plugin.IPyNbCell):  # type: ignore[misc]
    """A cell whose PNG figures are compared too; nbval itself passes over them."""

    def compare_outputs(self, test: Any, ref: Any, skip_compare: Any = None) -> bool:
        """Compare as nbval does, then interactive views by their weights, then figure by figure."""
        if not super().compare_outputs(without_weights(test), without_weights(ref), skip_compare):
            return False
        if view_distance(test, ref) > VIEW_STEPS:
            self.comparison_traceback.append(
                f"the weights of a view differ by more than {VIEW_STEPS} of 255 steps"
            )
            return False
        fresh, stored = figures(test), figures(ref)
        if len(fresh) != len(stored):
            self.comparison_traceback.append(
                f"{len(stored)} stored figures, {len(fresh)} fresh ones"
            )
            return False
        for number, (new, old) in enumerate(zip(fresh, stored, strict=True)):
            distance = figure_distance(new, old)
            if distance >= FIGURE_RMS:
                self.comparison_traceback.append(
                    f"figure {number} differs: {distance:.2f} grey levels, tolerated {FIGURE_RMS:.2f}"
                )
                return False
        return True


class DeviceItem(pytest.Item):
    """The last item of a notebook in a CUDA run: fails unless the notebook used the GPU."""

    def __init__(self, *, probe: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.probe = probe

    def runtest(self) -> None:
        """Run the probe in the notebook's own kernel."""
        client = self.parent.kernel.kc  # type: ignore[union-attr]
        reply = client.execute_interactive(
            self.probe, allow_stdin=False, output_hook=lambda message: None, timeout=60
        )
        if reply["content"]["status"] != "ok":
            pytest.fail(f"{reply['content']['ename']}: {reply['content']['evalue']}", pytrace=False)


class BookNotebook(nbval.plugin.IPyNbFile):  # type: ignore[misc]
    """A notebook; in a CUDA run with one more item that looks at the GPU."""

    def setup(self) -> None:
        """Start the kernel; in a CPU run it sees no GPU, while the tests in this process keep theirs."""
        with pytest.MonkeyPatch.context() as environment:
            if BOOK_DEVICE == "cpu":
                environment.setenv("CUDA_VISIBLE_DEVICES", "")
            super().setup()

    def collect(self) -> Iterator[pytest.Item]:
        """Yield the cells, then the device item."""
        for cell in super().collect():
            yield BookCell.from_parent(
                self, name=cell.name, cell_num=cell.cell_num, cell=cell.cell, options=cell.options
            )
        if BOOK_DEVICE == "cuda":
            computes = any(CHOOSES_DEVICE in cell.source for cell in self.nb.cells)
            probe = f"{CUDA_THERE}\n{CUDA_USED if computes else ''}"
            yield DeviceItem.from_parent(self, name="used CUDA", probe=probe)


class SkipWatch:
    """Fails the run when tests were skipped that should not be, or the other way round."""

    def __init__(self, expected: set[str]) -> None:
        self.expected = expected
        self.reported: set[str] = set()
        self.skipped: set[str] = set()
        self.problems: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Remember a test's outcome."""
        self._remember(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Remember a whole module that was skipped while it was imported."""
        self._remember(report)

    def _remember(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        self.reported.add(report.nodeid)
        if report.skipped and not hasattr(report, "wasxfail"):
            self.skipped.add(report.nodeid)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Turn a run that would pass into one that fails."""
        self.problems = skip_problems(self.skipped, self.reported, self.expected)
        if self.problems and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say why."""
        for problem in self.problems:
            terminalreporter.write_line(problem, red=True)


def skip_problems(skipped: set[str], reported: set[str], expected: set[str]) -> list[str]:
    """What differs between the skipped tests and the expected ones; tests that were not collected do not count."""
    surprising = [
        f"{test} was skipped, but is not in {EXPECTED_SKIPS}" for test in sorted(skipped - expected)
    ]
    stale = [
        f"{test} is in {EXPECTED_SKIPS}, but was not skipped"
        for test in sorted((expected & reported) - skipped)
    ]
    return surprising + stale


def expected_skips(root: Path) -> set[str]:
    """The tests that a machine without a GPU skips; a machine with one skips none."""
    import torch

    lines = (root / EXPECTED_SKIPS).read_text(encoding="utf-8").splitlines()
    listed = {line.strip() for line in lines if line.strip() and not line.startswith("#")}
    return set() if torch.cuda.is_available() else listed


@pytest.hookimpl(wrapper=True)
def pytest_collect_file(
    file_path: Path, parent: pytest.Collector
) -> Generator[None, list[pytest.Collector], list[pytest.Collector]]:
    """Read notebooks as BookNotebook where nbval would as its own class."""
    return [
        BookNotebook.from_parent(parent, path=file_path)
        if isinstance(collector, nbval.plugin.IPyNbFile)
        else collector
        for collector in (yield)
    ]


def without_weights(outputs: Any) -> Any:
    """The outputs of a cell; of interactive views without the weights and what rounds them."""
    outputs = copy.deepcopy(outputs)
    for output in outputs:
        page = output.get("data", {}).get("text/html", "")
        if VIEW in page:
            output["data"]["text/html"] = VIEW_ROUNDED.sub("", VIEW_WEIGHTS.sub("", page))
    return outputs


def view_distance(test: Any, ref: Any) -> int:
    """The largest difference of a weight in interactive views, in the steps they are kept in."""
    fresh, stored = (
        [
            np.frombuffer(base64.b64decode(weights), dtype=np.uint8).astype(int)
            for output in outputs
            if VIEW in (page := output.get("data", {}).get("text/html", ""))
            for weights in VIEW_WEIGHTS.findall(page)
        ]
        for outputs in (test, ref)
    )
    return max(
        (int(np.abs(new - old).max()) for new, old in zip(fresh, stored, strict=True)), default=0
    )


def figures(outputs: Any) -> list[str]:
    """The PNG figures among a cell's outputs."""
    return [
        output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})
    ]


def figure_distance(new: str, old: str) -> float:
    """Root mean square distance of two base64 PNGs in grey levels of 255; infinite if the sizes differ."""
    pixels = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"), dtype=np.float64)
        for png in (new, old)
    ]
    if pixels[0].shape != pixels[1].shape:
        return float("inf")
    return float(np.sqrt(np.mean((pixels[0] - pixels[1]) ** 2)))


def pytest_configure(config: pytest.Config) -> None:
    """Check the device that the run is for; in CI, watch the skipped tests."""
    if BOOK_DEVICE not in ("cpu", "cuda"):
        raise pytest.UsageError(f"MHA_BOOK_DEVICE must be cpu or cuda, got {BOOK_DEVICE}")
    os.environ["PYTHONHASHSEED"] = "0"
    if os.environ.get("CI") == "true" and not hasattr(config, "workerinput"):
        config.pluginmanager.register(SkipWatch(expected_skips(config.rootpath)), "skip-watch")
