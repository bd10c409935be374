"""Colab: which repository the book belongs to, the copies of the notebooks, and the button that leads to them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tests import site_checks
from tests.support import ROOT
from tools import colab
from tools.colab_copies import INSTALL_ID, colab_copy, main
from tools.notebook import clean
from tools.repository import origin, repository

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ADDRESS = "https://github.com/somebody/their-book"
OFFLINE = ["--no-deps", "--no-build-isolation", "--ignore-installed"]
"""Options of pip with which nothing comes from a registry and no other environment is touched."""


@pytest.mark.parametrize(
    "remote",
    [
        "https://github.com/somebody/their-book",
        "https://github.com/somebody/their-book.git",
        "https://github.com/somebody/their-book/",
        "https://GitHub.com/somebody/their-book.git",
        "https://token@github.com/somebody/their-book.git",
        "https://user:word@github.com/somebody/their-book",
        "ssh://git@github.com/somebody/their-book.git",
        "ssh://git@github.com:22/somebody/their-book",
        "ssh://git@ssh.github.com:443/somebody/their-book.git",
        "git@github.com:somebody/their-book.git",
        "git@github.com:somebody/their-book",
    ],
)
def test_a_remote_on_github_names_the_repository(remote: str) -> None:
    assert repository({}, remote) == "somebody/their-book"


@pytest.mark.parametrize(
    "remote",
    [
        None,
        "",
        "/srv/git/their-book.git",
        "file:///srv/github.com/somebody/their-book",
        "https://gitlab.com/somebody/their-book.git",
        "https://github.com.example.org/somebody/their-book",
        "https://example.org/github.com/somebody/their-book",
        "https://github.com@example.org/somebody/their-book",
        "git@example.org:somebody/their-book.git",
        "https://github.com/somebody",
        "https://github.com/somebody/their-book/tree/main",
        "https://github.com/somebody/..",
        'https://github.com/somebody/"onclick=',
        "https://github.com/some_body/their-book",
        "https://github.com/somebody/their-book\nx",
    ],
)
def test_other_remotes_name_no_repository(remote: str | None) -> None:
    assert repository({}, remote) is None


def test_dots_belong_to_the_name() -> None:
    assert repository({}, "git@github.com:me/me.github.io.git") == "me/me.github.io"


def test_the_workflow_knows_better_than_the_remote() -> None:
    environ = {"GITHUB_REPOSITORY": "me/mine"}
    assert repository(environ, ADDRESS) == "me/mine"
    assert repository({"GITHUB_REPOSITORY": ""}, ADDRESS) == "somebody/their-book"
    assert repository({**environ, "GITHUB_SERVER_URL": "https://github.com"}, None) == "me/mine"


@pytest.mark.parametrize("name", ["mine", "me/mine/x", "me/<b>", "/mine", "me/..", "me/mine\n"])
def test_what_the_workflow_says_is_checked(name: str) -> None:
    assert repository({"GITHUB_REPOSITORY": name}, ADDRESS) is None


def test_colab_does_not_open_other_servers() -> None:
    environ = {"GITHUB_REPOSITORY": "me/mine", "GITHUB_SERVER_URL": "https://git.example.org"}
    assert repository(environ, None) is None


def git(folder: Path, *arguments: str) -> str:
    settings = ["user.name=A", "user.email=a@example.org", "commit.gpgsign=false"]
    options = [word for setting in settings for word in ("-c", setting)]
    command = ["git", *options, "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_remote_is_that_of_the_checkout_itself(tmp_path: Path) -> None:
    assert origin(tmp_path) is None
    git(tmp_path, "init", "--quiet")
    assert origin(tmp_path) is None
    git(tmp_path, "remote", "add", "origin", ADDRESS)
    assert origin(tmp_path) == ADDRESS
    (tmp_path / "inside").mkdir()
    assert origin(tmp_path / "inside") is None


def page(*sources: str) -> Any:
    """A notebook with its outputs."""
    printed = new_output("stream", name="stdout", text="42\n")
    cells = [
        new_code_cell(source, execution_count=n, outputs=[printed])
        for n, source in enumerate(sources, start=1)
    ]
    return clean(new_notebook(cells=[new_markdown_cell("# A page"), *cells]))


def test_a_copy_installs_the_library_and_changes_nothing_else() -> None:
    notebook = page("print(42)")
    before = nbformat.writes(notebook)
    copy = colab_copy(notebook, ADDRESS, COMMIT)
    install, *others = copy.cells
    assert install.source.splitlines() == [
        "#@title Install mha_lib",
        f"%pip install --quiet git+{ADDRESS}@{COMMIT}",
    ]
    assert install.metadata == {"cellView": "form"}
    assert install.outputs == []
    assert others == notebook.cells
    assert copy.metadata == {
        **notebook.metadata,
        "accelerator": "GPU",
        "colab": {"gpuType": "T4", "provenance": []},
    }
    assert nbformat.writes(notebook) == before
    assert nbformat.writes(colab_copy(notebook, ADDRESS, COMMIT)) == nbformat.writes(copy)


def test_every_notebook_has_a_valid_copy(tmp_path: Path) -> None:
    notebooks = sorted((ROOT / "book").glob("*.ipynb"))
    options = ["--address", f"{ADDRESS}/", "--commit", COMMIT, "--out", str(tmp_path / "a" / "b")]
    main([*options, "--pip=--no-deps", *map(str, notebooks)])
    for notebook in notebooks:
        copy = nbformat.read(tmp_path / "a" / "b" / notebook.name, as_version=4)
        nbformat.validate(copy)
        assert copy.cells[0].source.endswith(f"--quiet --no-deps git+{ADDRESS}@{COMMIT}")
        assert copy.cells[1:] == nbformat.read(notebook, as_version=4).cells
        ids = [cell.id for cell in copy.cells]
        assert ids[0] == INSTALL_ID
        assert len(ids) == len(set(ids))


def test_without_an_address_the_repository_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GITHUB_SERVER_URL", raising=False)
    monkeypatch.setenv("GITHUB_REPOSITORY", "me/mine")
    main(["--commit", COMMIT, "--out", str(tmp_path), str(ROOT / "book" / "your_turn_01.ipynb")])
    copy = (tmp_path / "your_turn_01.ipynb").read_text(encoding="utf-8")
    assert f"git+https://github.com/me/mine@{COMMIT}" in copy


NOTEBOOK = str(ROOT / "book" / "your_turn_01.ipynb")
REFUSED = {
    "--address": ["--address", "git@github.com:me/mine", "--commit", COMMIT, NOTEBOOK],
    "--address: ": ["--address", "https://x.org/a;b", "--commit", COMMIT, NOTEBOOK],
    "--commit": ["--address", ADDRESS, "--commit", "main", NOTEBOOK],
    "--commit: ": ["--address", ADDRESS, "--commit", COMMIT[:7], NOTEBOOK],
    "--pip": ["--address", ADDRESS, "--commit", COMMIT, "--pip=--x $(y)", NOTEBOOK],
    "notebooks": ["--address", ADDRESS, "--commit", COMMIT, "book/none.ipynb"],
    "notebooks: ": ["--address", ADDRESS, "--commit", COMMIT, NOTEBOOK, NOTEBOOK],
    "--address: the repository is not known": ["--commit", COMMIT, NOTEBOOK],
}


@pytest.mark.parametrize("named", REFUSED)
def test_refusals_name_the_argument(
    named: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GITHUB_REPOSITORY", "unusable")
    with pytest.raises(SystemExit):
        main([*REFUSED[named], "--out", str(tmp_path / "out")])
    assert f"error: argument {named}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def small_book(folder: Path) -> Path:
    """A book of one text page and one notebook, with the settings of the real one."""
    for part in ("tools", "book/_static"):
        shutil.copytree(ROOT / part, folder / part)
    for name in ("_config.yml", "book/references.bib"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "_toc.yml").write_text(
        "format: jb-book\nroot: book/index\nchapters:\n  - file: book/page\n"
    )
    (folder / "book" / "index.md").write_text("# First page\n\nText.\n")
    nbformat.write(page("print(42)"), folder / "book" / "page.ipynb")
    return folder


def built(source: Path, output: Path) -> dict[str, bytes]:
    """Build the book and return its pages, without the checksums that a second build adds to style sheets."""
    done = site_checks.build_book(source, output)
    assert done.returncode == 0, done.stderr
    html = output / "_build" / "html"
    return {
        path.relative_to(html).as_posix(): re.sub(rb"\?v=\w+", b"", path.read_bytes())
        for path in html.rglob("*.html")
    }


def test_the_button_is_there_if_the_repository_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = small_book(tmp_path / "source"), tmp_path / "out"
    monkeypatch.delenv("GITHUB_SERVER_URL", raising=False)
    monkeypatch.delenv("GITHUB_REPOSITORY", raising=False)
    without = built(source, output)
    assert not any(b"colab" in text for text in without.values())
    assert b'href="../_sources/book/page.ipynb"' in without["book/page.html"]

    monkeypatch.setenv("GITHUB_REPOSITORY", "somebody/their-book")
    known = built(source, output)
    link, *more = re.findall(r"<a\b[^>]*colab.*?</a>", known["book/page.html"].decode(), re.DOTALL)
    assert not more
    address = "https://colab.research.google.com/github/somebody/their-book/blob/gh-pages/colab"
    assert f'href="{address}/page.ipynb"' in link
    assert " ".join(re.sub("<[^>]*>", " ", link).split()) == "Open in Colab"
    assert 'title="Open in Colab"' in link
    assert b"btn-download-source-button" in known["book/page.html"]
    assert {name for name, text in known.items() if b"colab" in text} == {"book/page.html"}
    assert site_checks.remote_assets(output / "_build" / "html") == []
    picture = b"https://raw.githubusercontent.com/somebody/their-book/gh-pages/_static/social.png"
    assert all(picture in text for name, text in known.items() if name.startswith("book/"))
    assert not any(b"og:image" in text for text in without.values())

    monkeypatch.delenv("GITHUB_REPOSITORY")
    assert built(source, output) == without


def environment_without_library(folder: Path) -> Path:
    """An environment with this one's packages, but not the library, and with a stand-in for google.colab."""
    venv.create(folder)
    python = colab.program(folder)
    own = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    command = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    Path(packages, "shared.pth").write_text("\n".join(sorted(own)))
    colab.stand_in(python)
    return python


