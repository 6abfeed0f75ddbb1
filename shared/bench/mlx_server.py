"""mlx_lm.server without a draft as the rival of a bench: on loopback, with the target's weights as
the engine holds them.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from specl.shared.bench.scratch_daemons import stop
from specl.shared.errors import SpecLoraError
from specl.shared.models.language_model import LanguageModel

START_S = 120.0
SERVE = "import specl.shared.models; from mlx_lm.server import main; main()"  # binds the BLAS that the engine has


def save_dense(target: LanguageModel, folder: Path) -> None:
    """Write the weights as the engine holds them to a folder that mlx-lm reads, so that both
    compute with the same numbers.
    """
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
    """`with MlxServer(target) as server`: a server on a free port, gone after the block. Raises
    SpecLoraError if it does not start.
    """

    def __init__(self, target: LanguageModel) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slbench-mlx-"))
        save_dense(target, self.folder)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-P", "-c", SERVE, "--model", str(self.folder)]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        self._log = self.folder / "output.txt"
        with open(self._log, "wb") as out:
            self._process = subprocess.Popen(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=out, stderr=out)

    def __enter__(self) -> "MlxServer":
        try:
            self._wait_ready()
        except BaseException:
            self.close()
            raise
        return self

    def _wait_ready(self) -> None:
        end = time.monotonic() + START_S
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > end:
                lines = self._log.read_text(errors="replace").strip().splitlines() or ["it printed nothing"]
                raise SpecLoraError(f"mlx_lm.server did not start: {lines[-1]}")
            time.sleep(0.1)

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=1):
                return True
        except OSError:
            return False

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process and remove the folder."""
        stop([self._process])
        shutil.rmtree(self.folder, ignore_errors=True)

    def complete(self, messages: list[dict[str, Any]], limit: int, temperature: float, top_p: float) -> int:
        """Answer a chat; the number of tokens of the answer."""
        body = {"messages": messages, "max_tokens": limit, "temperature": temperature, "top_p": top_p}
        url = f"http://127.0.0.1:{self.port}/v1/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=600) as reply:
            return int(json.load(reply)["usage"]["completion_tokens"])
