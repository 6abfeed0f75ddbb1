"""Processes (F9, F15): one of each, back after a crash, gone with their parents, in whatever order they start."""

import itertools
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from specl.shared.paths import DAEMONS, ROLES
from specl.shared.runtime.locks import holder_of, is_locked
from specl.shared.runtime.supervisor import BACKOFF_S
from tests.fakes import ROOT
from tests.harness.instance import SETTINGS
from tests.harness.waiting import wait_until


@pytest.mark.parametrize("role", ROLES)
def test_f9_second_daemon_is_refused(instance, role):
    first = instance.start(role)
    instance.ready(role)
    second = instance.start(role)
    wait_until(lambda: second.code is not None, 3, "the second ends")
    assert second.code == 75
    assert f"pid {first.pid}" in instance.output(role)
    assert instance.status(role)["pid"] == first.pid


@pytest.mark.parametrize("order", list(itertools.permutations(ROLES)))
def test_f15_any_start_order_works(instance, order):
    for role in order:
        instance.start(role)
        time.sleep(0.3)
    for role in ROLES:
        instance.ready(role)
    assert instance.ask("hello").recorded
    instance.settle()
    instance.check()


def test_f15_stale_sockets_and_locks_are_no_obstacle(instance):
    for _ in range(2):
        daemons = [instance.start(role) for role in ROLES]
        for role in ROLES:
            instance.ready(role)
        assert instance.ask("hello").recorded
        instance.settle()
        for daemon in daemons:
            daemon.kill()
        assert list(instance.paths.run.glob("*.sock"))  # what kill -9 leaves behind
    instance.settle()
    instance.check()


def test_f15_busy_daemons_stop_within_five_seconds(instance, figures):
    daemons = [instance.start(role, SPECL_TEST_TOKEN_MS="30") for role in ROLES]
    for role in ROLES:
        instance.ready(role)
    with instance.client() as client:
        pieces = client.stream("a long answer", max_tokens=400)
        next(pieces)
        seconds = [daemon.stop() for daemon in daemons]
    figures(F15_stop_s=max(seconds))
    assert [daemon.code for daemon in daemons] == [0, 0, 0]


class Tree:
    """`honcho start` as a user runs it, with the fake models put in by a sitecustomize on the path."""

    def __init__(self, instance, site, more=""):
        (site / "sitecustomize.py").write_text(
            "import sys\n"
            "if 'specl.daemons.inference' in sys.argv or any('daemons.inference' in a or 'daemons.trainer' in a for a in sys.orig_argv):\n"
            "    from tests.harness.fake_models import install\n    install()\n"
        )
        (site / "Procfile").write_text((ROOT / "Procfile").read_text().replace("python", sys.executable))
        environment = (
            os.environ | instance.environment() | {"PYTHONPATH": f"{site}:{ROOT}", "OPENBLAS_NUM_THREADS": "1"}
        )
        self.instance = instance
        instance.file.write_text(SETTINGS + "gateway: {port: 0}\n" + more)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "honcho", "-f", str(site / "Procfile"), "start"],
            env=environment, cwd=site, stdout=open(instance.outputs / "honcho.out", "wb"), stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip

    def pids(self):
        return {role: holder_of(self.instance.paths.run, role) for role in ROLES}

    def supervisor_pid(self, role):
        """The pid of the respawner above a daemon."""
        with open(f"/proc/{holder_of(self.instance.paths.run, role)}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[1])

    def ready(self):
        for role in ROLES:
            self.instance.ready(role, 60)
        wait_until(lambda: is_locked(self.instance.paths.run, "gateway"), 60, "the gateway is there")

    def all_gone(self):
        return not any(is_locked(self.instance.paths.run, role) for role in DAEMONS)


@pytest.fixture
def tree(instance, tmp_path):
    made = []

    def start(more=""):
        made.append(Tree(instance, tmp_path, more))
        return made[-1]

    yield start
    for one in made:
        if one.process.poll() is None:
            one.process.terminate()
            try:
                one.process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                one.process.kill()


def test_f15_dead_daemon_restarts_and_tree_stops(instance, figures, tree):
    running = tree()
    running.ready()
    before = running.pids()
    start = time.monotonic()
    os.kill(before["collector"], signal.SIGKILL)
    os.kill(before["inference"], signal.SIGKILL)
    wait_until(
        lambda: instance.status("collector").get("pid") not in (None, before["collector"]), 20, "the collector is back"
    )
    collector_s = time.monotonic() - start
    wait_until(
        lambda: instance.status("inference").get("pid") not in (None, before["inference"]), 30, "inference is back"
    )
    inference_s = time.monotonic() - start
    instance.ready("inference")
    assert instance.ask("hello").recorded
    start = time.monotonic()
    running.process.send_signal(signal.SIGTERM)
    running.process.wait(timeout=5)
    stop_s = time.monotonic() - start
    figures(F15_collector_back_s=collector_s, inference_back_s=inference_s, honcho_stop_s=stop_s)
    assert running.all_gone()


def test_f15_crashing_daemon_restarts_with_growing_pauses(instance, figures):
    supervisor = subprocess.Popen(
        [sys.executable, "-m", "specl.daemons.supervise", "collector"],
        env=os.environ | instance.environment(SPECL_CRASH_AT="fetch.before_request"),
        stdout=open(instance.outputs / "supervisor.out", "wb"), stderr=subprocess.STDOUT,
    )  # fmt: skip
    said = lambda: [int(n) for n in re.findall(r"restart_in_s=(\d+)", instance.output("supervisor"))]  # noqa: E731
    try:
        began = time.monotonic()
        wait_until(lambda: len(said()) >= 4, 60, "it died four times")
        seconds = time.monotonic() - began
    finally:
        supervisor.terminate()
        code = supervisor.wait(timeout=10)
    figures(F15_pauses_s=said()[:4], four_deaths_in_s=seconds)
    assert said()[:4] == list(BACKOFF_S[:4]) and seconds >= sum(BACKOFF_S[:3])
    assert code == 0 and not is_locked(instance.paths.run, "collector")


def test_f15_no_orphan_survives_honcho_or_a_supervisor(instance, figures, tree):
    running = tree()
    running.ready()
    start = time.monotonic()
    running.process.kill()
    running.process.wait()
    # supervisors look every 0.2 s; daemons stop within their grace of 3.5 s
    wait_until(running.all_gone, 5, "every daemon is gone")
    gone_s = time.monotonic() - start
    again = tree()
    again.ready()
    start = time.monotonic()
    os.kill(again.supervisor_pid("trainer"), signal.SIGKILL)
    again.process.wait(timeout=10)  # honcho ends all when one ends
    wait_until(again.all_gone, 5, "every daemon is gone")
    figures(F15_orphans_gone_s=gone_s, after_supervisor_s=time.monotonic() - start)


def test_f15_settings_error_is_not_retried(instance, tree):
    running = tree("nonsense: 1\n")
    running.process.wait(timeout=30)
    said = (instance.outputs / "honcho.out").read_text()
    assert "unknown setting `nonsense`" in said
    assert said.count("inference: ") <= 1 and "restart_in_s" not in said
    assert running.all_gone()
