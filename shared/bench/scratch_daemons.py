"""Daemons as children of a command, in a scratch run directory, for `demo`, benches and tests. The
user's store is not touched.

Knows processes and folders. Imports no MLX, so that a command that only talks to
daemons starts fast.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ruamel.yaml import YAML

from specl.shared.errors import SpecLoraError
from specl.shared.messaging.client import Client
from specl.shared.messaging.codes import DaemonState
from specl.shared.paths import ROLES, Paths
from specl.shared.settings.schema import Settings

STOP_S = 5.0
START_S = 120.0
READY = (DaemonState.READY, DaemonState.BUSY)
LOG_LINES = 5  # of the daemons' output that an error quotes


def scratch_folder() -> Path:
    """A new folder with a short path: those of sockets are limited to about 100 bytes."""
    return Path(tempfile.mkdtemp(prefix="specl-"))


def with_models(settings: Settings, target: Path, draft: str | None) -> Settings:
    """Settings for a bench: these models, and no training."""
    values = settings.model_dump(mode="json")
    values["models"]["target"]["name"], values["models"]["draft"]["name"] = str(target), draft
    values["training"]["enabled"] = False
    return Settings.model_validate(values)


class ScratchDaemons:
    """`with ScratchDaemons(settings, models) as daemons`: the daemons of `roles`, ready when the
    block begins and gone after it.

    Their run directory is `folder`, which then is the caller's and stays, or a new one that is
    removed at the end unless `keep`. `costs` is a folder of measured costs to begin with. Entering
    raises SpecLoraError where a daemon does not come up.
    """

    def __init__(
        self,
        settings: Settings,
        models: Path,
        roles: Sequence[str] = ROLES,
        *,
        folder: Path | None = None,
        costs: Path | None = None,
        keep: bool = False,
        report: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.settings, self.roles = settings, tuple(roles)
        self._removes, self._keep, self._report = folder is None, keep, report
        self.paths = Paths(folder or scratch_folder(), models).create()
        if costs is not None and costs.is_dir():
            shutil.copytree(costs, self.paths.costs, dirs_exist_ok=True)
        self._children: list[subprocess.Popen[bytes]] = []

    def client(self) -> Client:
        """A new client; each thread needs its own."""
        return Client(self.paths, self.settings)

    def __enter__(self) -> "ScratchDaemons":
        try:
            self._start()
            self._wait_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the daemons and remove their folder."""
        stop(self._children)
        if self._keep:
            self._report(f"kept: {self.paths.root}")
        elif self._removes:
            shutil.rmtree(self.paths.root, ignore_errors=True)

    def _start(self) -> None:
        file = self.paths.root / "settings.yaml"
        with open(file, "w", encoding="utf-8") as target:
            YAML().dump(self.settings.model_dump(mode="json"), target)
        environment = os.environ | {
            "SPECL_VAR": str(self.paths.root),
            "SPECL_MODELS": str(self.paths.models),
            "SPECL_CONFIG": str(file),
            "SPECL_DIE_WITH_PARENT": str(os.getpid()),
        }
        with open(self._output, "wb") as output:
            for role in self.roles:
                command = [sys.executable, "-P", "-m", "specl.daemons.supervise", role]
                self._children.append(
                    subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
                )

    @property
    def _output(self) -> Path:
        return self.paths.logs / "daemons.out"

    def _wait_ready(self) -> None:
        end = time.monotonic() + START_S
        with self.client() as client:
            while time.monotonic() < end and all(child.poll() is None for child in self._children):
                daemons = client.status(roles=self.roles)
                states = {role: status.state for role in self.roles if (status := daemons.get(role)) is not None}
                if len(states) == len(self.roles) and states.get("inference", DaemonState.READY) in READY:
                    return
                time.sleep(0.2)
        lines = self._output.read_text(errors="replace").strip().splitlines()[-LOG_LINES:]
        raise SpecLoraError("the daemons did not come up:\n" + "\n".join(lines or ["they printed nothing"]))


def stop(children: Iterable[subprocess.Popen[bytes]]) -> None:
    """End processes together: politely, and after STOP_S seconds by force."""
    children = list(children)
    for child in children:
        child.terminate()
    end = time.monotonic() + STOP_S
    for child in children:
        try:
            child.wait(timeout=max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
