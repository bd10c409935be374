"""The example that README.md and the first page show: one text, and it runs."""

from __future__ import annotations

import re

from tests.support import ROOT


def examples(page: str) -> list[str]:
    """The Python blocks of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_readme_and_first_page_show_the_same_example() -> None:
    assert len(examples("README.md")) == 1
    assert examples("README.md") == examples("book/index.md")


def test_the_example_runs() -> None:
    names: dict[str, object] = {}
    exec(compile(examples("README.md")[0], "README.md", "exec"), names)
    assert {"attention", "output", "weights", "steps"} <= names.keys()
