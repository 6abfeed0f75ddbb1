"""The three daemons as children of a command, in a scratch run directory: for `demo`, benches and tests."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ruamel.yaml import YAML

from specl.shared.errors import SpecLoraError
from specl.shared.messaging.client import Client
from specl.shared.messaging.codes import DaemonState
from specl.shared.paths import ROLES, Paths
from specl.shared.settings.schema import Settings

STOP_S = 5.0
START_S = 120.0


@contextmanager
def scratch_daemons(
    settings: Settings,
    models: Path,
    keep: bool = False,
    say: Callable[[str], None] = lambda text: None,
    folder: Path | None = None,
) -> Iterator[Client]:
    """Start inference, collector and trainer on a fresh run directory and yield a client once they are ready.

    The run directory is removed afterwards unless `keep`; a `folder` that is given is the caller's and stays. Raises
    SpecLoraError where a daemon does not come up.
    """
    own = folder is None
    if folder is None:
        folder = scratch_folder()
    paths = Paths(folder, models).create()
    file = folder / "settings.yaml"
    with open(file, "w", encoding="utf-8") as target:
        YAML().dump(settings.model_dump(mode="json"), target)
    environment = os.environ | {
        "SPECL_VAR": str(folder),
        "SPECL_MODELS": str(models),
        "SPECL_CONFIG": str(file),
        "SPECL_DIE_WITH_PARENT": str(os.getpid()),
    }
    output = open(paths.logs / "daemons.out", "wb")  # noqa: SIM115 - handed to the children
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "specl.daemons.supervise", role],
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        for role in ROLES
    ]
    client = Client(paths, settings)
    try:
        _wait_ready(client, children, paths, say)
        yield client
    finally:
        client.close()
        _stop(children)
        output.close()
        if keep:
            say(f"kept: {folder}")
        elif own:
            shutil.rmtree(folder, ignore_errors=True)


def scratch_folder() -> Path:
    """A new folder with a short path: those of sockets are limited to about 100 bytes."""
    return Path(tempfile.mkdtemp(prefix="specl-"))


def _wait_ready(
    client: Client, children: list[subprocess.Popen[bytes]], paths: Paths, say: Callable[[str], None]
) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        daemons = client.status()
        inference = daemons.inference
        if (
            daemons.answering() == list(ROLES)
            and inference
            and inference.state in (DaemonState.READY, DaemonState.BUSY)
        ):
            return
        if any(child.poll() is not None for child in children):
            break
        time.sleep(0.2)
    tail = (paths.logs / "daemons.out").read_text(errors="replace").strip().splitlines()[-5:]
    raise SpecLoraError("the daemons did not come up:\n" + "\n".join(tail))


def _stop(children: list[subprocess.Popen[bytes]]) -> None:
    for child in children:
        child.terminate()
    end = time.monotonic() + STOP_S
    for child in children:
        try:
            child.wait(timeout=max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
