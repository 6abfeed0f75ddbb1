"""One gateway process over the run directory of an instance."""

import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

from specl.shared.status import gateway_file
from tests.harness.instance import SETTINGS, Instance
from tests.harness.waiting import wait_until

ANY_PORT = "gateway: {port: 0}\n"


class Gateway:
    """A gateway; `settings` are added to those of the instance."""

    def __init__(self, instance: Instance, settings: str = ANY_PORT, **environment: str) -> None:
        self.instance = instance
        instance.set(SETTINGS + settings)
        self.output = instance.outputs / "gateway.out"
        gateway_file(instance.paths).unlink(missing_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "specl.daemons.gateway"],
            env=os.environ | instance.environment(**environment), stdout=open(self.output, "ab"), stderr=subprocess.STDOUT,
        )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """What its state file says; empty while there is none."""
        try:
            return json.loads(gateway_file(self.instance.paths).read_text())
        except (OSError, ValueError):
            return {}

    def ready(self) -> str:
        """Its address, once it listens."""

        def address() -> str | None:
            assert self.process.poll() is None, self.output.read_text()
            return self.state().get("address")

        return wait_until(address, 40, "the gateway listens")

    def stop(self) -> float:
        """SIGTERM; seconds until it ended."""
        start = time.monotonic()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(timeout=10)
        return time.monotonic() - start
