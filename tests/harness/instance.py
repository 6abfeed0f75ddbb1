"""A run directory with real daemons around fake models: start, kill, ask, settle, and check the delivery invariant.

The oracle is Jepsen's: `acknowledged` holds the id of every answer that came with `recorded: true`. After `settle` each of them is
in the store with the text that its client saw, the quarantine and the outbox are empty, and SQLite's own check passes. Ids are
unique in the store, so that a record delivered twice could only double its disagreements: `doubled` counts those.
"""

import hashlib
import os
import shutil
import signal
import sqlite3
import tempfile
import threading
import time
import uuid
from collections import Counter
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from specl.shared.errors import SpecLoraError
from specl.shared.messaging.client import Client
from specl.shared.messaging.connections import gather
from specl.shared.messaging.endpoints import Addresses
from specl.shared.messaging.messages import Done, GetStatus
from specl.shared.paths import Paths
from specl.shared.runtime.locks import holder_of
from specl.shared.settings.load import parse_settings
from tests.harness.forkserver import Forkserver
from tests.harness.waiting import wait_until

INHERITED = ("SPECL_CRASH_NOTE",)  # the forkserver may be older than the test that sets it
SETTINGS = """\
speculative: {num_draft_tokens: 2, temperature: 0.0, max_tokens: 8}
training: {enabled: false, idle_seconds: 0.2, on_battery: true, when_hot: true}
serving: {threads: 1}
"""


def digest(text: str) -> str:
    """A short digest of a text, to compare texts by."""
    return hashlib.sha256(text.encode()).hexdigest()


def read(path: Path, query: str) -> list[Any]:
    """The rows of a query on a SQLite file, read only; none while the file or its tables are not there yet."""
    if not path.exists():
        return []
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5)) as db:
        try:
            return db.execute(query).fetchall()
        except sqlite3.OperationalError:
            return []


class Daemon:
    """One running daemon."""

    def __init__(self, forkserver: Forkserver, role: str, environment: dict[str, str], output: Path) -> None:
        self.forkserver, self.role, self.started = forkserver, role, time.monotonic()
        self.pid: int = forkserver.call(start=role, environment=environment, output=str(output))

    @property
    def code(self) -> int | None:
        """Its exit code, or None while it runs."""
        return self.forkserver.call(poll=self.pid)

    def signal(self, number: int) -> None:
        if self.code is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """kill -9, and wait for the end."""
        self.signal(signal.SIGKILL)
        wait_until(lambda: self.code is not None, 5, f"{self.role} dies")

    def stop(self) -> float:
        """SIGTERM; seconds until it ended."""
        start = time.monotonic()
        self.signal(signal.SIGTERM)
        wait_until(lambda: self.code is not None, 5, f"{self.role} stops")
        return time.monotonic() - start


