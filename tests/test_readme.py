"""The example that README.md and the first page show: one text, and it runs."""

from __future__ import annotations

import json
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


def test_the_times_are_those_of_the_results_file() -> None:
    path = ROOT / "benchmarks" / "results" / "amd-epyc.json"
    rows = {row["name"]: row["figure"] for row in json.loads(path.read_text("utf-8"))["rows"]}

    def measured(kind: str, rival: str) -> str:
        figures = [rows[f"{kind}-n{n}-{rival}"] for n in (128, 512, 1024, 4096)]
        return f"{min(figures):.2f} to {max(figures):.2f}"

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.findall(
        r"^\| (\S+).*? \| (\d\.\d+ to \S+) \| ?(\S+ to \S+)? ?\|$", text, re.MULTILINE
    )
    rivals = ("peer-train", "peer-eval", "x-transformers", "floor")
    assert [(forward, training) for _, forward, training in shown] == [
        (measured("forward", rival), "" if rival == "peer-eval" else measured("training", rival))
        for rival in rivals
    ]
    assert 0.08 < rows["token-eager"] / 1000 < 0.12
