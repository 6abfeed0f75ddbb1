"""A real gateway process in front of a real inference daemon with the fake models of tests/fault."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx2 as httpx
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "fault"))
from fault_house import SETTINGS, House, Zygote, wait_until

from specl.shared.status import gateway_file

SLOW = {"SPECL_TEST_TOKEN_MS": "15"}


class Gateway:
    """One gateway process over a house."""

    def __init__(self, house, settings="", **environment):
        self.house = house
        house.set(SETTINGS + settings)
        self.output = house.outputs / "gateway.out"
        gateway_file(house.paths).unlink(missing_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "specl.daemons.gateway"],
            env=os.environ | house.environment(**environment), stdout=open(self.output, "ab"), stderr=subprocess.STDOUT,
        )  # fmt: skip

    def said(self):
        try:
            return json.loads(gateway_file(self.house.paths).read_text())
        except (OSError, ValueError):
            return {}

    def ready(self):
        def there():
            assert self.process.poll() is None, self.output.read_text()
            return self.said().get("address")

        return wait_until(there, 20, "the gateway listens")

    def stop(self):
        start = time.monotonic()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(timeout=10)
        return time.monotonic() - start


@contextlib.contextmanager
def new_house(zygote):
    house = House(zygote)
    try:
        yield house
    finally:
        house.close()


@pytest.fixture(scope="session")
def starter():
    made = Zygote()
    yield made
    made.close()


@pytest.fixture(scope="module")
def running(starter):
    """Inference, collector and gateway for a whole module."""
    with new_house(starter) as house:
        house.start("inference", **SLOW)
        house.start("collector")
        gateway = Gateway(house, "gateway: {port: 0}\n")
        house.ready("inference")
        gateway.url = gateway.ready()
        yield gateway
        gateway.stop()


@pytest.fixture
def new_gateway():
    """The class: `new_gateway(house, settings)`."""
    return Gateway


@pytest.fixture
def lone(starter):
    """`lone(settings)`: a gateway on a run directory of its own, with nothing else running."""
    stack, made = contextlib.ExitStack(), []

    def start(settings="gateway: {port: 0}\n", **environment):
        made.append(Gateway(stack.enter_context(new_house(starter)), settings, **environment))
        return made[-1]

    yield start
    for gateway in made:
        gateway.stop()
    stack.close()


@pytest.fixture
def http(running):
    with httpx.Client(base_url=running.url, timeout=30) as client:
        yield client