class Instance:
    """A run directory and what runs in it."""

    def __init__(self, forkserver: Forkserver, settings: str = SETTINGS) -> None:
        self.forkserver = forkserver
        self.folder = Path(tempfile.mkdtemp(prefix="sf-"))
        self.outputs = Path(tempfile.mkdtemp(prefix="so-"))
        self.paths = Paths(self.folder, self.folder / "models").create()
        self.file = self.folder / "settings.yaml"
        self.set(settings)
        self.daemons: list[Daemon] = []
        self.acknowledged: list[str] = []
        self.digests: dict[str, str] = {}  # generation id -> digest of the text that its client saw
        self.latencies: list[float] = []
        self.refusals: Counter[str] = Counter()

    def __enter__(self) -> "Instance":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def set(self, settings: str) -> None:
        """Write the settings that daemons started from now on read."""
        self.file.write_text(settings)
        self.settings = parse_settings(settings, self.file)

    def environment(self, **more: str) -> dict[str, str]:
        """What a process needs to work on this run directory."""
        inherited = {name: os.environ[name] for name in INHERITED if name in os.environ}
        folders = {
            "SPECL_VAR": str(self.folder),
            "SPECL_CONFIG": str(self.file),
            "SPECL_MODELS": str(self.paths.models),
        }
        return inherited | folders | more

    def start(self, role: str, **environment: str) -> Daemon:
        """Start a daemon with these additions to its environment."""
        daemon = Daemon(self.forkserver, role, self.environment(**environment), self.outputs / f"{role}.out")
        self.daemons.append(daemon)
        return daemon

    def output(self, role: str) -> str:
        """What the daemons of a role wrote to their terminal."""
        path = self.outputs / f"{role}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def client(self) -> Client:
        """A new client; the caller closes it."""
        return Client(self.paths, self.settings)

    def status(self, role: str) -> dict[str, Any]:
        """What a daemon answers to GetStatus; empty while it does not answer."""
        endpoint = Addresses(self.paths, self.settings.bus).answer(role)
        answer = gather({role: (endpoint, GetStatus())}, 0.5).get(role)
        return asdict(answer) | {"pid": holder_of(self.paths.run, role)} if answer is not None else {}

    def ready(self, role: str, timeout_s: float = 20) -> dict[str, Any]:
        """Its status, once it answers and is not starting any more."""

        def started() -> dict[str, Any] | None:
            body = self.status(role)
            return body if body and body["state"] != "starting" else None

        try:
            return wait_until(started, timeout_s, f"{role} is ready")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.output(role)[-3000:]}") from None

    def ask(self, prompt: str = "hello", client: Client | None = None, **options: Any) -> Done:
        """One answer, noted in the oracle. Without a `client` it gets one of its own."""
        if client is None:
            with self.client() as client:
                return self.ask(prompt, client, **options)
        start = time.monotonic()
        done = client.ask(prompt, **options)
        self.latencies.append(time.monotonic() - start)
        if done.recorded:
            self.digests[done.generation_id] = digest(done.text)
            self.acknowledged.append(done.generation_id)
        return done

    def load(
        self, stop: threading.Event, rate: float, workers: int = 2, hold: threading.Event | None = None, **options: Any
    ) -> list[threading.Thread]:
        """Ask `rate` times a second from `workers` threads until `stop`, pausing while `hold` is set. Counts refusals by class."""

        def work(number: int) -> None:
            client, count = self.client(), 0
            while not stop.is_set():
                if hold is not None and hold.is_set():
                    stop.wait(0.1)
                    continue
                began, count = time.monotonic(), count + 1
                try:
                    self.ask(f"worker {number} asks {count}", client, **options)
                except SpecLoraError as error:
                    self.refusals[type(error).__name__] += 1
                    client.close()
                    client = self.client()
                stop.wait(max(0.0, workers / rate - (time.monotonic() - began)))
            client.close()

        threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(workers)]
        for thread in threads:
            thread.start()
        return threads

    # ------------------------------------------------------------------------------------------------ the invariant
    def stored(self, table: str = "generations") -> list[str]:
        """Ids in a table of the store."""
        return [row[0] for row in read(self.paths.store, f"SELECT id FROM {table}")]

    def doubled(self) -> list[tuple[str, int]]:
        """Disagreements stored twice (an answer has at most one a position and one a round) or without their answer."""
        return read(
            self.paths.store,
            "SELECT generation_id, position FROM disagreements GROUP BY 1, 2 HAVING count(*) > 1 UNION ALL "
            "SELECT generation_id, position FROM disagreements WHERE generation_id NOT IN (SELECT id FROM generations) "
            "UNION ALL SELECT id, rounds FROM generations g "
            "WHERE (SELECT count(*) FROM disagreements d WHERE d.generation_id = g.id) > rounds",
        )

    def changed(self) -> list[str]:
        """Ids of answers that are stored with another text than the one their client saw."""
        rows = read(self.paths.store, "SELECT id, output FROM generations")
        return [id for id, output in rows if id in self.digests and self.digests[id] != digest(output)]

    def waiting(self, producer: str = "inference") -> list[str]:
        """Ids in an outbox."""
        return [row[0] for row in read(self.paths.outbox(producer), "SELECT id FROM outbox")]

    def settle(self, timeout_s: float = 20) -> float:
        """Start inference and collector where they do not run and wait until all is stored; seconds that took."""
        start = time.monotonic()
        for role in ("inference", "collector"):
            if not any(d.role == role and d.code is None for d in self.daemons):
                self.start(role)
        wait_until(
            lambda: not self.waiting("inference") and set(self.acknowledged) <= set(self.stored()),
            timeout_s,
            f"the outbox empties ({len(self.waiting())} wait)\n{self.output('collector')[-2000:]}",
        )
        return time.monotonic() - start

    def check(self, quarantined: int = 0) -> None:
        """The delivery invariant, with this many rows in the quarantine."""
        lost = set(self.acknowledged) - set(self.stored())
        assert not lost, f"{len(lost)} acknowledged records are not in the store"
        assert not self.doubled(), "disagreements of one answer at one position twice, or of no answer"
        assert not self.changed(), "an answer is stored with another text than its client saw"
        assert len(self.stored("quarantine")) == quarantined
        assert not self.waiting("inference")
        for path in (self.paths.store, self.paths.outbox("inference")):
            assert read(path, "PRAGMA integrity_check") == [("ok",)], path

    def close(self) -> None:
        """End the daemons and remove the folders."""
        for daemon in self.daemons:
            daemon.signal(signal.SIGCONT)
            daemon.signal(signal.SIGTERM)
        for daemon in self.daemons:
            try:
                wait_until(lambda d=daemon: d.code is not None, 6, "stops")
            except AssertionError:
                daemon.kill()
        for folder in (self.folder, self.outputs):
            shutil.rmtree(folder, ignore_errors=True)


def ready_for_training(instance: Instance) -> None:
    """Inference and collector run, and enough recorded answers are stored that a run has what to learn from and to judge on."""
    lean = "enabled: false, heldout_share: 0.4, num_epochs: 2, max_minutes: 0.3, min_heldout_generations: 5, regression_prompts: 0"
    instance.set(SETTINGS.replace("enabled: false", lean))
    instance.start("inference")
    instance.start("collector")
    instance.ready("inference")
    with instance.client() as client:
        for n in range(36):
            instance.ask(f"question {n} of {uuid.uuid4().hex[:6]}", client, temperature=0.8, max_tokens=12)
    instance.settle()
