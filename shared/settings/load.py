"""Reading settings from a YAML file. An unknown key or a bad value is an error that names file,
line, key and what is allowed.

Knows YAML and the schema, nothing of what a setting is for.
"""

import os
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.reader import ReaderError

from specl.shared.errors import ConfigError
from specl.shared.settings.schema import SECRETS, Settings

SHOWN_ENTRIES, SHOWN_CHARACTERS = 5, 80  # of a wrong value in an error
DEFAULTS = Path(__file__).parents[2] / "configs"


def default_file() -> Path:
    """The shipped `configs/default.yaml`."""
    return DEFAULTS / "default.yaml"


def settings_file() -> Path:
    """The settings file: the one that `SPECL_CONFIG` names, else the shipped default."""
    named = os.environ.get("SPECL_CONFIG")
    return Path(named).expanduser() if named else default_file()


def _known_keys(path: tuple[str | int, ...]) -> list[str]:
    """The keys that the section at `path` may have; empty where `path` is no section."""
    model: Any = Settings
    for part in path:
        field = getattr(model, "model_fields", {}).get(part)
        model = getattr(field, "annotation", None)
    return list(getattr(model, "model_fields", {}))


def _line_of(tree: Any, path: tuple[str | int, ...]) -> int | None:
    """The line (from 1) of the key at `path`, from the marks that ruamel keeps; None where there is
    none.
    """
    line = None
    for part in path:
        if not hasattr(tree, "lc"):
            break
        try:
            line = (tree.lc.key(part) if isinstance(part, str) else tree.lc.item(part))[0] + 1
            tree = tree[part]
        except (KeyError, IndexError, TypeError):
            break
    return line


def _keys(loc: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """The keys of the file among the parts of `loc`, which pydantic gives to an error.

    Within a section every part is a key. Within a value pydantic also adds the names of the types
    that it tried (`int`, `constrained-int`, `list[str]`); there only an index is from the file.
    """
    path: list[str | int] = []
    model: Any = Settings
    for part in loc:
        fields = getattr(model, "model_fields", None)
        if fields is None and not isinstance(part, int):
            continue
        path.append(part)
        model = getattr((fields or {}).get(part), "annotation", None)
    return tuple(path)


def _shown(value: Any, depth: int = 2) -> str:
    """A wrong value as far as a sentence needs it; aliases may make a small file's value endless."""
    if isinstance(value, dict | list):
        if not depth:
            return "..."
        entries = list(islice(value.items() if isinstance(value, dict) else value, SHOWN_ENTRIES))
        if isinstance(value, dict):
            parts = [f"{_shown(key, 0)}: {_shown(item, depth - 1)}" for key, item in entries]
        else:
            parts = [_shown(item, depth - 1) for item in entries]
        text = ", ".join(parts + ["..."] * (len(value) > len(entries)))
        return f"{{{text}}}" if isinstance(value, dict) else f"[{text}]"
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."


def _explain(file: Path, tree: Any, error: dict[str, Any]) -> str:
    """One error of pydantic's as a sentence."""
    path = _keys(error["loc"])
    line = _line_of(tree, path)
    where = f"{file}:{line}" if line else str(file)
    name = ".".join(str(part)[:SHOWN_CHARACTERS] for part in path) or "(the file)"
    if error["type"] == "extra_forbidden":
        known = _known_keys(path[:-1])
        close = get_close_matches(str(path[-1]), known, n=1)
        guess = f"; did you mean `{close[0]}`?" if close else f"; known here: {', '.join(known)}"
        return f"{where}: unknown setting `{name}`{guess}"
    given = "" if not path or path in SECRETS else f", not {_shown(error['input'])}"
    return f"{where}: `{name}`: {error['msg']}{given}"


def parse_settings(text: str, file: Path) -> Settings:
    """The settings in a YAML text. Raises ConfigError that lists every problem, each with file,
    line and key.
    """
    try:
        tree = YAML(typ="rt").load(text)
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        problem = error.problem
        if isinstance(error, DuplicateKeyError):  # ruamel's message repeats both values, and one may be a token
            problem = "a key stands there twice"
        raise ConfigError(f"{file}:{line}: not YAML: {problem}") from error
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        code = error.character if isinstance(error.character, int) else ord(error.character)
        raise ConfigError(f"{file}:{line}: not YAML: the character U+{code:04X} is not allowed") from error
    except (YAMLError, ValueError, RecursionError) as error:  # ruamel passes Python's own errors on odd values through
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{file}: not YAML that can be read: {reason}") from error
    if tree is None:
        return Settings()
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: settings are `key: value` pairs, not a {type(tree).__name__}")
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        lines = list(dict.fromkeys(_explain(file, tree, dict(item)) for item in error.errors()))
        raise ConfigError("\n".join(lines), "docs/settings.md has every key and its default") from error


def load_settings(file: Path | None = None) -> Settings:
    """The effective settings. Raises ConfigError for a missing, unreadable or bad file."""
    file = file or settings_file()
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the settings file {file}: {error}", "SPECL_CONFIG names it") from error
    return parse_settings(text, file)


def _described(model: type[BaseModel], path: str = "") -> list[str]:
    """One Markdown row for every key under `model`; `path` is the key of `model` and a dot."""
    rows = []
    for name, field in model.model_fields.items():
        where = f"{path}{name}"
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            rows += _described(kind, f"{where}.")
            continue
        default = "null" if field.default is None else str(field.default)
        text = (field.description or "").replace("|", "\\|")
        rows.append(f"| `{where}` | {default} | {text} |")
    return rows


def settings_document() -> str:
    """The text of docs/settings.md: every key, its default and its meaning. A test compares the
    file with it.
    """
    head = [
        "# Settings",
        "",
        "Settings are one YAML file, named by `SPECL_CONFIG` (default: the shipped `configs/default.yaml`). A key that is left out has the",
        "default of this table; unknown keys and wrong values are errors that name the file, the line and the key.",
        "Environment: `SPECL_VAR` (run directory), `SPECL_MODELS` (converted models), `SPECL_BLAS` (a library, or `none`),",
        "`SPECL_NATIVE=0` (no native CPU kernels).",
        "",
        "| key | default | meaning |",
        "| --- | --- | --- |",
    ]
    return "\n".join([*head, *_described(Settings)]) + "\n"
