"""A Sphinx extension: a button that opens a chapter in Colab, its measured run time, a preview for links.

Button and preview are there only if the repository is known. The scripts of thebe, which the pages do not use and the
theme writes twice, are left out.
"""

from __future__ import annotations

import html
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.config import Config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tools.repository import origin, repository

COPIES = "https://colab.research.google.com/github/{repository}/blob/gh-pages/colab/{notebook}"
PICTURE = "https://raw.githubusercontent.com/{repository}/gh-pages/_static/social.png"


def find_repository(app: Sphinx, config: Config) -> None:
    """Keep the repository as a setting, so that pages are written anew when it changes."""
    config.book_repository = repository(os.environ, origin(Path(app.srcdir)))


def add_colab_button(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object
) -> None:
    """Lead from a page that was a notebook to its copy in Colab."""
    source = Path(app.env.doc2path(page, base=False))
    if not app.config.book_repository or source.suffix != ".ipynb" or source.parent != Path("book"):
        return
    button = {
        "type": "link",
        "url": COPIES.format(repository=app.config.book_repository, notebook=source.name),
        "text": '<span class="d-none d-sm-inline">Open in </span>Colab',  # a phone has no room
        "tooltip": "Open in Colab",
        "label": "colab-button",
        "classes": "fs-6 my-auto text-nowrap",
    }
    context["header_buttons"].insert(0, button)


def add_preview(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object
) -> None:
    """Tell others what to show beside a link to the page: its title and the book's picture."""
    if not app.config.book_repository:
        return
    shown = {
        "og:type": "article",
        "og:title": re.sub("<[^>]*>", "", context.get("title", "")) or app.config.html_title,
        "og:site_name": app.config.html_title,
        "og:image": PICTURE.format(repository=app.config.book_repository),
    }
    context["metatags"] = context.get("metatags", "") + "".join(
        f'\n<meta property="{name}" content="{html.escape(html.unescape(text))}" />'
        for name, text in shown.items()
    )


def add_run_time(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object
) -> None:
    """Say below the title of a notebook how long it ran when that was measured last, and on what."""
    measured, on_gpu = [], False
    for path in sorted(Path(app.srcdir, "benchmarks", "run_times").glob("*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        facts, seconds = results["provenance"], results["seconds"].get(Path(page).name)
        if seconds is not None:
            on_gpu |= facts["gpu"] is not None
            machine = facts["gpu"] or f"{facts['cpu']}, {facts['cores']} cores"
            measured.append(f"{seconds} s on {html.escape(machine)}")
    if measured:
        measured += [] if on_gpu else ["not measured on a GPU yet"]
        line = f'<p class="run-time">Measured run time: {"; ".join(measured)}.</p>'
        context["body"] = context["body"].replace("</h1>", f"</h1>\n{line}", 1)


def drop_thebe(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object
) -> None:
    """Keep the page's other scripts."""
    context["script_files"] = [script for script in context["script_files"] if not is_thebe(script)]


def is_thebe(script: Any) -> bool:
    """Whether a script of the page, with its text or its address, belongs to thebe."""
    return "thebe" in f"{script.filename} {script.attributes.get('body')}".lower()


def setup(app: Sphinx) -> dict[str, bool]:
    """Tell Sphinx."""
    app.add_config_value("book_repository", None, "html")
    app.connect("config-inited", find_repository)
    app.connect("html-page-context", add_colab_button, priority=900)
    app.connect("html-page-context", add_preview, priority=900)
    app.connect("html-page-context", add_run_time, priority=900)
    app.connect("html-page-context", drop_thebe, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
