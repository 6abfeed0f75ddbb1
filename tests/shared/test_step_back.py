"""The trainer's priority: the lowest within its session, and its session low among others where it leads one."""

import subprocess
import sys
from pathlib import Path

import pytest

from specl.shared.runtime.signals import SESSION_NICE

AUTOGROUP = Path("/proc/self/autogroup")
TELL = """
import os, pathlib
from specl.shared.runtime.signals import lower_priority
lower_priority()
group = pathlib.Path("/proc/self/autogroup")
print(os.nice(0), group.read_text() if group.exists() else "")
"""


def shared_by_session():
    """Whether this kernel shares the processor out by session: the file is empty where the feature is off."""
    return AUTOGROUP.exists() and bool(AUTOGROUP.read_text().split())


def said(own_session):
    done = subprocess.run([sys.executable, "-c", TELL], capture_output=True, text=True, start_new_session=own_session)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_nice_is_the_lowest():
    assert said(False)[0] == said(True)[0] == "19"


@pytest.mark.skipif(not shared_by_session(), reason="this kernel does not share the processor out by session")
def test_a_session_of_its_own_steps_back_as_a_whole_and_somebody_elses_does_not():
    mine = AUTOGROUP.read_text().split()[-1]
    assert said(True)[-1] == SESSION_NICE
    assert said(False)[-1] == mine == AUTOGROUP.read_text().split()[-1]
