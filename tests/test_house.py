"""The rules of the house: who may import what, where things stand, and what the wheel holds."""

import ast
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("shared", "daemons", "cli")
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
# word lists; every record and message of the wire in one place
LONG = {"shared/messaging/messages.py", "shared/prompts/build_prompts.py", "shared/prompts/reserved.py"}


def imports(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def name(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_keep_to_the_rooms(path):
    where, found = name(path), set(imports(path))
    tops = {module.split(".")[0] for module in found}
    if where.startswith("shared/"):
        assert not any(module.startswith(("specl.daemons", "specl.cli")) for module in found)
    if where.startswith("daemons/"):
        assert not any(module.startswith("specl.cli") for module in found)
        own = where.split("/")[1].removesuffix(".py")
        others = {module for module in found if module.startswith("specl.daemons.")}
        assert all(module.split(".")[2] in (own, "run") for module in others), others
    if where.startswith("cli/"):
        assert not any(module.startswith("specl.daemons") for module in found)
    if where.startswith(("shared/engine/", "shared/models/", "shared/learning/", "shared/native/")):
        assert not tops & {"zmq", "sqlalchemy", "click", "msgpack"}
    assert "zmq" not in tops or where in ("shared/messaging/bus.py", "shared/messaging/endpoints.py")
    assert "sqlalchemy" not in tops or where.startswith("shared/store/")
    assert "pickle" not in tops


@pytest.mark.parametrize("path", FILES, ids=name)
def test_files_say_what_they_are_and_stay_readable(path):
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "a module says what it is"
    assert text.count("\n") <= 430 or name(path) in LONG
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and name(path) not in LONG:
            assert node.end_lineno - node.lineno < 75, f"{node.name} is too long"


@pytest.mark.parametrize(
    "module",
    [
        "cli.status",
        "cli.ask",
        "shared.messaging.codec",
        "shared.messaging.bus",
        "shared.messaging.outbox",
        "shared.messaging.client",
    ],
)
def test_light_modules_import_neither_mlx_nor_sqlalchemy(module):
    code = f"import sys, specl.{module}; print({{'mlx', 'mlx.core', 'sqlalchemy'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr


def test_the_packages_of_pyproject_are_the_folders():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    mapped = {"shared": "specl.shared", "daemons": "specl.daemons", "cli": "specl.cli", "configs": "specl.configs"}
    found = {"specl"}
    for folder, package in mapped.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            relative = init.parent.relative_to(ROOT / folder).parts
            if relative[:1] != ("root",):
                found.add(".".join((package, *relative)))
    assert set(settings["packages"]) == found


def test_the_wheel_holds_every_package_and_data_file(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    source = tmp_path / "source"
    subprocess.run(["git", "-C", str(ROOT), "worktree", "list"], capture_output=True)
    import shutil

    ignore = shutil.ignore_patterns(
        ".git", "var", "*.so", "build", "__pycache__", "*.egg-info", ".venv", "venv", ".*_cache"
    )
    shutil.copytree(ROOT, source, ignore=ignore)
    (source / "var").mkdir()
    command[-1] = str(source)
    # the native part has its own tests; this looks at what the wheel holds
    environment = {"CC": "false", "CXX": "false"}
    import os

    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    held = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    wanted = {
        "specl/__init__.py",
        "specl/configs/default.yaml",
        "specl/shared/models/drafts/smollm2-135m-head/model.safetensors",
    }
    wanted |= {"specl/shared/prompts/train.jsonl", "specl/shared/prompts/bench/copy.jsonl"}
    wanted |= {f"specl/daemons/gateway/static/{path.name}" for path in (ROOT / "daemons/gateway/static").iterdir()}
    for room in ROOMS:
        wanted |= {f"specl/{name(path)}" for path in (ROOT / room).rglob("*.py") if "root" not in path.parts}
    assert not wanted - held, sorted(wanted - held)[:10]


def test_the_settings_document_is_the_settings():
    from specl.shared.settings.load import settings_document

    assert (ROOT / "docs" / "settings.md").read_text() == settings_document()


def test_every_shipped_settings_file_is_valid():
    from specl.shared.settings.load import load_settings

    for path in (ROOT / "configs").glob("*.yaml"):
        load_settings(path)


def test_no_reserved_kind_is_in_a_drafts_training_data():
    import json

    from specl.shared.prompts import reserved

    for manifest in (ROOT / "shared" / "models" / "drafts").glob("*/manifest.json"):
        kinds = json.loads(manifest.read_text())["prompt_kinds"]
        assert kinds and not set(kinds) & set(reserved.KINDS)


def test_every_failpoint_is_known():
    import re

    from specl.shared.runtime.failpoints import POINTS

    used = {point for path in FILES for point in re.findall(r'failpoint\("([^"]+)"\)', path.read_text())}
    assert used == set(POINTS)
