"""The appendix of claims: verdicts follow from figures, and other figures give other verdicts."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from tests import book_checks
from tests.support import ROOT

NOTEBOOK = book_checks.read(ROOT / "book" / "claims.ipynb")
VERDICTS = ("holds", "in part", "does not hold")
Figures = dict[str, Any]


def cell_tagged(tag: str) -> tuple[int, Any]:
    """The one code cell with the tag, and where it stands."""
    (found,) = (
        (number, cell)
        for number, cell in book_checks.code_cells(NOTEBOOK)
        if tag in book_checks.tags_of(cell)
    )
    return found


def rules() -> dict[str, Callable[[Figures], str]]:
    """What the cell of rules defines; it needs nothing of the experiments."""
    names: dict[str, Any] = {}
    exec("import itertools\n" + cell_tagged("rules")[1].source, names)
    found: dict[str, Callable[[Figures], str]] = names["RULES"]
    return found


def table() -> dict[str, tuple[str, str]]:
    """The figures and the verdict that the page shows for each claim."""
    (output,) = cell_tagged("verdicts")[1].outputs
    rows = re.findall(
        r'href="#claims-([a-z-]+)">.+?</a></td><td>(.+?)</td><td><strong>(.+?)</strong>',
        output.data["text/html"],
    )
    return {name: (figures, verdict) for name, figures, verdict in rows}


RULES = rules()
FIGURES: dict[str, Figures] = json.loads(cell_tagged("figures")[1].outputs[0].text)
TABLE = table()

# For each claim: figures that an experiment could have given, and the verdict they must lead to.
OTHERWISE: dict[str, list[tuple[Figures, str]]] = {
    "places": [
        ({"error by seed": [[0.5, 0.5, 0.5], [0.0, 0.5, 0.0]]}, "in part"),
        ({"error by seed": [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]}, "does not hold"),
    ],
    "roles": [({"weights follow the keys": False}, "in part")],
    "combined": [
        ({"digits, one softmax": 12}, "holds"),
        ({"digits, one projection": 3}, "does not hold"),
    ],
    "memory": [
        ({"bytes kept, split": 200_000}, "holds"),
        ({"bytes kept, split": 200_000, "parameters, split": 16_000}, "in part"),
    ],
    "divide": [
        ({"features a head reads": 16}, "holds"),
        ({"features a head reads": 32}, "in part"),
    ],
    "independent": [
        ({"gradient across heads, packed": 0.1}, "holds"),
        ({"gradient across heads, split": 0.1}, "does not hold"),
    ],
    "accuracy": [
        (
            {"error by seed": [[0.5, 0.5, 0.5], [0.1, 0.1, 0.1]], "digits, same start": 1},
            "holds",
        ),
        ({"error by seed": [[0.5, 0.5, 0.5], [0.1, 0.1, 0.1]]}, "in part"),
    ],
    "interpretable": [
        ({"heads seen, packed": 1}, "holds"),
        ({"digits, weights": 2}, "in part"),
    ],
    "flexible": [
        ({"frozen head moved, packed": 0.0}, "in part"),
        ({"frozen head moved, split": 0.1}, "does not hold"),
    ],
    "cost": [
        ({"multiplications, split": 500_000}, "holds"),
        ({"operations, split": 15}, "does not hold"),
    ],
    "mistakes": [
        (
            {"wrong splits stopped by an error": 5, "multiplications, heads as batch": 99_999},
            "holds",
        ),
        ({"error without transformations": 0.0}, "does not hold"),
    ],
    "speed": [
        ({"bytes kept, fused": 2_000_000}, "in part"),
        ({"operations, batched": 65}, "does not hold"),
    ],
    "models": [({"digits by model": {"BERT": 0, "GPT-2": 5}}, "in part")],
    "used": [
        ({"linear layers, 4 and 8 heads": {"BERT": [15, 27], "Llama": [16, 28]}}, "holds"),
        ({"linear layers, 4 and 8 heads": {"BERT": [15, 27], "Llama": [7, 7]}}, "in part"),
    ],
    "vision": [
        (
            {"takes another size, attention": True, "takes another size, convolution": False},
            "holds",
        ),
        (
            {"pixels read, attention": 9, "weights follow the image, convolution": True},
            "does not hold",
        ),
    ],
    "choice": [
        ({"outputs differ": True}, "holds"),
        ({"control differs": False}, "does not hold"),
    ],
    "view": [
        ({"merge shares memory": True}, "holds"),
        ({"split shares memory": False}, "does not hold"),
    ],
    "wrong-view": [
        ({"misplaced, heads > 1": 0}, "holds"),
        ({"misplaced, heads > 1": 24}, "in part"),
    ],
    "more-heads": [
        ({"error by heads": {"1": 0.9, "2": 0.6, "4": 0.3, "8": 0.1}}, "holds"),
        ({"error by heads": {"1": 0.5, "2": 0.5, "4": 0.6}}, "does not hold"),
    ],
    "head-width": [
        ({"another width runs": False}, "holds"),
        ({"heads times width is the embedding": {"Gemma": True}}, "in part"),
    ],
    "one-head-cost": [
        ({"scores, 8 heads": 1_024}, "holds"),
        ({"multiplications, 8 heads": 999_999}, "does not hold"),
    ],
}
CHANGES = [(name, change, verdict) for name in OTHERWISE for change, verdict in OTHERWISE[name]]


def test_each_claim_has_a_rule_figures_a_row_and_changed_figures() -> None:
    names = set(RULES)
    assert names == set(FIGURES) == set(TABLE) == set(OTHERWISE)
    assert len(names) >= 21


@pytest.mark.parametrize("name", RULES)
def test_the_verdict_follows_from_the_stored_figures(name: str) -> None:
    assert RULES[name](FIGURES[name]) == TABLE[name][1]


@pytest.mark.parametrize(("name", "change", "verdict"), CHANGES)
def test_other_figures_give_another_verdict(name: str, change: Figures, verdict: str) -> None:
    assert set(change) <= set(FIGURES[name]), "the change names a figure that is not measured"
    changed = copy.deepcopy(FIGURES[name]) | change
    assert RULES[name](changed) == verdict
    assert verdict != TABLE[name][1]


def test_all_three_verdicts_are_given() -> None:
    assert {verdict for _, verdict in TABLE.values()} == set(VERDICTS)


def test_the_rules_stand_above_the_experiments_and_no_verdict_is_typed() -> None:
    rule_cell, _ = cell_tagged("rules")
    experiments = [
        (number, cell.source)
        for number, cell in book_checks.code_cells(NOTEBOOK)
        if 'figures["' in cell.source and number != cell_tagged("verdicts")[0]
    ]
    assert experiments
    for number, source in experiments:
        assert number > rule_cell
        assert not any(f'"{verdict}"' in source for verdict in VERDICTS)


def test_figures_are_measured_not_typed() -> None:
    """Apart from a size that the experiment itself chose, no cell fills in a number."""
    names = {name for figures in FIGURES.values() for name in figures} - {"embedding width"}
    for _, cell in book_checks.code_cells(NOTEBOOK):
        typed = re.findall(r'"([^"]+)": [\d.]+,?$', cell.source, re.MULTILINE)
        assert names.isdisjoint(typed)


PUBLISHED_STEPS = {
    row["what"]: row["value"]
    for row in json.loads((ROOT / "benchmarks" / "published.json").read_text(encoding="utf-8"))[
        "figures"
    ]
    if row["source"] == "raschka"
}


def test_published_times_are_those_of_the_file_with_sources() -> None:
    (cell,) = (c for _, c in book_checks.code_cells(NOTEBOOK) if "PUBLISHED_MS = {" in c.source)
    shown = re.findall(r'^    "([^"]+)": ([\d.]+),$', cell.source, re.MULTILINE)
    assert len(shown) == 4
    assert all(PUBLISHED_STEPS[what] == float(value) for what, value in shown)


def test_each_row_links_to_a_section() -> None:
    text = "\n".join(cell.source for cell in NOTEBOOK.cells if cell.cell_type == "markdown")
    assert [name for name in TABLE if f"(claims-{name})=\n## " not in text] == []
