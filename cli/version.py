"""What exactly runs: version, commit, Python and the libraries that matter. Nothing of them is imported to tell."""

import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

from specl import __version__

LIBRARIES = ("mlx", "mlx-lm", "pyzmq", "msgpack", "sqlalchemy", "click", "structlog")


def lines() -> list[str]:
    """Three lines for `--version`."""
    made_from = commit()
    libraries = ", ".join(f"{name} {_version(name)}" for name in LIBRARIES)
    return [
        f"specl-ctl {__version__}" + (f" ({made_from})" if made_from else ""),
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        libraries,
    ]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def commit() -> str:
    """The commit of the checkout that runs, or of the repository it was installed from; empty where neither is known."""
    root = Path(__file__).resolve().parent.parent
    if (root / ".git").exists():
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        changed = "" if _git(root, "status", "--porcelain", "--untracked-files=no") == "" else ", changed"
        return f"commit {head}{changed}" if head else ""
    try:
        told = json.loads(distribution("speclora").read_text("direct_url.json") or "{}")
        return f"commit {told['vcs_info']['commit_id'][:12]}"
    except (PackageNotFoundError, ValueError, KeyError):
        return ""


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
