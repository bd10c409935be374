"""Teaches nbval to compare figures, and to run the notebooks on the device that the run is for.

MHA_BOOK_DEVICE=cpu (the default) hides every GPU from the notebooks. MHA_BOOK_DEVICE=cuda demands one, and each
notebook that computes must then have allocated memory on it.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterator
from typing import Any

import nbval.plugin
import numpy as np
import pytest
from PIL import Image

from tests.tolerances import FIGURE_RMS

BOOK_DEVICE = os.environ.get("MHA_BOOK_DEVICE", "cpu")
CUDA_PROBE = """
import torch
assert torch.cuda.is_available(), "no CUDA device"
assert torch.cuda.max_memory_allocated() > 0, "the notebook allocated nothing on the GPU"
"""


class BookCell(nbval.plugin.IPyNbCell):  # type: ignore[misc]
    """A cell whose PNG figures are compared too; nbval itself passes over them."""

    def compare_outputs(self, test: Any, ref: Any, skip_compare: Any = None) -> bool:
        """Compare as nbval does, then figure by figure."""
        if not super().compare_outputs(test, ref, skip_compare):
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
        kernel = self.parent.kernel  # type: ignore[union-attr]
        reply = kernel.await_reply(
            kernel.execute_cell_input(self.probe, allow_stdin=False), timeout=60
        )
        if reply["content"]["status"] != "ok":
            pytest.fail(f"{reply['content']['ename']}: {reply['content']['evalue']}", pytrace=False)


class BookNotebook(nbval.plugin.IPyNbFile):  # type: ignore[misc]
    """A notebook; in a CUDA run with one more item that looks at the GPU."""

    def collect(self) -> Iterator[pytest.Item]:
        """Yield the cells, then the device item."""
        yield from super().collect()
        if BOOK_DEVICE == "cuda":
            yield DeviceItem.from_parent(self, name="used CUDA", probe=CUDA_PROBE)


nbval.plugin.IPyNbCell = BookCell
nbval.plugin.IPyNbFile = BookNotebook


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
    """Choose the device for the notebooks' kernels, which inherit this environment."""
    if BOOK_DEVICE not in ("cpu", "cuda"):
        raise pytest.UsageError(f"MHA_BOOK_DEVICE must be cpu or cuda, got {BOOK_DEVICE}")
    os.environ["PYTHONHASHSEED"] = "0"
