"""What ships: packages and data files of the wheel, settings and their document, light imports, failpoints."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest

from specl.shared.prompts import reserved
from specl.shared.runtime.failpoints import POINTS
from specl.shared.settings.load import load_settings, settings_document
from tests.source_tree import FILES, ROOT, missing_names, name

HOME = os.environ["HOME"]  # pip's settings of the user who runs the tests


@pytest.mark.process
@pytest.mark.parametrize("module", ["codec", "bus", "outbox", "client"])
def test_messaging_imports_neither_mlx_nor_sqlalchemy(module):
    code = f"import sys, specl.shared.messaging.{module}; print({{'mlx', 'mlx.core', 'sqlalchemy'}} & set(sys.modules))"
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


def build_wheel(source, folder):
    """The files in the wheel of a source tree. Its native parts are left out: they have tests of their own."""
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(source)]
    environment = os.environ | {"CC": "false", "CXX": "false", "HOME": HOME}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return set(zipfile.ZipFile(next(folder.glob("*.whl"))).namelist())


@pytest.mark.process
def test_the_wheel_holds_every_package_and_data_file(tmp_path):
    left_out = (".git", "var", "*.so", "build", "__pycache__", "*.egg-info", ".venv", "venv", ".*_cache")
    shutil.copytree(ROOT, tmp_path / "source", ignore=shutil.ignore_patterns(*left_out))
    expected = {
        "specl/__init__.py",
        "specl/configs/default.yaml",
        "specl/shared/models/drafts/smollm2-135m-head/model.safetensors",
        "specl/shared/prompts/train.jsonl",
        "specl/shared/prompts/bench/copy.jsonl",
    }
    expected |= {f"specl/daemons/gateway/static/{path.name}" for path in (ROOT / "daemons/gateway/static").iterdir()}
    expected |= {f"specl/{name(path)}" for path in FILES if "root" not in path.parts}
    assert not expected - build_wheel(tmp_path / "source", tmp_path)


def test_the_settings_document_is_the_settings():
    assert (ROOT / "docs" / "settings.md").read_text() == settings_document()


def test_every_shipped_settings_file_is_valid():
    for path in (ROOT / "configs").glob("*.yaml"):
        load_settings(path)


def test_no_draft_was_trained_on_reserved_kinds():
    for manifest in (ROOT / "shared" / "models" / "drafts").glob("*/manifest.json"):
        kinds = json.loads(manifest.read_text())["prompt_kinds"]
        assert kinds and not set(kinds) & set(reserved.KINDS)


def test_every_failpoint_is_known():
    used = {point for path in FILES for point in re.findall(r'failpoint\("([^"]+)"\)', path.read_text())}
    assert used == set(POINTS)


def test_bench_scripts_import_what_exists():
    # they run by hand only; a rename must not leave them behind
    scripts = (ROOT / "tests" / "bench").glob("*.py")
    assert not [missing for path in scripts for missing in missing_names(path)]
