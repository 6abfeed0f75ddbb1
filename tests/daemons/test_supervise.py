"""The supervisor's process: module names that units on users' machines hold, and what it may import."""

import os
import re
import subprocess
import sys

import pytest

from specl.shared.errors import ConfigError
from specl.shared.settings.plugins import load_plugin
from tests.fakes import ROOT
from tests.harness.waiting import wait_until


@pytest.mark.process
def test_units_of_the_former_name_still_work():
    outcome = subprocess.run([sys.executable, "-m", "specl.daemons.keep"], capture_output=True, text=True)
    assert outcome.returncode == 78 and "is now specl.daemons.supervise" in outcome.stderr
    assert "usage: python -m specl.daemons.supervise" in outcome.stderr


@pytest.mark.process
def test_files_of_the_starting_folder_are_not_imported(tmp_path):
    start = tmp_path / "start"
    start.mkdir()
    for module in ("json", "logging", "queue", "random", "zmq", "sqlalchemy"):
        (start / f"{module}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write('{module} ')\n")
    command = re.search(r"collector: exec python (.*)", (ROOT / "Procfile").read_text()).group(1).split()
    environment = os.environ | {"SPECL_VAR": str(tmp_path / "var"), "SPECL_CONFIG": str(ROOT / "configs/default.yaml")}
    supervisor = subprocess.Popen([sys.executable, *command], cwd=start, env=environment)
    try:
        wait_until(lambda: (tmp_path / "ran").exists() or (tmp_path / "var/store.db").exists(), 30, "the daemon starts")
    finally:
        supervisor.terminate()
        supervisor.wait(timeout=10)
    assert not (tmp_path / "ran").exists()


def test_every_python_child_ignores_the_current_folder():
    lines = []
    for path in [file for part in ("shared", "daemons", "cli") for file in (ROOT / part).rglob("*.py")]:
        calls = re.finditer(r"\[\s*sys\.executable,\s*(\S+?),", path.read_text())
        lines += [f"{path.name}: {call.group(0)}" for call in calls if call.group(1) != '"-P"']
    assert lines == []


def test_plugin_is_found_in_the_starting_folder_last(tmp_path, monkeypatch):
    (tmp_path / "hooks_of_mine.py").write_text("def make(): ...\n")
    (tmp_path / "random.py").write_text("raise RuntimeError\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder])
    with pytest.raises(ConfigError, match="cannot be imported"):
        load_plugin("hooks_of_nobody:make", "speculative.drafter")
    assert load_plugin("hooks_of_mine:make", "speculative.drafter").__name__ == "make"
    assert sys.path[-1] == str(tmp_path)
