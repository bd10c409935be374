"""The pages of the book, as the table of contents names them."""

from __future__ import annotations

from pathlib import Path

import yaml


def toc_pages(root: Path) -> list[Path]:
    """The pages that _toc.yml names, in order: Markdown where there is such a file, else a notebook."""
    toc = yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))
    entries = [entry for part in toc["parts"] for entry in part["chapters"]]
    pages = [page for entry in entries for page in (entry, *entry.get("sections", []))]
    names = [toc["root"], *(page["file"] for page in pages)]
    markdown = [(root / name).with_suffix(".md") for name in names]
    return [page if page.exists() else page.with_suffix(".ipynb") for page in markdown]
