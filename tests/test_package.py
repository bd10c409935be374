"""The package as an importing project meets it: what it imports, exports, documents and ships."""

from __future__ import annotations

import ast
import email
import importlib
import inspect
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import mha_lib
from tests.support import ROOT

PACKAGE = ROOT / "mha_lib"
MODULES = {path.stem: path for path in sorted(PACKAGE.glob("*.py")) if path.stem != "__init__"}
PUBLIC_API = {
    *("attention", "reference_attention", "AttentionOutput"),
    *("choose_backend", "BackendChoice"),
    *("causal_mask", "padding_mask", "sliding_window_mask", "document_mask", "alibi_bias"),
    *("split_heads", "merge_heads"),
    *("SimpleMultiHeadAttention", "SplitMultiHeadAttention", "MultiHeadAttention"),
    *("RotaryEmbedding", "KVCache", "diagnose", "plot_attention", "convert"),
    *("explore_attention", "explore_split"),
}

LEAVES = {"reference", "masks", "heads", "rotary", "cache", "tiled", "local", "triton_kernel"}
ON_TOP = {"convert", "doctor", "plot", "explore", "explore_split"}
CLINIC = {"patient", "recognise", "mistakes", "hints"}
"""What the doctor is made of."""

MAY_IMPORT = {
    **dict.fromkeys(LEAVES, LEAVES),
    "simple": {"reference", "masks", "heads"},
    "split": {"reference", "masks", "heads", "simple"},
    "attention": LEAVES,
    "multihead": LEAVES | {"attention"},
    **{key: set() for key in ("patient", "recognise", "hints")},
    "mistakes": {"masks", "recognise"},
    **dict.fromkeys(ON_TOP, MODULES.keys() | ON_TOP),
    "_checks": set(),
}
FOREIGN = {"torch", "einops"}
MORE_FOREIGN = {"triton_kernel": {"triton"}}
"""Imported when its backend is asked for, and by nobody else."""

NOT_CORE = {"doctor", "convert", "plot", "explore", "explore_split", "triton_kernel"} | CLINIC
NOT_CORE |= {"_checks", "__init__"}
"""What the design leaves out of the core, the argument checks, which are not in the book, and the list of names."""

CORE_LINES, ALL_LINES = 1300, 3100
"""Lines of code, that is without docstrings, empty lines and overloads: an afternoon's reading.

Of all lines, about 370 are ``convert`` and 750 the argument checks.
"""

DOCTOR_LINES = 2350
"""The doctor stands beside the library: nobody needs it to read or to use attention."""


