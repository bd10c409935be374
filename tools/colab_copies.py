"""Write copies of notebooks that Colab can run: the first cell installs the library from one commit.

Usage: python tools/colab_copies.py --commit COMMIT --out FOLDER [--address ADDRESS] [--pip=OPTION ...] NOTEBOOK ...
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tools.repository import GITHUB, origin, repository

ROOT = Path(__file__).resolve().parent.parent
INSTALL_ID = "install-mha-lib"
INSTALL = "#@title Install mha_lib\n%pip install {options} git+{address}@{commit}"
COLAB = {"accelerator": "GPU", "colab": {"gpuType": "T4", "provenance": []}}
PLAIN = r"[A-Za-z0-9._~%:+/-]+"
"""What neither a shell nor IPython reads as anything but itself: a cell hands the line to both."""


def colab_copy(
    notebook: nbformat.NotebookNode, address: str, commit: str, options: Sequence[str] = ()
) -> nbformat.NotebookNode:
    """Return the notebook, outputs included, behind a cell that installs the library, for a GPU in Colab."""
    source = INSTALL.format(options=" ".join(["--quiet", *options]), address=address, commit=commit)
    install = nbformat.v4.new_code_cell(source, id=INSTALL_ID, metadata={"cellView": "form"})
    copy: nbformat.NotebookNode = nbformat.from_dict(
        {
            **notebook,
            "cells": [install, *notebook.cells],
            "metadata": {**notebook.metadata, **COLAB},
        }
    )
    nbformat.validate(copy)
    return copy


def git_address(text: str) -> str:
    """Check an address that git can clone."""
    if not re.fullmatch(rf"(?:https://|file:///){PLAIN}", text):
        raise argparse.ArgumentTypeError(
            f"expected https://github.com/OWNER/NAME or file:///FOLDER, got {text!r}"
        )
    return text.rstrip("/")


def commit_id(text: str) -> str:
    """Check that a commit is named in full: a branch or a short name may come to mean another one."""
    if not re.fullmatch("[0-9a-f]{40}", text):
        raise argparse.ArgumentTypeError(f"expected 40 hexadecimal digits, got {text!r}")
    return text


def pip_option(text: str) -> str:
    """Check an option of pip."""
    if not re.fullmatch(rf"--{PLAIN}", text):
        raise argparse.ArgumentTypeError(f"expected an option such as --no-deps, got {text!r}")
    return text


def notebook_path(text: str) -> Path:
    """Check that a notebook is there."""
    if Path(text).suffix != ".ipynb" or not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"expected a file NAME.ipynb, got {text!r}")
    return Path(text)


def known_address() -> str | None:
    """Return the address on GitHub that this checkout belongs to, if that is known."""
    name = repository(os.environ, origin(ROOT))
    return f"{GITHUB}/{name}" if name else None


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the copies."""
    parser = argparse.ArgumentParser(description="Write Colab-ready copies of notebooks.")
    parser.add_argument("--address", type=git_address, help="the repository to install from")
    parser.add_argument("--commit", type=commit_id, required=True)
    parser.add_argument("--out", type=Path, required=True, help="the folder for the copies")
    parser.add_argument("--pip", type=pip_option, action="append", default=[], help="for pip")
    parser.add_argument("notebooks", type=notebook_path, nargs="+")
    given = parser.parse_args(arguments)
    address = given.address or known_address()
    if not address:
        parser.error("argument --address: the repository is not known, so it must be given")
    if len({path.name for path in given.notebooks}) < len(given.notebooks):
        parser.error("argument notebooks: two of them have the same name")
    given.out.mkdir(parents=True, exist_ok=True)
    for path in given.notebooks:
        copy = colab_copy(nbformat.read(path, as_version=4), address, given.commit, given.pip)
        nbformat.write(copy, given.out / path.name)


if __name__ == "__main__":
    main()