def library_as_repository(folder: Path) -> str:
    """Commit the library as it is here into a repository of its own, and return the commit."""
    shutil.copytree(ROOT / "mha_lib", folder / "mha_lib")
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder / name)
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "The library")
    return git(folder, "rev-parse", "HEAD")


def test_a_copy_runs_alone_and_not_without_its_first_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTHONPATH", "PYTHONSTARTUP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    python = environment_without_library(tmp_path / "environment")
    commit = library_as_repository(tmp_path / "library")
    notebook = nbformat.read(ROOT / "book" / "01_query_key_value.ipynb", as_version=4)
    seen = tmp_path / "seen"
    told = f"open({str(seen)!r}, 'w').write(mha_lib.__file__)"
    asked = "import sys, mha_lib\nassert 'google.colab' in sys.modules\n"
    notebook.cells.append(new_code_cell(asked + told, id="asked"))
    copy = colab_copy(notebook, (tmp_path / "library").as_uri(), commit, OFFLINE)
    path = tmp_path / "01_query_key_value.ipynb"
    nbformat.write(copy, path)

    (tmp_path / "broken").mkdir()
    broken = colab.run_alone(python, colab.without_install(path, tmp_path / "broken"))
    assert broken.returncode
    assert colab.WITHOUT in broken.stderr
    assert not seen.exists()

    whole = colab.run_alone(python, path)
    assert whole.returncode == 0, whole.stderr
    assert (tmp_path / "environment").resolve() in Path(seen.read_text()).resolve().parents


