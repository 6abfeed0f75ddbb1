"""What a command loads before it does anything. Modules are counted: they are what start-up costs, and a busy machine does not
change their number.
"""

import json
import os
import subprocess
import sys

import pytest
from fault_house import House, Zygote

CODE = """
import json, sys
from specl.cli.main import main
try:
    main({arguments!r})
except SystemExit:
    pass
print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""
NEVER = {"sqlalchemy", "mlx", "numpy", "asyncio", "structlog", "starlette", "prompt_toolkit", "transformers"}


def loaded(*arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(arguments=list(arguments))],
        env=os.environ | environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return set(json.loads(done.stderr.splitlines()[-1])), done.stdout


@pytest.fixture
def house():
    starter = Zygote()
    made = House(starter)
    yield made
    made.close()
    starter.close()


def test_status_with_daemons_up_loads_no_database_library(house):
    house.start("collector")
    house.ready("collector")
    modules, said = loaded("status", "--json", **house.environment())
    assert json.loads(said)["collector"]["state"] == "ready"
    assert not modules & NEVER and "rich" not in modules and len(modules) < 380
    modules, said = loaded("status", **house.environment())
    assert "collector" in said and not modules & NEVER and len(modules) < 430


def test_status_with_daemons_down_and_nothing_stored_loads_none_either():
    modules, _ = loaded("status", "--json")
    assert not modules & NEVER and len(modules) < 380


def test_ask_loads_what_it_sends_with():
    modules, _ = loaded("ask", "hello")
    assert "zmq" in modules and not modules & NEVER and "rich" not in modules and len(modules) < 370
