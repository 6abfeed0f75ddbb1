"""How long commands take before they do anything: `ask` until its request is at the daemon, `status` until it is over.

    python -m tests.bench.startup [--times 10]

The daemons are faked by threads of this process, in a scratch run directory: what is measured is the command alone. The clock
starts before the process does; the processor's time is of the whole command, to its end. Run it on a quiet machine; where a median is above the bar, the modules that take the time are named
(`python -X importtime`, their own time, in a run of its own).
"""

import argparse
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from specl.shared.answer_stats import AnswerStats
from specl.shared.messaging.bus import Server
from specl.shared.messaging.codes import DaemonState
from specl.shared.messaging.daemon_status import (
    AdapterStatus,
    BlasStatus,
    CollectorStatus,
    InferenceStatus,
    ModelsStatus,
    OutboxStatus,
    QueueStatus,
    StoreSummary,
    TrainerStatus,
    TrainingProgress,
)
from specl.shared.messaging.endpoints import Addresses
from specl.shared.messaging.messages import Ask, Done, GetStatus
from specl.shared.paths import ROLES, Paths
from specl.shared.runtime.locks import Lock
from specl.shared.settings.schema import Settings

BAR_S = 0.4
COMMAND = str(Path(sys.executable).parent / "specl-ctl")
STATS = AnswerStats(tokens_per_second=50.0, plain_tokens_per_second_estimate=40.0, accepted=1, drafted=2, ttft_ms=10.0)
OUTBOX = OutboxStatus(0, 0, 0, "")
STATUS = {
    "inference": InferenceStatus(
        DaemonState.READY, 1.0, QueueStatus(), OUTBOX, 0, None, None, AdapterStatus(), ModelsStatus("t", "d", True),
        BlasStatus("b", True), 0,
    ),
    "collector": CollectorStatus(DaemonState.READY, 1.0, 1, "", 0, {}, StoreSummary(1, 1)),
    "trainer": TrainerStatus(
        DaemonState.READY, 1.0, TrainingProgress("idle", "", 0, 0, None, False), {}, 0, 50, True, OUTBOX, "", 0
    ),
}  # fmt: skip


class FakeDaemon:
    """One daemon: its lock, its sockets, and when the last Ask came (`time.monotonic`)."""

    def __init__(self, paths: Paths, role: str) -> None:
        self.role, self.asked_at = role, 0.0
        self._lock = Lock(paths.run, role)
        addresses = Addresses(paths, Settings().bus)
        self._server = Server(addresses.answer(role), addresses.publish(role))
        self._over = False
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while not self._over:
            self._server.poll(0.2, self._answer)
        self._server.close()

    def _answer(self, peer: bytes, message: object) -> None:
        if isinstance(message, Ask):
            self.asked_at = time.monotonic()
            done = Done(message.request_id, "0" * 32, "Yes.", 1, "stop", "", True, "", STATS)
            self._server.send(peer, done)
        elif isinstance(message, GetStatus):
            self._server.send(peer, STATUS[self.role])

    def close(self) -> None:
        """End the thread, and give the lock up."""
        self._over = True
        self._server.wake()
        self._thread.join()
        self._lock.release()


def run(arguments: list[str], environment: dict[str, str]) -> float:
    """Seconds until the command is over."""
    begun = time.monotonic()
    done = subprocess.run([COMMAND, *arguments], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: {done.stderr}")
    return time.monotonic() - begun


def processor_s() -> float:
    """Processor seconds of the commands so far: what a busy machine changes least."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def slow_modules(arguments: list[str], environment: dict[str, str]) -> str:
    """The ten modules whose own code takes longest to import."""
    command = [sys.executable, "-X", "importtime", COMMAND, *arguments]
    said = subprocess.run(command, env=environment, capture_output=True, text=True).stderr
    found = [(int(own), name) for own, name in re.findall(r"import time:\s+(\d+) \|\s+\d+ \| \s*(\S+)", said)]
    output = ", ".join(f"{name} {own / 1000:.0f}" for own, name in sorted(found, reverse=True)[:10])
    return f"{len(found)} modules, {sum(own for own, _ in found) / 1000:.0f} ms in all; own ms: {output}"


def report(name: str, once: Callable[[], float], times: int, arguments: list[str], environment: dict[str, str]) -> None:
    """Median and worst of so many, after one that is not counted: it remembers settings and warms the disk's cache."""
    once()
    before = processor_s()
    taken = [once() for _ in range(times)]
    each = (processor_s() - before) / times
    median = statistics.median(taken)
    print(f"{name:<24} median {median:.3f} s, worst {max(taken):.3f} s; processor {each:.3f} s", flush=True)
    if median > BAR_S:
        print(f"  above {BAR_S} s: {slow_modules(arguments, environment)}", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10)
    times = parser.parse_args().times
    with tempfile.TemporaryDirectory(prefix="specl-") as folder:
        paths = Paths(Path(folder), Path(folder) / "models").create()
        environment = {name: value for name, value in os.environ.items() if name != "SPECL_CONFIG"} | {
            "SPECL_VAR": folder
        }
        status, ask = ["status", "--json"], ["ask", "hello"]
        report("status, nobody runs", lambda: run(status, environment), times, status, environment)
        fakes = [FakeDaemon(paths, role) for role in ROLES]

        def until_sent() -> float:
            begun = time.monotonic()
            run(ask, environment)
            return fakes[0].asked_at - begun

        try:
            report("status, daemons run", lambda: run(status, environment), times, status, environment)
            report("status for a person", lambda: run(["status"], environment), times, ["status"], environment)
            report("ask, until it is sent", until_sent, times, ask, environment)
            report("ask, until it is over", lambda: run(ask, environment), times, ask, environment)
        finally:
            for one in fakes:
                one.close()


if __name__ == "__main__":
    main()
