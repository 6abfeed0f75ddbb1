"""The version of the program: release, commit, Python and the libraries that matter. Imports none
of them.
"""

import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

from specl import __version__

LIBRARIES = ("mlx", "mlx-lm", "pyzmq", "msgpack", "sqlalchemy", "click", "structlog")


def lines() -> list[str]:
    """The three lines of `--version`."""
    revision = commit()
    libraries = ", ".join(f"{name} {_version(name)}" for name in LIBRARIES)
    return [
        f"specl-ctl {__version__}" + (f" ({revision})" if revision else ""),
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        libraries,
    ]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def commit() -> str:
    """The commit of the checkout that runs, or of the repository it was installed from; empty if
    neither is known.
    """
    root = Path(__file__).resolve().parent.parent
    if (root / ".git").exists():
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        changed = "" if _git(root, "status", "--porcelain", "--untracked-files=no") == "" else ", changed"
        return f"commit {head}{changed}" if head else ""
    try:
        origin = json.loads(distribution("speclora").read_text("direct_url.json") or "{}")
        return f"commit {origin['vcs_info']['commit_id'][:12]}"
    except (PackageNotFoundError, ValueError, KeyError):
        return ""


def _git(root: Path, *arguments: str) -> str | None:
    try:
        process = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return process.stdout.strip() if process.returncode == 0 else None
