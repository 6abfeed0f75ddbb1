"""Daemons under load with everything going wrong at once, for minutes or hours. `python -m tests.bench.soak --minutes 30`.

Faults, drawn with a printed seed: kill -9 of inference, collector or trainer, SIGSTOP of the collector, restarts at random
crash points, hostile frames. The trainer trains meanwhile, its adapters are swapped in. At the end nothing accepted may be
missing or doubled, and memory and open files of a last undisturbed stretch must be flat. Also measured: what recording adds
to an answer (asks with and without it in turn).

A daemon that has just been started maps its libraries and loads its models with the first work it gets, so the stretch begins
when every daemon has done each kind of its work once. Flat is judged by medians: of the whole stretch and of its second half.
"""

import argparse
import json
import random
import signal
import statistics
import sys
import threading
import time

import zmq

from specl.shared.adapters.registry import Adapters
from specl.shared.errors import SpecLoraError
from tests.fault.test_delivery import COLLECTOR_POINTS, INFERENCE_POINTS
from tests.fault.test_frames import hostile
from tests.harness.figures import percentile, process_figures
from tests.harness.forkserver import Forkserver
from tests.harness.instance import SETTINGS, Instance
from tests.harness.waiting import wait_until

ROLES = ("inference", "collector", "trainer")
BREATH_S = (2.0, 8.0)  # between two faults
CALM_SHARE = 0.25  # of the time at the end, without faults
MOST_MIB, MOST_FILES = 16, 4  # that a daemon may gain in it; half of that in its second half
LOOK_S = 5.0
WARM_S = 600.0  # until the trainer has scored and trained
WARM_TABLES = ("training_runs", "evaluations")
ASKED_S, QUIET_S = 16.0, 5.0  # by turns: the trainer works while nobody asks
# small limits, so that what a run works with is as much as it will ever be before the calm begins
TRAINING = """\
training: {enabled: true, on_battery: true, idle_seconds: 0.2, min_failure_cases: 20, max_failure_cases: 100, replay_buffer_size: 100,
  heldout_share: 0.4, num_epochs: 2, max_minutes: 0.3, min_heldout_generations: 5, regression_prompts: 0}
"""
SOAK = "".join(TRAINING if line.startswith("training:") else line for line in SETTINGS.splitlines(keepends=True))


class Soak:
    """One run."""

    def __init__(self, instance: Instance, rng: random.Random) -> None:
        self.instance, self.rng = instance, rng
        self.running = {role: instance.start(role) for role in ROLES}
        self.faults: dict[str, int] = {}
        self.recorded: list[float] = []
        self.unrecorded: list[float] = []
        self.probed: list[str] = []  # generations of the probe
        self.hold = threading.Event()  # nobody asks
        self._context = zmq.Context()

    def tide(self, stop: threading.Event) -> None:
        """Times of asking and quiet times by turns."""
        while not stop.wait(ASKED_S):
            self.hold.set()
            stop.wait(QUIET_S)
            self.hold.clear()

    def probe(self, stop: threading.Event) -> None:
        """Asks with and without recording in turn, for the difference."""
        client, turn = self.instance.client(), 0
        while not stop.is_set():
            if self.hold.is_set():
                stop.wait(0.1)
                continue
            turn += 1
            began = time.monotonic()
            try:
                done = client.ask(f"probe {turn}", record=bool(turn % 2))
            except SpecLoraError:
                client.close()
                client = self.instance.client()
                stop.wait(0.2)
                continue
            self.probed.append(done.generation_id)
            if done.recorded:
                self.instance.acknowledged.append(done.generation_id)
            (self.recorded if turn % 2 else self.unrecorded).append(time.monotonic() - began)
            stop.wait(0.1)
        client.close()

    def fault(self) -> None:
        """Do one harm, and undo it where somebody has to."""
        kind = self.rng.choice(("kill", "kill", "stop", "point", "frames"))
        self.faults[kind] = self.faults.get(kind, 0) + 1
        match kind:
            case "kill":
                role = self.rng.choice(ROLES)
                self.running[role].kill()
                time.sleep(self.rng.uniform(0, 2))
                self.running[role] = self.instance.start(role)
            case "stop":
                self.running["collector"].signal(signal.SIGSTOP)
                time.sleep(self.rng.uniform(0.5, 5))
                self.running["collector"].signal(signal.SIGCONT)
            case "point":
                role = self.rng.choice(("inference", "collector"))
                point = self.rng.choice(INFERENCE_POINTS if role == "inference" else COLLECTOR_POINTS)
                self.running[role].kill()
                daemon = self.instance.start(role, SPECL_CRASH_AT=f"{point}:{self.rng.randrange(1, 20)}")
                end = time.monotonic() + 15
                while daemon.code is None and time.monotonic() < end:
                    time.sleep(0.1)
                daemon.kill()
                self.running[role] = self.instance.start(role)
            case "frames":
                socket = self._context.socket(zmq.DEALER)
                socket.setsockopt(zmq.LINGER, 200)
                socket.connect(self.instance.paths.socket(self.rng.choice(ROLES)))
                for _ in range(200):
                    socket.send(hostile(self.rng))
                socket.close()

    def warm(self) -> float:
        """Wait until the trainer that runs now has trained and scored, while nobody asks; seconds that took."""
        began = time.monotonic()
        for role in ROLES:
            self.instance.ready(role, 60)
        with self.instance.client() as client:
            client.train(now=True)
        so_far = [len(self.instance.stored(table)) for table in WARM_TABLES]

        def done() -> bool:
            self.hold.set()
            return all(len(self.instance.stored(table)) > n for table, n in zip(WARM_TABLES, so_far, strict=True))

        wait_until(done, WARM_S, f"one more of each of {', '.join(WARM_TABLES)}")
        self.hold.clear()
        return time.monotonic() - began

    def watch(self, seconds: float) -> dict[str, list[tuple[float, int]]]:
        """MiB and open files by role, every few seconds."""
        end = time.monotonic() + seconds
        curves: dict[str, list[tuple[float, int]]] = {role: [] for role in ROLES}
        while time.monotonic() < end:
            for role, daemon in self.running.items():
                curves[role].append(process_figures(daemon.pid))
            time.sleep(LOOK_S)
        return curves

    def untold(self) -> set[str]:
        """Adapters on the disk that the store does not know."""
        wait_until(lambda: not self.instance.waiting("trainer"), 60, "the trainer's outbox empties")
        return set(Adapters(self.instance.paths.adapters).ids()) - set(self.instance.stored("adapters"))

    def report(self) -> dict[str, object]:
        """Let everything settle; what was asked, accepted, lost and doubled, and what recording cost."""
        instance, settled, untold = self.instance, self.instance.settle(60), self.untold()
        stored, trained = instance.stored(), len(instance.stored("training_runs"))
        recorded, unrecorded = (
            [round(1000 * percentile(values, share), 1) for share in (0.5, 0.99)]
            for values in (self.recorded, self.unrecorded)
        )
        return {
            "faults": self.faults,
            "served": len(instance.latencies) + len(self.probed), "refused": dict(instance.refusals),
            "accepted": len(instance.acknowledged), "lost": len(set(instance.acknowledged) - set(stored)), "doubled": len(instance.doubled()),
            "changed": len(instance.changed()),
            "settled_s": round(settled, 2),
            "trained": trained, "runs_lost": max(0, instance.output("trainer").count("kind=run ") - trained),
            "adapters": len(instance.stored("adapters")), "adapters_untold": len(untold),
            "recorded_ms": recorded, "unrecorded_ms": unrecorded,
            "added_p50_ms": round(recorded[0] - unrecorded[0], 1), "added_p99_ms": round(recorded[1] - unrecorded[1], 1),
        }  # fmt: skip

    def close(self) -> None:
        """Let go of the sockets."""
        self._context.destroy(linger=0)


