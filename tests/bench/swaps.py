"""Adapters swapped under load: does anybody's request fail or change its text, how long is the pause, does anything leak?

    python -m tests.bench.swaps [--model tiny|builtin] [--requests 1000] [--swaps 200] [--json FILE]

The inference daemon's own loop, threads and sockets, in this process so that its weights can be hashed; clients over ZeroMQ.
`tiny` puts a random pair in place of the models. The pause is all that a swap does on the MLX thread between two rounds: read, verify,
fuse, write CURRENT. Exit code 0: nothing failed, greedy texts are those of plain decoding, base weights bit-identical.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

import specl.daemons.inference.decode_thread as decode_thread
import specl.daemons.inference.scheduler as scheduling
from specl.daemons.inference.service import Inference
from specl.shared.adapters.registry import Adapters, Manifest
from specl.shared.adapters.tensors import write_tensors
from specl.shared.messaging.bus import Server
from specl.shared.messaging.client import Client
from specl.shared.messaging.endpoints import Addresses
from specl.shared.models import blas  # noqa: F401 - binds the BLAS before mlx loads
from specl.shared.models.lora import LoraShape, choose_layers, linear_layers
from specl.shared.paths import Paths
from specl.shared.settings.load import parse_settings
from tests.harness.fake_models import fake_engine

CLIENTS, PROMPTS = 4, 20
SETTINGS = "speculative: {temperature: 0.0, ngram: false}\ntraining: {enabled: false}\nserving: {threads: 1}\n"


class Daemon:
    """An inference daemon in this process, with a stopwatch at its rounds and swaps."""

    def __init__(self, folder: Path, tiny: bool) -> None:
        models = Path(os.environ.get("SPECL_MODELS") or Path(__file__).resolve().parents[2] / "var" / "models")
        self.paths, self.settings = Paths(folder, models).create(), parse_settings(SETTINGS, folder / "settings.yaml")
        if tiny:
            decode_thread.load_engine = fake_engine
        self.rounds: list[float] = []
        self.pauses: list[float] = []
        scheduling.decode_rounds = self._timed(scheduling.decode_rounds, self.rounds)
        addresses = Addresses(self.paths, self.settings.bus)
        self.server = Server(addresses.answer("inference"), addresses.publish("inference"))
        self.inference = Inference(self.paths, self.settings, self.server)
        self.stopping: list[bool] = []
        self._thread = threading.Thread(target=self.inference.run, args=(self.stopping,))
        self._thread.start()
        while self.worker.engine is None:
            if self.worker.failure:
                raise self.worker.failure
            time.sleep(0.05)
        self.worker.swap.advance = self._timed(self.worker.swap.advance, self.pauses)

    @property
    def worker(self) -> "decode_thread.DecodeThread":
        return self.inference.decoding

    @staticmethod
    def _timed(action, times: list[float]):
        def run(*arguments):
            start = time.perf_counter()
            try:
                return action(*arguments)
            finally:
                times.append(1000 * (time.perf_counter() - start))

        return run

    def on_mlx(self, action):
        """The result of `action` on the thread that owns MLX."""
        done, found = threading.Event(), []
        self.worker.call(lambda: (found.append(action()), done.set()))
        done.wait()
        return found[0]

    def base_hash(self) -> str:
        """Of every weight of target and pristine draft; call without an adapter."""

        def read() -> str:
            digest, engine = hashlib.sha256(), self.worker.engine
            for module in (engine.target.model, engine.draft_module):
                for name, value in sorted(tree_flatten(module.parameters())):
                    digest.update(name.encode() + bytes(memoryview(value.view(mx.uint8))))
            return digest.hexdigest()

        return self.on_mlx(read)

    def active_mb(self) -> float:
        """What MLX holds, its free buffers given back."""
        return self.on_mlx(lambda: (mx.clear_cache(), mx.get_active_memory() / 2**20)[1])

    def close(self) -> None:
        self.stopping.append(True)
        self.server.wake()
        self._thread.join(20)


def publish_random(daemon: Daemon, id: str, size: float = 0.02) -> None:
    """A random adapter over every linear layer of the draft; CURRENT stays where it is."""
    engine, adapters = daemon.worker.engine, Adapters(daemon.paths.adapters)
    module = engine.draft_module
    shape = LoraShape(8, 16.0, 0.0, choose_layers(module, "all"))
    rng, weights = np.random.default_rng(int(id)), {}
    for key in shape.keys:
        out, inner = linear_layers(module)[key].weight.shape
        weights[f"{key}.lora_a"] = mx.array(size * rng.normal(size=(inner, 8)).astype(np.float32))
        weights[f"{key}.lora_b"] = mx.array(size * rng.normal(size=(8, out)).astype(np.float32))
    scratch = adapters.scratch(id)
    write_tensors(scratch, shape, weights, None)
    target = engine.target
    prints = (engine.draft_fingerprint, target.fingerprint, target.tokenizer_fingerprint)
    manifest = Manifest(
        id, "lora", time.time(), engine.draft.name, *prints, "", "", 8, 16.0, list(shape.keys), 1.0, {}, {}
    )
    adapters.publish(scratch, manifest, make_current=False)


@dataclass
class Load:
    """Requests from several clients; `done` counts them."""

    daemon: Daemon
    texts: list[str]
    tokens: int
    requests: int
    done: int = 0
    failed: list[str] = field(default_factory=list)
    changed: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, number: int) -> None:
        """One client's share."""
        with Client(self.daemon.paths, self.daemon.settings) as client:
            for turn in range(number, self.requests, CLIENTS):
                try:
                    text = client.ask(prompt(turn), max_tokens=self.tokens).text
                except Exception as error:  # whatever it is, it is what is counted here
                    text = None
                    self.failed.append(f"{type(error).__name__}: {error}")
                with self.lock:
                    self.done += 1
                    self.changed += text is not None and text != self.texts[turn % PROMPTS]