def python(code: str) -> str:
    """The output of a program run by a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.anchor, check=True
    )
    return done.stdout.strip()


def test_import_is_silent_and_brings_in_neither_matplotlib_nor_triton() -> None:
    code = (
        "import sys, warnings; warnings.simplefilter('error'); import mha_lib\n"
        "print([name for name in ('matplotlib', 'triton') if name in sys.modules])"
    )
    assert python(code) == "[]"


def test_only_plotting_needs_matplotlib() -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import torch, mha_lib\n"
        "print(mha_lib.SimpleMultiHeadAttention(4, 2)(torch.zeros(1, 2, 4)).shape)\n"
        "try: mha_lib.plot_attention(torch.eye(2), ['a', 'b'])\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    shape, error = python(code).splitlines()
    assert shape == "torch.Size([1, 2, 4])"
    assert "matplotlib" in error


def test_all_is_the_public_api_as_far_as_it_exists() -> None:
    defined = {node.name for path in MODULES.values() for node in definitions(path)}
    exists = PUBLIC_API & (defined | ({"convert"} & MODULES.keys()))
    assert set(mha_lib.__all__) == exists
    assert len(mha_lib.__all__) == len(set(mha_lib.__all__))
    assert all(hasattr(mha_lib, name) for name in mha_lib.__all__)


def definitions(path: Path) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node


def module_level_imports(path: Path) -> Iterator[str]:
    """The modules that run when this one is imported; neither typing blocks nor function bodies."""
    yield from imports_run_by(ast.parse(path.read_text(encoding="utf-8")))


def imports_run_by(node: ast.AST) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield f"{'.' * child.level}{child.module}"
        elif not isinstance(child, ast.FunctionDef) and not is_for_types(child):
            yield from imports_run_by(child)


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def own_imports(name: str) -> set[str]:
    return {
        module.removeprefix("mha_lib.")
        for module in module_level_imports(MODULES[name])
        if module.split(".")[0] == "mha_lib"
    }


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_what_lies_below_it(name: str) -> None:
    assert own_imports(name) <= MAY_IMPORT[name] | {"_checks"}


@pytest.mark.parametrize("name", MODULES)
def test_modules_import_only_torch_and_einops(name: str) -> None:
    roots = {module.split(".")[0] for module in module_level_imports(MODULES[name])}
    assert roots - {"mha_lib"} - sys.stdlib_module_names <= FOREIGN | MORE_FOREIGN.get(name, set())


def test_imports_have_no_cycle() -> None:
    below: dict[str, set[str]] = {}

    def reach(name: str, path: tuple[str, ...]) -> set[str]:
        assert name not in path, f"{' -> '.join(path)} -> {name}"
        if name not in below:
            below[name] = set().union(*(reach(other, (*path, name)) for other in own_imports(name)))
        return below[name] | {name}

    for name in MODULES:
        reach(name, ())


def lines_of_code(path: Path) -> int:
    text = path.read_text(encoding="utf-8")
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_overload = isinstance(node, ast.FunctionDef) and any(
            ast.unparse(decorator) == "overload" for decorator in node.decorator_list
        )
        if is_text or is_overload:
            assert isinstance(node, ast.Expr | ast.FunctionDef)
            left_out.update(range(node.lineno - is_overload, (node.end_lineno or 0) + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(bool(line.strip()) and number not in left_out for number, line in lines)


def test_line_budget() -> None:
    lines = {path.stem: lines_of_code(path) for path in PACKAGE.glob("*.py")}
    assert sum(count for name, count in lines.items() if name not in NOT_CORE) <= CORE_LINES
    doctor = sum(lines.pop(name) for name in (*CLINIC, "doctor"))
    assert sum(lines.values()) <= ALL_LINES
    assert doctor <= DOCTOR_LINES


PUBLIC: dict[str, Any] = {name: getattr(mha_lib, name) for name in mha_lib.__all__}
PUBLIC |= {
    f"convert.{name}": value
    for name, value in vars(mha_lib.convert).items()
    if inspect.isfunction(value)
    and value.__module__ == "mha_lib.convert"
    and not name.startswith("_")
}
FUNCTIONS = {name: value for name, value in PUBLIC.items() if inspect.isfunction(value)}
CLASSES = {name: value for name, value in PUBLIC.items() if inspect.isclass(value)}
BUILT: dict[str, Any] = {
    name: value
    for name, value in {**FUNCTIONS, **CLASSES}.items()
    if value not in (mha_lib.AttentionOutput, mha_lib.BackendChoice)
}


def sections(doc: str) -> dict[str, str]:
    """The text under each Google-style heading of a docstring; the summary is under ''."""
    found, current = {"": ""}, ""
    for line in doc.splitlines():
        if line.rstrip(":") in ("Args", "Returns", "Raises", "Attributes", "Example"):
            current = line.rstrip(":")
            found[current] = ""
        else:
            found[current] += line + "\n"
    return found


def doc_of(value: object) -> dict[str, str]:
    doc = inspect.getdoc(value)
    assert doc
    return sections(doc)


@pytest.mark.parametrize("name", PUBLIC)
def test_docstrings_open_with_one_sentence(name: str) -> None:
    first = doc_of(PUBLIC[name])[""].splitlines()[0]
    assert first.endswith(".")


@pytest.mark.parametrize("name", BUILT)
def test_docstrings_explain_each_argument(name: str) -> None:
    documented = doc_of(BUILT[name])["Args"]
    for parameter in inspect.signature(BUILT[name]).parameters.values():
        assert f"\n{parameter.name}: " in f"\n{inspect.cleandoc(documented)}"


def tensor_arguments(function: Callable[..., object]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    annotations = {p.name: str(p.annotation) for p in parameters}
    return [n for n, kind in annotations.items() if "Tensor" in kind and "Mapping" not in kind]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstrings_give_shapes(name: str) -> None:
    doc = doc_of(FUNCTIONS[name])
    explained = inspect.cleandoc(doc["Args"]).replace("\n    ", " ").splitlines()
    by_name = dict(line.split(": ", 1) for line in explained if ": " in line)
    for argument in tensor_arguments(FUNCTIONS[name]):
        text = by_name[argument]
        assert ("``(" in text) or "As in :func:" in text, argument
    if "Tensor" in str(inspect.signature(FUNCTIONS[name]).return_annotation):
        assert "``(" in doc["Returns"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstrings_say_what_comes_back(name: str) -> None:
    doc = doc_of(FUNCTIONS[name])
    assert doc.get("Returns", "").strip() or name == "convert.register_transformers"


@pytest.mark.parametrize("name", BUILT)
def test_docstrings_say_what_is_raised(name: str) -> None:
    raised = doc_of(BUILT[name])["Raises"]
    assert "TypeError: " in raised
    assert "ValueError: " in raised


@pytest.mark.parametrize("name", BUILT)
def test_docstrings_have_an_example_and_a_chapter(name: str) -> None:
    doc = inspect.getdoc(BUILT[name])
    assert doc is not None
    assert ">>> " in sections(doc)["Example"]
    home = inspect.getdoc(inspect.getmodule(BUILT[name]))
    assert "chapter " in doc + str(home)


def public_methods() -> list[Callable[..., object]]:
    return [
        method
        for owner in CLASSES.values()
        for name, method in vars(owner).items()
        if inspect.isfunction(method) and not name.startswith("_")
    ]


@pytest.mark.parametrize("method", public_methods(), ids=lambda method: str(method.__qualname__))
def test_methods_explain_their_arguments_or_say_where(method: Callable[..., object]) -> None:
    doc = doc_of(method)
    names = [name for name in inspect.signature(method).parameters if name != "self"]
    elsewhere = "arguments and result as in ``SimpleMultiHeadAttention``" in doc[""]
    if names and not elsewhere:
        assert all(f"{name}: " in doc["Args"] for name in names)
        assert inspect.signature(method).return_annotation == "None" or doc["Returns"].strip()
        assert doc["Raises"].strip()
    if "raise " in inspect.getsource(method):
        assert doc["Raises"].strip()


def test_modules_have_docstrings() -> None:
    for name in MODULES:
        assert inspect.getdoc(importlib.import_module(f"mha_lib.{name}"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist, built from a copy of the checkout."""
    copy = tmp_path_factory.mktemp("build") / "checkout"
    ignored = shutil.ignore_patterns(".*", "_build", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=ignored)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(copy / "out")]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return copy / "out"


