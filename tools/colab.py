"""Run the Colab-ready copies as Colab would: each alone in an empty folder, with Colab's versions.

Usage: python tools/colab.py [--here] book/01_query_key_value.ipynb [more notebooks ...]

The library comes from the checkout's last commit, through the copies' own first cell. --here takes the environment that
runs this script, which is meant for Colab's own image; otherwise there is one in .venv-colab, with a stand-in for
google.colab.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import nbformat

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tools.colab_copies import INSTALL_ID
from tools.repository import git

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv-colab"
REQUIREMENTS = ROOT / "requirements-colab.txt"
DATA = Path(sys.prefix) / "share" / "mha-book"
WITHOUT = "No module named 'mha_lib'"
KERNEL = """\
c.IPKernelApp.kernel_class = "ipykernel.ipkernel.IPythonKernel"
c.InteractiveShellApp.extensions = []
c.InteractiveShellApp.exec_lines = ["import google.colab"]
"""
"""Colab's kernel has google.colab imported. Its own class of kernel serves Colab's pages and is left out."""


def prepare() -> Path:
    """Make the environment without the library, and return its Python."""
    python = program(ENVIRONMENT)
    if not python.exists():
        venv.create(ENVIRONMENT, with_pip=True)
    pip(python, "install", "-r", str(REQUIREMENTS))
    pip(python, "install", "--no-deps", "-r", str(ROOT / "requirements-no-deps.txt"))
    shutil.copytree(DATA, ENVIRONMENT / "share" / DATA.name, dirs_exist_ok=True)
    stand_in(python)
    return python


def program(environment: Path) -> Path:
    """The Python of a virtual environment."""
    return environment / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def stand_in(python: Path) -> None:
    """Give an environment a google.colab with nothing in it but a name that JAX imports."""
    command = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    module = Path(packages, "google", "colab", "__init__.py")
    module.parent.mkdir(parents=True, exist_ok=True)
    module.write_text('"""A stand-in: notebooks ask whether it is there."""\n\noutput = None\n')


def pip(python: Path, *arguments: str) -> None:
    """Call the environment's pip."""
    subprocess.run([python, "-m", "pip", "--quiet", *arguments], check=True)


def make_copies(notebooks: list[Path], folder: Path) -> list[Path]:
    """Write the copies, which install the library from the last commit here."""
    commit = git(ROOT, "rev-parse", "HEAD")
    if not commit:
        sys.exit("The copies install the library from a commit: this must be a git checkout.")
    if git(ROOT, "status", "--porcelain", "mha_lib", "pyproject.toml"):
        print("The library has changes that are not committed; they are not tested here.")
    options = ["--address", ROOT.as_uri(), "--commit", commit, "--out", str(folder)]
    command = [sys.executable, str(ROOT / "tools" / "colab_copies.py"), *options]
    subprocess.run([*command, *map(str, notebooks)], check=True)
    return [folder / notebook.name for notebook in notebooks]


def without_install(copy: Path, folder: Path) -> Path:
    """Write the copy once more, without the cell that installs the library."""
    notebook = nbformat.read(copy, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if cell.id != INSTALL_ID]
    nbformat.write(notebook, folder / copy.name)
    return folder / copy.name


def run_alone(python: Path, notebook: Path) -> subprocess.CompletedProcess[str]:
    """Copy the notebook into an empty folder and execute it there, in a kernel that has google.colab imported."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as settings:
        profile = Path(settings, "profile_default")
        profile.mkdir()
        (profile / "ipython_kernel_config.py").write_text(KERNEL)
        copy = shutil.copy(notebook, folder)
        command = [str(python), str(ROOT / "tools" / "notebook.py"), copy]
        environ = {**os.environ, "IPYTHONDIR": settings}
        return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True)


def forget_library(python: Path) -> None:
    """Uninstall the library where it is installed."""
    pip(python, "--quiet", "uninstall", "--yes", "mha-lib")


def can_run(python: Path, copy: Path) -> bool:
    """Whether the environment has Triton, which CPU builds of torch do not bring, or the copy does without."""
    if "import triton" not in copy.read_text(encoding="utf-8"):
        return True
    return not subprocess.run([python, "-c", "import triton"], capture_output=True).returncode


def run_copies(python: Path, copies: list[Path], folder: Path) -> int:
    """Return the number of copies that did not run, after one that must not run."""
    importing = next(
        path for path in copies if "from mha_lib import" in path.read_text(encoding="utf-8")
    )
    forget_library(python)
    if WITHOUT not in run_alone(python, without_install(importing, folder)).stderr:
        sys.exit(f"{importing.name} should have failed without its first cell")
    print(f"{importing.name}: fails without its first cell, as it should", flush=True)

    runnable = [copy for copy in copies if can_run(python, copy)]
    left_out = [copy.name for copy in copies if copy not in runnable]
    print(*(f"{name}: left out, there is no Triton here\n" for name in left_out), sep="", end="")
    failures = 0
    for copy in runnable:
        forget_library(python)
        result = run_alone(python, copy)
        failures += bool(result.returncode)
        print(f"{copy.name}: {'failed' if result.returncode else 'runs alone'}", flush=True)
        print(result.stderr if result.returncode else "", end="")
    forget_library(python)
    print(f"{len(runnable) - failures} passed, {failures} failed")
    return failures


def main(arguments: list[str]) -> int:
    """Return the number of notebooks whose copies did not run."""
    here = "--here" in arguments
    python = Path(sys.executable) if here else prepare()
    notebooks = [Path(argument) for argument in arguments if argument != "--here"]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as broken:
        return run_copies(python, make_copies(notebooks, Path(folder)), Path(broken))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
