"""The supervisor's module names: units on users' machines hold them."""

import subprocess
import sys

import pytest


@pytest.mark.process
def test_units_of_the_former_name_still_work():
    outcome = subprocess.run([sys.executable, "-m", "specl.daemons.keep"], capture_output=True, text=True)
    assert outcome.returncode == 78 and "is now specl.daemons.supervise" in outcome.stderr
    assert "usage: python -m specl.daemons.supervise" in outcome.stderr
