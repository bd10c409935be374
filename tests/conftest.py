"""What several modules of tests share: the built pages."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from filelock import FileLock

from tests import site_checks
from tests.support import ROOT


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages, built without a single warning, once for all processes of a run."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    output, finished = folder / "site", folder / "site.finished"
    with FileLock(folder / "site.lock"):
        if not finished.exists():
            output.mkdir(exist_ok=True)
            done = site_checks.build_book(ROOT, output)
            assert done.returncode == 0, "\n".join(
                line for line in done.stderr.splitlines() if "WARNING" in line or "ERROR" in line
            )
            finished.touch()
    return output / "_build" / "html"
