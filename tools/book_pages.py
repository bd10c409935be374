"""A Sphinx extension: leaves out the scripts of thebe, which these pages do not use and the theme writes twice."""

from __future__ import annotations

from typing import Any

from sphinx.application import Sphinx


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
    app.connect("html-page-context", drop_thebe, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
