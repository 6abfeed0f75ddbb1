"""What a command loads before it does anything. Modules are counted: they are what start-up costs,
and a busy machine does not change their number.
"""

import json
import os
import subprocess
import sys

import pytest

from specl.shared.paths import find_paths

CODE = """
import json, sys
from specl.cli.main import main
try:
    main({arguments!r})
except SystemExit:
    pass
print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""
HEAVY = {"sqlalchemy", "mlx", "numpy", "asyncio", "structlog", "starlette", "prompt_toolkit", "transformers", "scipy"}


def run_and_list_modules(*arguments, **environment):
    """The modules that a command has imported when it ends, and its output."""
    process = subprocess.run(
        [sys.executable, "-c", CODE.format(arguments=list(arguments))],
        env=os.environ | environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return set(json.loads(process.stderr.splitlines()[-1])), process.stdout


@pytest.fixture
def instance(new_instance):
    """A run directory that no other test uses."""
    return new_instance()


def test_status_of_running_daemons_loads_nothing_heavy(instance):
    for role in ("collector", "inference"):
        instance.start(role)
        instance.ready(role)
    modules, output = run_and_list_modules("status", "--json", **instance.environment())
    assert json.loads(output)["inference"]["state"] == "ready"
    assert not modules & (HEAVY | {"rich"}) and len(modules) < 380
    modules, output = run_and_list_modules("status", **instance.environment())
    assert "collector" in output and not modules & HEAVY and len(modules) < 460


@pytest.mark.process
def test_status_without_daemons_loads_nothing_heavy():
    modules, _ = run_and_list_modules("status", "--json")
    assert not modules & HEAVY and len(modules) < 380


@pytest.mark.process
def test_ask_loads_nothing_heavy():
    find_paths().create()
    modules, _ = run_and_list_modules("ask", "hello")
    assert "zmq" in modules and not modules & (HEAVY | {"rich"}) and len(modules) < 380


@pytest.mark.process
def test_help_loads_no_settings_and_no_sockets():
    modules, _ = run_and_list_modules("--help")
    assert not modules & (HEAVY | {"zmq", "pydantic", "rich"})
