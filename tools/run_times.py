"""Measure how long the book's notebooks run on this machine: each once, alone in an empty folder.

Usage: python -m tools.run_times --out benchmarks/run_times/cpu.json book/*.ipynb
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch

from benchmarks.measure import provenance
from tools.notebook import execute


def seconds_alone(notebook: Path) -> int:
    """Whole seconds that a copy of the notebook runs, with the start of its kernel."""
    with tempfile.TemporaryDirectory() as folder:
        return round(execute(Path(shutil.copy(notebook, folder))))


def main() -> None:
    """Write the results file."""
    parser = argparse.ArgumentParser(description="Measure how long notebooks run.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("notebooks", type=Path, nargs="+")
    arguments = parser.parse_args()
    seconds = {notebook.stem: seconds_alone(notebook) for notebook in arguments.notebooks}
    facts = provenance("python -m tools.run_times", "cuda" if torch.cuda.is_available() else "cpu")
    text = json.dumps({"provenance": facts, "seconds": seconds}, indent=1)
    arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