def gained(values: list[float]) -> tuple[float, float]:
    """From the first fifth to the last, and from the middle to the last, each by its median."""
    fifth, middle = max(1, len(values) // 5), len(values) // 2
    last = statistics.median(values[-fifth:])
    return last - statistics.median(values[:fifth]), last - statistics.median(values[middle : middle + fifth])


def judge(curves: dict[str, list[tuple[float, int]]]) -> tuple[dict[str, object], list[str]]:
    """What to print of the calm stretch, and the daemons that were not flat."""
    report: dict[str, object] = {"grew_MiB": {}, "grew_files": {}, "curve_MiB": {}}
    growing = []
    for role, curve in curves.items():
        memory, files = gained([point[0] for point in curve]), gained([float(point[1]) for point in curve])
        report["grew_MiB"][role] = [round(value, 1) for value in memory]
        report["grew_files"][role] = list(files)
        report["curve_MiB"][role] = [round(point[0], 1) for point in curve[:: max(1, len(curve) // 12)]]
        if any(memory[n] > MOST_MIB / (n + 1) or files[n] > MOST_FILES / (n + 1) for n in (0, 1)):
            growing.append(role)
    return report, growing


def main() -> None:
    """Run, check the invariant, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--rate", type=float, default=8, help="answers a second asked for")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    wanted = parser.parse_args()
    print(f"seed {wanted.seed}", flush=True)
    forkserver = Forkserver()
    instance = Instance(forkserver, SOAK)
    soak = Soak(instance, random.Random(wanted.seed))
    stop = threading.Event()
    try:
        for role in ROLES:
            instance.ready(role, 60)
        threads = instance.load(stop, wanted.rate, hold=soak.hold)
        for work in (soak.probe, soak.tide):
            threads.append(threading.Thread(target=work, args=(stop,), daemon=True))
            threads[-1].start()
        start = time.monotonic()
        calm_from = start + wanted.minutes * 60 * (1 - CALM_SHARE)
        while time.monotonic() < calm_from:
            time.sleep(soak.rng.uniform(*BREATH_S))
            soak.fault()
        warm_s = soak.warm()
        soak.recorded.clear()
        soak.unrecorded.clear()
        curves = soak.watch(wanted.minutes * 60 * CALM_SHARE)
        stop.set()
        for thread in threads:
            thread.join(timeout=30)
        report = {"minutes": round((time.monotonic() - start) / 60, 1), "seed": wanted.seed} | soak.report()
        report |= {"warm_s": round(warm_s, 1), "calm_minutes": round(wanted.minutes * CALM_SHARE, 1)}
        flatness, growing = judge(curves)
        print(json.dumps(report | flatness), flush=True)
        instance.check()
        assert not report["adapters_untold"] and not report["runs_lost"], "a record of the trainer is lost"
        if growing:
            sys.exit(f"not flat: {', '.join(growing)}")
    finally:
        stop.set()
        soak.close()
        instance.close()
        forkserver.close()


if __name__ == "__main__":
    main()
