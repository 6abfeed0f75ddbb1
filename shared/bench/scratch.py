"""Processes that a measurement starts and ends: our daemons and mlx_lm.server, in a scratch folder, on loopback and ipc only."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from specl.shared.bench.arms import Answer, timed
from specl.shared.bench.prompt_sets import BenchPrompt
from specl.shared.errors import DaemonUnreachable, SpecLoraError
from specl.shared.messaging.client import Client
from specl.shared.messaging.codes import DaemonState
from specl.shared.messaging.messages import Purge
from specl.shared.models.language_model import LanguageModel
from specl.shared.paths import Paths
from specl.shared.sampling_params import SamplingParams
from specl.shared.settings.schema import Settings
from specl.shared.status import state_of

READY_S = 120.0
STOP_S = 5.0
SERVE_MLX = "import specl.shared.models; from mlx_lm.server import main; main()"  # binds the BLAS that ours has


def _wait_until(ready: Any, process: subprocess.Popen[bytes], log: Path, what: str) -> None:
    end = time.monotonic() + READY_S
    while not ready():
        if process.poll() is not None or time.monotonic() > end:
            tail = log.read_text(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
            raise SpecLoraError(f"{what} did not start: {tail[0]}")
        time.sleep(0.1)


def _stop(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    processes = list(processes)
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class ScratchDaemons:
    """Inference and collector on a run directory of their own, which goes when they go. Nothing of the user's is touched."""

    def __init__(self, settings: Settings, target: Path, draft: str | None, models: Path, costs: Path) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slbench-"))
        self.paths = Paths(self.folder, models)
        changed = settings.model_dump(mode="json")
        changed["models"]["target"]["name"], changed["models"]["draft"]["name"] = str(target), draft
        changed["training"]["enabled"] = False
        file = self.folder / "settings.yaml"
        file.write_text(json.dumps(changed))
        if costs.is_dir():
            shutil.copytree(costs, self.paths.costs)
        self.settings = Settings.model_validate(changed)
        environment = os.environ | {
            "SPECL_VAR": str(self.folder),
            "SPECL_CONFIG": str(file),
            "SPECL_MODELS": str(models),
        }
        environment["SPECL_DIE_WITH_PARENT"] = str(os.getpid())
        self._log = self.folder / "output.txt"
        with open(self._log, "wb") as out:
            self._processes = [
                subprocess.Popen(
                    [sys.executable, "-m", f"specl.daemons.{role}"], env=environment, stdout=out, stderr=out
                )
                for role in ("inference", "collector")
            ]

    def client(self) -> Client:
        """A new one; each thread needs its own."""
        return Client(self.paths, self.settings)

    def __enter__(self) -> "ScratchDaemons":
        try:
            _wait_until(self._ready, self._processes[0], self._log, "the scratch inference daemon")
        except BaseException:
            self.close()
            raise
        return self

    def _ready(self) -> bool:
        try:
            with self.client() as client:
                return state_of(client, "inference") == DaemonState.READY
        except DaemonUnreachable:
            return False

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes and remove the folder."""
        _stop(self._processes)
        shutil.rmtree(self.folder, ignore_errors=True)


class DaemonArm:
    """Ours through the daemon, with sockets, records and store. Its clock is the client's.

    The daemon does not tell how many drafts were refused; rounds with a draft that did not stand whole are an upper bound.
    """

    name = "daemon detailed"

    def __init__(self, daemons: ScratchDaemons, sampling: SamplingParams, mode: str = "detailed") -> None:
        self.name = f"daemon {mode}"
        self.client = daemons.client()
        self.wish = {"temperature": sampling.temperature, "top_p": sampling.top_p, "mode": mode}

    def answer(self, item: BenchPrompt, prompt: list[int], limit: int) -> Answer:
        """See Arm. The daemon's prefix cache is emptied first, so that it reads the whole prompt too."""
        self.client.command("inference", Purge([], None, ""))
        ask = self.client.request(item.messages, max_tokens=limit, **self.wish)
        answer = timed(delta.tokens for delta in self.client.deltas(ask))
        stats = self.client.last.stats
        answer.rounds, answer.drafted, answer.accepted = stats.rounds, stats.drafted, stats.accepted
        answer.model_drafted, answer.model_accepted = stats.model_drafted, stats.model_accepted
        answer.k_histogram = {int(k): count for k, count in stats.k_histogram.items()}
        answer.drafting_rounds = answer.rounds - answer.k_histogram.get(0, 0)
        answer.rejected = min(answer.drafted - answer.accepted, answer.drafting_rounds)
        return answer

    def resume(self, tokens: list[int], limit: int) -> list[int] | None:
        """See Arm: the daemon takes text, not tokens."""
        return None


def save_dense(target: LanguageModel, folder: Path) -> None:
    """The weights as we hold them, as a folder that mlx-lm reads: the rival gets the very same numbers."""
    config = {name: value for name, value in target.config.items() if not name.startswith("quantization")}
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(
        str(folder / "model.safetensors"), dict(tree_flatten(target.model.parameters())), metadata={"format": "mlx"}
    )
    for path in target.path.iterdir():
        if path.suffix in (".json", ".jinja", ".txt", ".model") and path.name not in (
            "config.json",
            "model.safetensors.index.json",
        ):
            shutil.copy(path, folder / path.name)


class MlxServer:
    """mlx_lm.server without a draft, on loopback, with the target's weights as we hold them and the BLAS that we use."""

    def __init__(self, target: LanguageModel) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slbench-mlx-"))
        save_dense(target, self.folder)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [
            sys.executable,
            "-c",
            SERVE_MLX,
            "--model",
            str(self.folder),
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
        ]
        self._log = self.folder / "output.txt"
        with open(self._log, "wb") as out:
            self._process = subprocess.Popen(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=out, stderr=out)

    def __enter__(self) -> "MlxServer":
        try:
            _wait_until(self._ready, self._process, self._log, "mlx_lm.server")
        except BaseException:
            self.close()
            raise
        return self

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=1):
                return True
        except OSError:
            return False

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process and remove the folder."""
        _stop([self._process])
        shutil.rmtree(self.folder, ignore_errors=True)

    def complete(self, messages: list[dict[str, Any]], limit: int, temperature: float, top_p: float) -> int:
        """How many tokens it answered with."""
        body = {"messages": messages, "max_tokens": limit, "temperature": temperature, "top_p": top_p}
        url = f"http://127.0.0.1:{self.port}/v1/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=600) as reply:
            return int(json.load(reply)["usage"]["completion_tokens"])
