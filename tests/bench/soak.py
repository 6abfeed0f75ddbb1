"""A house under load with everything going wrong at once, for minutes or hours. `python tests/bench/soak.py --minutes 30`.

Faults, drawn with a printed seed: kill -9 of inference, collector or trainer, SIGSTOP of the collector, restarts at random
crash points, hostile frames. At the end nothing accepted may be missing or doubled, and memory and open files of a last
undisturbed stretch must be flat. Also measured: what recording adds to an answer (asks with and without it in turn).
"""

import argparse
import json
import random
import signal
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "fault"))

import zmq
from fault_house import House, Zygote, percentile, process_figures
from test_delivery import COLLECTOR_POINTS, INFERENCE_POINTS
from test_frames import hostile

from specl.shared.errors import SpecLoraError

ROLES = ("inference", "collector", "trainer")
BREATH_S = (2.0, 8.0)  # between two faults
CALM_SHARE = 0.25  # of the time at the end, without faults
MOST_MIB, MOST_FILES = 16, 4  # that a daemon may gain in it


class Soak:
    """One run."""

    def __init__(self, house: House, rng: random.Random) -> None:
        self.house, self.rng = house, rng
        self.running = {role: house.start(role) for role in ROLES}
        self.faults: dict[str, int] = {}
        self.recorded: list[float] = []
        self.unrecorded: list[float] = []
        self.probed: list[str] = []  # generations of the probe
        self._context = zmq.Context()

    def probe(self, stop: threading.Event) -> None:
        """Asks with and without recording in turn, for the difference."""
        client, turn = self.house.client(), 0
        while not stop.is_set():
            turn += 1
            began = time.monotonic()
            try:
                done = client.ask(f"probe {turn}", record=bool(turn % 2))
            except SpecLoraError:
                client.close()
                client = self.house.client()
                stop.wait(0.2)
                continue
            self.probed.append(done.generation_id)
            if done.recorded:
                self.house.acked.append(done.generation_id)
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
                self.running[role] = self.house.start(role)
            case "stop":
                self.running["collector"].signal(signal.SIGSTOP)
                time.sleep(self.rng.uniform(0.5, 5))
                self.running["collector"].signal(signal.SIGCONT)
            case "point":
                role = self.rng.choice(("inference", "collector"))
                point = self.rng.choice(INFERENCE_POINTS if role == "inference" else COLLECTOR_POINTS)
                self.running[role].kill()
                daemon = self.house.start(role, SPECL_CRASH_AT=f"{point}:{self.rng.randrange(1, 20)}")
                end = time.monotonic() + 15
                while daemon.code is None and time.monotonic() < end:
                    time.sleep(0.1)
                daemon.kill()
                self.running[role] = self.house.start(role)
            case "frames":
                socket = self._context.socket(zmq.DEALER)
                socket.setsockopt(zmq.LINGER, 200)
                socket.connect(self.house.paths.socket(self.rng.choice(ROLES)))
                for _ in range(200):
                    socket.send(hostile(self.rng))
                socket.close()

    def figures(self) -> dict[str, tuple[float, int]]:
        """MiB and open files by role."""
        return {role: process_figures(daemon.pid) for role, daemon in self.running.items()}

    def close(self) -> None:
        """Let go of the sockets."""
        self._context.destroy(linger=0)


def main() -> None:
    """Run, check the invariant, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--rate", type=float, default=8, help="answers a second asked for")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    wanted = parser.parse_args()
    print(f"seed {wanted.seed}", flush=True)
    zygote = Zygote()
    house = House(zygote)
    soak = Soak(house, random.Random(wanted.seed))
    stop = threading.Event()
    try:
        for role in ROLES:
            house.ready(role, 60)
        threads = [*house.load(stop, wanted.rate), threading.Thread(target=soak.probe, args=(stop,), daemon=True)]
        threads[-1].start()
        start = time.monotonic()
        calm_from = start + wanted.minutes * 60 * (1 - CALM_SHARE)
        while time.monotonic() < calm_from:
            time.sleep(soak.rng.uniform(*BREATH_S))
            soak.fault()
        for role in ROLES:
            house.ready(role, 60)
        soak.recorded.clear()
        soak.unrecorded.clear()
        time.sleep(min(10.0, wanted.minutes * 6))  # first answers fill caches
        before = soak.figures()
        while time.monotonic() < start + wanted.minutes * 60:
            time.sleep(0.5)
        after = soak.figures()
        stop.set()
        for thread in threads:
            thread.join(timeout=30)
        settled = house.settle(60)
        stored = house.stored()
        report = {
            "minutes": round((time.monotonic() - start) / 60, 1), "seed": wanted.seed, "faults": soak.faults,
            "served": len(house.latencies) + len(soak.probed), "refused": dict(house.refusals),
            "accepted": len(house.acked), "lost": len(set(house.acked) - set(stored)), "doubled": len(stored) - len(set(stored)),
            "settled_s": round(settled, 2),
            "calm_minutes": round(wanted.minutes * CALM_SHARE, 1),
            "grew_MiB": {role: round(after[role][0] - before[role][0], 1) for role in ROLES},
            "grew_files": {role: after[role][1] - before[role][1] for role in ROLES},
            "recorded_ms": [round(1000 * percentile(soak.recorded, share), 1) for share in (0.5, 0.99)],
            "unrecorded_ms": [round(1000 * percentile(soak.unrecorded, share), 1) for share in (0.5, 0.99)],
        }  # fmt: skip
        for number, name in ((0, "p50"), (1, "p99")):
            report[f"added_{name}_ms"] = round(report["recorded_ms"][number] - report["unrecorded_ms"][number], 1)
        print(json.dumps(report), flush=True)
        house.check()
        growing = [
            role for role in ROLES if report["grew_MiB"][role] > MOST_MIB or report["grew_files"][role] > MOST_FILES
        ]
        if growing:
            sys.exit(f"not flat: {', '.join(growing)}")
    finally:
        stop.set()
        soak.close()
        house.close()
        zygote.close()


if __name__ == "__main__":
    main()
