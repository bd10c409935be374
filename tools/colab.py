"""Run notebooks as Colab would: each alone in an empty folder, with Colab's versions, the library from a plain install.

Usage: python tools/colab.py book/01_query_key_value.ipynb [more notebooks ...]
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv-colab"
REQUIREMENTS = ROOT / "requirements-colab.txt"
DATA = Path(sys.prefix) / "share" / "mha-book"


def prepare() -> Path:
    """Make the environment without the library, and return its Python."""
    python = ENVIRONMENT / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not python.exists():
        venv.create(ENVIRONMENT, with_pip=True)
    pip(python, "install", "-r", str(REQUIREMENTS))
    pip(python, "install", "--no-deps", "-r", str(ROOT / "requirements-no-deps.txt"))
    shutil.copytree(DATA, ENVIRONMENT / "share" / DATA.name, dirs_exist_ok=True)
    pip(python, "uninstall", "--yes", "mha-lib")
    return python


def pip(python: Path, *arguments: str) -> None:
    """Call the environment's pip."""
    subprocess.run([python, "-m", "pip", "--quiet", *arguments], check=True)


def run_alone(python: Path, notebook: Path) -> subprocess.CompletedProcess[str]:
    """Copy the notebook into an empty folder and execute it there."""
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copy(notebook, folder)
        command = [str(python), str(ROOT / "tools" / "notebook.py"), copy]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def main(notebooks: list[Path]) -> int:
    """Return the number of notebooks that did not run."""
    python = prepare()
    importing = next(
        path for path in notebooks if "from mha_lib import" in path.read_text(encoding="utf-8")
    )
    if "No module named 'mha_lib'" not in run_alone(python, importing).stderr:
        sys.exit(f"{importing} should have failed without the library")
    print(f"{importing.name}: fails without the library, as it should")

    pip(python, "install", "--no-deps", str(ROOT))
    failures = 0
    for notebook in notebooks:
        result = run_alone(python, notebook)
        failures += bool(result.returncode)
        print(
            f"{notebook.name}: {'failed' if result.returncode else 'runs alone with the library'}"
        )
        print(result.stderr if result.returncode else "", end="")
    print(f"{len(notebooks) - failures} passed, {failures} failed")
    return failures


if __name__ == "__main__":
    sys.exit(main([Path(argument) for argument in sys.argv[1:]]))
