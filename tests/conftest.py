"""What several modules of tests share: the built pages."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import site_checks
from tests.support import ROOT


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages, built without a single warning."""
    output = tmp_path_factory.mktemp("site")
    done = site_checks.build_book(ROOT, output)
    assert done.returncode == 0, "\n".join(
        line for line in done.stderr.splitlines() if "WARNING" in line or "ERROR" in line
    )
    return output / "_build" / "html"
