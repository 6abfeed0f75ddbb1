"""Real daemons around the fake models of tests/fault."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "fault"))
from fault_house import House, Zygote


@pytest.fixture(scope="module")
def starter():
    made = Zygote()
    yield made
    made.close()


@pytest.fixture
def house(starter):
    made = House(starter)
    yield made
    made.close()
