"""Real processes, sockets, SQLite and the real SmolLM2: one set of daemons under honcho for the whole module."""

import shutil
import sqlite3
from contextlib import closing, suppress

import pytest

from tests.harness.cli_instance import make_cli_instance, stop


@pytest.fixture
def cli_instance():
    """A run directory with no daemons."""
    instance = make_cli_instance()
    yield instance
    shutil.rmtree(instance.var, ignore_errors=True)


@pytest.fixture(scope="module")
def system():
    """A run directory with all daemons up; `system.process` is honcho."""
    instance = make_cli_instance()
    instance.process = instance.start()
    yield instance
    if instance.process.poll() is None:
        stop(instance.process)
    shutil.rmtree(instance.var, ignore_errors=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A failure shows what the daemons said last, and what became of the records."""
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