def wheel(built: Path) -> zipfile.ZipFile:
    (path,) = built.glob("mha_lib-*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_the_library_and_nothing_else(built: Path) -> None:
    names = {name for name in wheel(built).namelist() if ".dist-info/" not in name}
    library = {f"mha_lib/{path.name}" for path in PACKAGE.glob("*.py")}
    assert names == library | {
        f"mha_lib/{name}"
        for name in ("py.typed", "book.mplstyle", "explore.html", "explore_split.html")
    }
    assert any(name.endswith("licenses/LICENSE") for name in wheel(built).namelist())


def test_the_wheel_requires_torch_and_einops_only(built: Path) -> None:
    (name,) = (name for name in wheel(built).namelist() if name.endswith("/METADATA"))
    metadata = email.message_from_bytes(wheel(built).read(name))
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert sorted(required) == ["einops>=0.8", "torch>=2.6"]
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["Version"] == mha_lib.__version__


def test_the_sdist_holds_the_library_without_tests(built: Path) -> None:
    (path,) = built.glob("mha_lib-*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"mha_lib/py.typed", "mha_lib/book.mplstyle", "LICENSE", "README.md"} <= names
    assert {f"mha_lib/{path.name}" for path in PACKAGE.glob("*.py")} <= names
    assert not any(name.startswith(("tests", "book/", "tools")) for name in names)


def test_the_citation_names_the_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {mha_lib.__version__}\n" in citation