def prompt(turn: int) -> str:
    """One of the PROMPTS."""
    number = turn % PROMPTS
    return f"Name {2 + number} things that one finds in a {('kitchen', 'garden', 'harbour', 'library')[number % 4]}."


def rss_mb() -> float:
    """Resident memory of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def percentiles(values: list[float]) -> dict[str, float]:
    """p50, p99 and the largest, ms."""
    p50, p99 = np.percentile(values, (50, 99))
    return {"p50_ms": round(float(p50), 2), "p99_ms": round(float(p99), 2), "max_ms": round(max(values), 2)}


def measure(tiny: bool, requests: int, swaps: int, tokens: int) -> dict:
    """The whole experiment; its figures."""
    folder = Path(tempfile.mkdtemp(prefix="sw-"))
    daemon = Daemon(folder, tiny)
    try:
        return _measured(daemon, requests, swaps, tokens)
    finally:
        daemon.close()
        shutil.rmtree(folder, ignore_errors=True)


def _measured(daemon: Daemon, requests: int, swaps: int, tokens: int) -> dict:
    before = daemon.base_hash()
    with Client(daemon.paths, daemon.settings) as client:
        texts = [
            client.ask(prompt(n), max_tokens=tokens, num_draft_tokens=0, record=False).text for n in range(PROMPTS)
        ]
        for id in ("000001", "000002"):
            daemon.on_mlx(lambda id=id: publish_random(daemon, id))
        active, daemon_rounds = daemon.active_mb(), len(daemon.rounds)
        load = Load(daemon, texts, tokens, requests)
        threads = [threading.Thread(target=load.run, args=(number,)) for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
        refused, levels = _swap_along(client, load, swaps)
        for thread in threads:
            thread.join()
        pauses = daemon.pauses[:]
        client.set_adapter("")
        marks = Adapters(daemon.paths.adapters).rolled_back()
        return {
            "requests": load.done, "failed": len(load.failed), "failures": sorted(set(load.failed))[:5],
            "texts_changed": load.changed, "swaps": swaps, "pieces": len(pauses), "swaps_refused": refused,
            "pause": percentiles(pauses), "round": percentiles(daemon.rounds[daemon_rounds:]),
            "pause_in_rounds": round(float(np.percentile(pauses, 99) / np.median(daemon.rounds[daemon_rounds:])), 3),
            "base_identical": daemon.base_hash() == before, "rolled_back_by_the_watch": len(marks),
            "mlx_active_mb": [round(active, 2), round(daemon.active_mb(), 2)],
            "rss_mb": [round(level, 1) for level in levels],
        }  # fmt: skip


def _swap_along(client: Client, load: Load, swaps: int) -> tuple[int, list[float]]:
    """Swap whenever the load has come as far; how many were refused, resident memory along the way."""
    refused, levels = 0, []
    for number in range(swaps):
        while load.done < load.requests * number // swaps:
            time.sleep(0.002)
        refused += not client.set_adapter(f"00000{1 + number % 2}").ok
        if number % max(1, swaps // 8) == 0:
            levels.append(rss_mb())
    return refused, [*levels, rss_mb()]


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("tiny", "builtin"), default="tiny")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--swaps", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=8, help="tokens of each answer")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = measure(options.model == "tiny", options.requests, options.swaps, options.tokens)
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    good = found["failed"] == found["texts_changed"] == found["swaps_refused"] == 0 and found["base_identical"]
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
