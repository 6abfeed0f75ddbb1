"""Settings for those who only ask the daemons: as they were when this very file was last read in full.

Reading settings in full loads a YAML reader and a validator, a fifth of a second that `specl-ctl status` and `ask` can do without.
What was found valid is kept as JSON in the run directory, under a hash of the file and of the program that read it; whatever does not
match is read in full, and a bad file is never remembered. The gateway's token is left out.
"""

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from specl import configs
from specl.shared.paths import Paths

if TYPE_CHECKING:
    from specl.shared.settings.schema import Settings

VALIDATOR = Path(__file__).with_name("schema.py")


def default_file() -> Path:
    """The shipped `configs/default.yaml`."""
    return Path(configs.__path__[0]) / "default.yaml"


def settings_file() -> Path:
    """The file in force: `SPECL_CONFIG`, else the shipped default."""
    named = os.environ.get("SPECL_CONFIG")
    return Path(named).expanduser() if named else default_file()


def load_cached_settings(paths: Paths) -> "Settings":
    """The settings in force, for reading: they may lack the model's methods. Raises ConfigError as `config.load` does."""
    file, memory = settings_file(), paths.run / "settings.json"
    key = _key(file)
    if (known := _recall(memory, key)) is not None:
        return known
    from specl.shared.settings.load import load_settings

    settings = load_settings(file)
    if key and key == _key(file):  # it did not change meanwhile
        _remember(memory, key, settings)
    return settings


def _key(file: Path) -> str:
    """What the memory depends on; empty for a file that cannot be read."""
    try:
        program = VALIDATOR.stat()
        return hashlib.sha256(f"{program.st_mtime_ns} {program.st_size}\n".encode() + file.read_bytes()).hexdigest()
    except OSError:
        return ""


def _recall(memory: Path, key: str) -> "Settings | None":
    try:
        said = json.loads(memory.read_bytes())
        return cast("Settings", _tree(said["settings"])) if said["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _tree(value: Any) -> Any:
    return SimpleNamespace(**{k: _tree(v) for k, v in value.items()}) if isinstance(value, dict) else value


def _remember(memory: Path, key: str, settings: "Settings") -> None:
    found = settings.model_dump(mode="json", exclude={"gateway": {"token"}})
    scratch = memory.with_name(f"settings.{os.getpid()}.new")
    with suppress(OSError):  # no run directory yet, or a full disk: next time then
        scratch.write_text(json.dumps({"key": key, "settings": found}))
        scratch.chmod(0o600)
        scratch.rename(memory)
