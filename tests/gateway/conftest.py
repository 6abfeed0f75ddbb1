"""A real gateway process in front of a real inference daemon with fake models."""

import httpx2 as httpx
import pytest

from tests.harness.gateway import ANY_PORT, Gateway
from tests.harness.instance import Instance

SLOW = {"SPECL_TEST_TOKEN_MS": "15"}


@pytest.fixture(scope="module")
def running(forkserver):
    """Inference, collector and gateway for a whole module."""
    with Instance(forkserver) as instance:
        instance.start("inference", **SLOW)
        instance.start("collector")
        gateway = Gateway(instance)
        instance.ready("inference")
        gateway.url = gateway.ready()
        yield gateway
        gateway.stop()


@pytest.fixture
def lone(new_instance):
    """`lone(settings)`: a gateway on a run directory of its own, with nothing else running."""
    gateways = []

    def start(settings=ANY_PORT, **environment):
        gateways.append(Gateway(new_instance(), settings, **environment))
        return gateways[-1]

    yield start
    for gateway in gateways:
        gateway.stop()


@pytest.fixture
def http(running):
    with httpx.Client(base_url=running.url, timeout=30) as client:
        yield client