WORKFLOWS = {
    path.stem: yaml.safe_load(path.read_text(encoding="utf-8"))
    for path in (ROOT / ".github" / "workflows").glob("*.yml")
}


def test_the_published_branch_is_where_the_buttons_lead(tmp_path: Path) -> None:
    """The steps of the workflow itself, with a folder in place of GitHub."""
    if not shutil.which("bash"):
        pytest.skip("needs bash")
    steps = {step.get("name"): step for step in WORKFLOWS["publish"]["jobs"]["build"]["steps"]}
    hub, checkout = tmp_path / "hub", tmp_path / "checkout"
    (checkout / "book").mkdir(parents=True)
    git(tmp_path, "init", "--quiet", "--bare", str(hub))
    git(checkout, "init", "--quiet")
    git(checkout, "remote", "add", "origin", str(hub))
    shutil.copytree(ROOT / "tools", checkout / "tools")
    nbformat.write(page("print(42)"), checkout / "book" / "page.ipynb")
    (checkout / ".gitignore").write_text("_build/\n")
    git(checkout, "add", "--all")
    git(checkout, "commit", "--quiet", "--message", "The book")
    commit = git(checkout, "rev-parse", "HEAD")
    html = checkout / "_build" / "html"
    html.mkdir(parents=True)
    (html / "index.html").write_text("A page.")
    for name in ("Write the copies for Colab", "Push pages and copies to the branch gh-pages"):
        script = steps[name]["run"].replace(
            ".venv/bin/python", f'"{Path(sys.executable).as_posix()}"'
        )
        environ = {
            **os.environ,
            "GITHUB_SERVER_URL": "https://github.com",
            "GITHUB_REPOSITORY": "me/mine",
            "GITHUB_SHA": commit,
            "GITHUB_ACTOR": "me",
            "RUNNER_TEMP": str(tmp_path),
        }
        command = ["bash", "-e", "-o", "pipefail", "-c", script]
        done = subprocess.run(command, cwd=checkout, env=environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (tmp_path / "index").unlink(missing_ok=True)
    assert git(hub, "ls-tree", "-r", "--name-only", "gh-pages").splitlines() == [
        ".nojekyll",
        "colab/page.ipynb",
        "index.html",
    ]
    copy = git(hub, "show", "gh-pages:colab/page.ipynb")
    assert f"git+https://github.com/me/mine@{commit}" in copy
    assert git(checkout, "status", "--porcelain") == ""


def test_no_workflow_names_an_owner() -> None:
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / ".github").rglob("*.yml")]
    assert not any(re.search(r"github\.com/\w|github\.io", text) for text in texts)
