"""What README.md, the first page and the API page show: examples that run, a picture and times that are measured."""

from __future__ import annotations

import json
import re

from tests.support import ROOT
from tools.picture import draw, two_heads


def examples(page: str) -> list[str]:
    """The Python blocks of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_readme_and_first_page_show_the_same_example() -> None:
    assert len(examples("README.md")) == 1
    assert examples("README.md") == examples("book/index.md")


def test_the_example_of_the_api_page_runs() -> None:
    (example,) = examples("book/api.md")
    exec(compile(example, "api.md", "exec"), {})


def test_the_picture_is_drawn_from_the_weights_of_the_chapter() -> None:
    sentence, heads = two_heads()
    assert {name: sentence[row.index(max(row))] for name, row in heads.items()} == {
        "who": "cat",
        "how": "tired",
    }
    drawn = (ROOT / "book" / "_static" / "two_heads.svg").read_text(encoding="utf-8")
    assert drawn == draw(sentence, heads)
    shown = re.findall(r">(\d\.\d\d)<", drawn)
    assert shown == ["0.81", "0.10", "0.89"]
    for page in ("README.md", "book/index.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert all(number in text for number in shown), page


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
