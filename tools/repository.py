"""Which repository on GitHub this checkout belongs to. It is told or it is unknown; nothing is guessed."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

GITHUB = "https://github.com"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,38}/(?!\.{1,2}$)[A-Za-z0-9._-]{1,100}")
REMOTE = re.compile(
    r"(?:(?:https?|ssh|git)://(?:[^@/\s]+@)?(?:ssh\.)?github\.com(?::\d+)?/|[^@/\s]+@github\.com:)"
    r"(?P<name>[^/\s]+/[^/\s]+?)(?:\.git)?/?",
    re.IGNORECASE,
)


def repository(environ: Mapping[str, str], remote_url: str | None) -> str | None:
    """Return OWNER/NAME on github.com from GITHUB_REPOSITORY or else from the address of a git remote, or None."""
    if name := environ.get("GITHUB_REPOSITORY"):
        elsewhere = environ.get("GITHUB_SERVER_URL", GITHUB) != GITHUB
        return name if NAME.fullmatch(name) and not elsewhere else None
    found = REMOTE.fullmatch(remote_url or "")
    return found["name"] if found and NAME.fullmatch(found["name"]) else None


def origin(folder: Path) -> str | None:
    """Return the address of the remote ``origin``, if ``folder`` is the top of a git checkout that has one."""
    top = git(folder, "rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() != folder.resolve():
        return None
    return git(folder, "remote", "get-url", "origin")


def git(folder: Path, *arguments: str) -> str | None:
    """Return what git prints about ``folder``, or None where it fails or is not installed."""
    try:
        done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
