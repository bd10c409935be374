"""The built pages: a strict build, and no page that loads anything from elsewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

LOADED = {
    "audio": {"src"},
    "embed": {"src"},
    "iframe": {"src"},
    "image": {"href", "xlink:href"},
    "img": {"src", "srcset"},
    "input": {"src"},
    "object": {"data"},
    "script": {"src"},
    "source": {"src", "srcset"},
    "track": {"src"},
    "use": {"href", "xlink:href"},
    "video": {"src", "poster"},
}
NOT_LOADED_LINKS = {"alternate", "author", "canonical", "help", "license", "next", "prev", "search"}
REMOTE = re.compile(r"(?:https?:|wss?:)?//[\w.-]+\.\w")
STYLE_URL = re.compile(r"(?:url\(|@import)\s*[\"']?((?:https?:)?//[^\"')\s]+)")
SCRIPT_URL = re.compile(r"[\"'`](?:https?:)?//[\w.-]+\.\w[^\"'`\s]*[\"'`]")
FETCH = re.compile(
    r"(?:\bfetch|\bimport|\bimportScripts|\.src\s*=|\bfrom)\s*\(?\s*" + SCRIPT_URL.pattern
)
THEBE = '"https://unpkg.com/thebe@'
"""A constant of the theme; it is fetched when a reader presses a button that these pages do not have."""
THEBE_BUTTON = "thebe-launch-button"


def build_book(source: Path, output: Path) -> subprocess.CompletedProcess[str]:
    """Build the pages as ``make book`` does, under ``output``."""
    program = str(Path(sys.executable).with_name("jupyter-book"))
    strict = ["build", "--builder", "html", "-W", "-n", "--keep-going"]
    places = ["--path-output", str(output), str(source)]
    return subprocess.run([program, *strict, *places], capture_output=True, text=True)


class AssetFinder(HTMLParser):
    """Collects what a browser fetches when it opens a page."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[str] = []
        self.inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Look at the attributes that name a file."""
        values = {name: value or "" for name, value in attrs}
        self.inside = tag if tag in ("script", "style") else ""
        names = LOADED.get(tag, set())
        if tag == "link" and not set(values.get("rel", "").lower().split()) <= NOT_LOADED_LINKS:
            names = {"href"}
        self.found += [
            f"<{tag} {name}> {values[name]}"
            for name in sorted(names & values.keys())
            if any(map(REMOTE.match, addresses(name, values[name])))
        ]
        self.found += [
            f"style of <{tag}> {url}" for url in STYLE_URL.findall(values.get("style", ""))
        ]
        if THEBE_BUTTON in values.get("class", ""):
            self.found.append(f"<{tag}> would load thebe")

    def handle_endtag(self, tag: str) -> None:
        """Leave a script or style."""
        self.inside = ""

    def handle_data(self, data: str) -> None:
        """Look into styles and into the configuration that scripts on the page hold."""
        if self.inside == "style":
            self.found += [f"<style> {url}" for url in STYLE_URL.findall(data)]
        if self.inside == "script":
            urls = [found[0] for found in SCRIPT_URL.finditer(data)]
            self.found += [f"<script> {url}" for url in urls if not url.startswith(THEBE)]


def addresses(attribute: str, value: str) -> list[str]:
    """The addresses in an attribute: several, with their sizes, in a srcset."""
    return [part.strip() for part in value.split(",")] if attribute == "srcset" else [value.strip()]


def remote_assets(site: Path) -> list[str]:
    """Everything that the pages under ``site`` load from another server."""
    pages = [path for suffix in ("html", "svg") for path in sorted(site.rglob(f"*.{suffix}"))]
    if not pages:
        return [f"no pages under {site.name}"]
    return [f"{path.relative_to(site)}: {found}" for path, found in assets_of(site, pages)]


def assets_of(site: Path, pages: list[Path]) -> Iterator[tuple[Path, str]]:
    """What pages, style sheets and scripts load from another server."""
    for page in pages:
        finder = AssetFinder()
        finder.feed(page.read_text(encoding="utf-8"))
        yield from ((page, found) for found in finder.found)
    for sheet in sorted(site.rglob("*.css")):
        yield from ((sheet, url) for url in STYLE_URL.findall(sheet.read_text(encoding="utf-8")))
    for script in sorted(site.rglob("*.js")):
        yield from (
            (script, found[0]) for found in FETCH.finditer(script.read_text(encoding="utf-8"))
        )
