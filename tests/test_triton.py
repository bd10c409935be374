"""The Triton backend: what it computes, on a GPU or interpreted, and that its kernels compile for the usual cards.

The kernels are run and compiled in processes of their own: Triton's interpreter, once chosen, holds for its process,
and none of the other tests should find triton imported.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support import DRAWS, ROOT

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton has no wheels for this system"
)


def run(*command: str, **environment: str) -> None:
    """Run Python in the project's folder; where it fails, show what it printed."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-5000:]


def test_what_the_kernels_compute() -> None:
    interpret = "0" if torch.cuda.is_available() else "1"
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/triton_cases.py",
        TRITON_INTERPRET=interpret)  # fmt: skip


@pytest.mark.parametrize("capability", [75, 80, 90])
def test_kernels_compile_without_a_gpu(capability: int, tmp_path: Path) -> None:
    run("-m", "tests.triton_compile", str(capability), "all" if DRAWS > 50 else "some",
        TRITON_CACHE_DIR=str(tmp_path))  # fmt: skip


def test_library_does_not_import_triton() -> None:
    run("-c", "import sys, mha_lib; assert 'triton' not in sys.modules")
