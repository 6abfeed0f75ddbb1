"""How every daemon starts."""

import os
import subprocess
import sys

import pytest

SHOW = """
import resource
from specl.daemons.run import run_exclusively
run_exclusively("inference", lambda paths, settings: print("limit", resource.getrlimit(resource.RLIMIT_CORE)))
"""


@pytest.mark.process
def test_crash_of_a_daemon_leaves_no_core_file(tmp_path):
    command = ["sh", "-c", 'ulimit -S -c unlimited; exec "$@"', "sh", sys.executable, "-P", "-c", SHOW]
    shown = subprocess.run(command, env=os.environ | {"SPECL_VAR": str(tmp_path)}, capture_output=True, text=True)
    assert "limit (0, 0)" in shown.stdout, shown.stderr
