"""Real processes, sockets, SQLite and the real SmolLM2: one set of daemons under honcho for the whole module."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
MODELS = Path(os.environ.get("SPECL_MODELS") or REPOSITORY / "var" / "models")
BIN = Path(sys.executable).parent

SETTINGS = """
speculative: {temperature: 0.0, max_tokens: 48, ngram: false}
training:
  enabled: false
  on_battery: true
  lora: {rank: 16, alpha: 32}
  learning_rate: 8.0e-4
  batch_size: 3
  replay_ratio: 0.34
  num_epochs: 6
  max_minutes: 1.0
  heldout_share: 0.4
  min_heldout_generations: 4
  regression_prompts: 0 # not what is tested here, and it takes a minute
  threads: 1
  idle_seconds: 0.1
serving: {client_timeout_s: 3}
"""


def wait_until(condition, timeout=20.0, what="the condition"):
    """Poll a condition; its value, or an assertion that names it."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError(f"{what} did not come true within {timeout} s")


@dataclass(slots=False)
class Box:
    """One run directory and its environment."""

    var: Path
    environment: dict

    def run(self, *arguments, timeout=180, input=None):
        """specl-ctl with these arguments."""
        command = [str(BIN / "specl-ctl"), *arguments]
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=timeout, input=input
        )

    def popen(self, *arguments, **more):
        """The same, left running."""
        return subprocess.Popen(
            [str(BIN / "specl-ctl"), *arguments],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **more,
        )

    def status(self):
        """`specl-ctl status --json`."""
        done = self.run("status", "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def ask(self, prompt, *more):
        """`specl-ctl ask --json`."""
        done = self.run("ask", "--json", *more, "--", prompt)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def start(self):
        """`honcho start` in the repository, ready to answer."""
        log = open(self.var / "honcho.out", "ab")
        process = subprocess.Popen(
            [str(BIN / "honcho"), "start"],
            cwd=REPOSITORY,
            env=self.environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        ready = ("ready", "busy")

        def up():
            assert process.poll() is None, (self.var / "honcho.out").read_text()[-3000:]
            found = self.status()
            return all(found[role]["state"] in ready for role in ("inference", "collector", "trainer"))

        wait_until(up, 120, "all three daemons ready")
        return process


def make_box(settings=SETTINGS):
    """A fresh run directory with a short path (socket paths are limited)."""
    var = Path(tempfile.mkdtemp(prefix="e2e-"))
    (var / "settings.yaml").write_text(settings)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SPECL_")}
    environment |= {"SPECL_VAR": str(var), "SPECL_MODELS": str(MODELS), "SPECL_CONFIG": str(var / "settings.yaml")}
    environment |= {"PYTHONUNBUFFERED": "1", "PATH": f"{BIN}:{os.environ['PATH']}", "COLUMNS": "200"}
    return Box(var, environment)


def stop(process, number=signal.SIGINT):
    """Ctrl-C on honcho; seconds until it was gone."""
    start = time.monotonic()
    os.kill(process.pid, number)
    process.wait(timeout=15)
    return time.monotonic() - start


@pytest.fixture
def box():
    """A run directory with no daemons."""
    made = make_box()
    yield made
    shutil.rmtree(made.var, ignore_errors=True)


@pytest.fixture(scope="module")
def system():
    """A run directory with all daemons up; `system.process` is honcho."""
    made = make_box()
    made.process = made.start()
    yield made
    if made.process.poll() is None:
        stop(made.process)
    shutil.rmtree(made.var, ignore_errors=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A failure shows what the daemons said last, and what they made of the records."""
    report = yield
    system = item.funcargs.get("system")
    if report.failed and system is not None:
        with suppress(OSError):
            report.sections.append(("daemons", (system.var / "honcho.out").read_text()[-6000:]))
        with suppress(sqlite3.Error), closing(sqlite3.connect(system.var / "store.db")) as db:
            report.sections.append(
                ("quarantine", str(db.execute("SELECT id, kind, reason FROM quarantine").fetchall()))
            )
    return report
