"""Execute a notebook from top to bottom and save it clean: stable cell ids, no timing, no foreign metadata.

Usage: python tools/notebook.py book/01_query_key_value.ipynb [more notebooks ...]
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections import Counter
from pathlib import Path

import nbformat
from nbclient import NotebookClient

CELL_TIMEOUT_SECONDS = 600
KEPT_CELL_METADATA = ("tags", "mystnb")
KEPT_NOTEBOOK_METADATA = ("accelerator", "colab")
KERNELSPEC = {"display_name": "Python 3", "language": "python", "name": "python3"}


def execute(path: Path) -> float:
    """Run the notebook in place and return the seconds that it took."""
    notebook = nbformat.read(path, as_version=4)
    start = time.perf_counter()
    client = NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": path.parent}},
    )
    client.execute()
    seconds = time.perf_counter() - start
    nbformat.write(clean(notebook), path)
    return seconds


def clean(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Drop what differs from run to run or from editor to editor; keep errors short, as a page shows them."""
    kept = {
        key: notebook.metadata[key] for key in KEPT_NOTEBOOK_METADATA if key in notebook.metadata
    }
    notebook.metadata = nbformat.from_dict(
        {**kept, "kernelspec": KERNELSPEC, "language_info": {"name": "python"}}
    )
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    seen: Counter[str] = Counter()
    for cell in notebook.cells:
        cell.id = cell_id(cell, seen)
        cell.metadata = nbformat.from_dict(
            {key: cell.metadata[key] for key in KEPT_CELL_METADATA if key in cell.metadata}
        )
        if cell.cell_type == "code":
            cell.outputs = merge_streams(cell.outputs)
            for output in cell.outputs:
                if output.output_type == "error":
                    output.traceback = [f"{output.ename}: {output.evalue}"]
                if output.output_type in ("display_data", "execute_result"):
                    output.metadata = nbformat.from_dict({})
    return notebook


def cell_id(cell: nbformat.NotebookNode, seen: Counter[str]) -> str:
    """An id made of the cell's own text, with a number behind it where the same text stands twice."""
    digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:12]
    seen[digest] += 1
    return digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"


def merge_streams(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Join neighbouring pieces of one stream, which arrive cut at random places."""
    merged: list[nbformat.NotebookNode] = []
    for output in outputs:
        if output.output_type == "stream" and merged and merged[-1].get("name") == output.name:
            merged[-1].text += output.text
        else:
            merged.append(output)
    return merged


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(f"{argument}: {execute(Path(argument)):.1f} s")
