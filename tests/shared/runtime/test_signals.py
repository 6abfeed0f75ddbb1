"""The priority of the trainer: the lowest in its session, and a low one for a session
that it leads.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from specl.shared.runtime.signals import SESSION_NICE

AUTOGROUP = Path("/proc/self/autogroup")
PRINT_PRIORITY = """
import os, pathlib
from specl.shared.runtime.signals import lower_priority
lower_priority()
group = pathlib.Path("/proc/self/autogroup")
print(os.nice(0), group.read_text() if group.exists() else "")
"""


def shared_by_session():
    """Whether this kernel shares the processor out by session: the file is empty where the feature
    is off.
    """
    return AUTOGROUP.exists() and bool(AUTOGROUP.read_text().split())


def priority(new_session):
    """Nice value and session priority of a process that has lowered its priority."""
    command = [sys.executable, "-c", PRINT_PRIORITY]
    process = subprocess.run(command, capture_output=True, text=True, start_new_session=new_session)
    assert process.returncode == 0, process.stderr
    return process.stdout.split()


@pytest.mark.process
def test_nice_is_the_lowest():
    assert priority(new_session=False)[0] == priority(new_session=True)[0] == "19"


@pytest.mark.process
@pytest.mark.skipif(not shared_by_session(), reason="this kernel does not share the processor out by session")
def test_only_a_session_leader_lowers_its_session():
    session = AUTOGROUP.read_text().split()[-1]
    assert priority(new_session=True)[-1] == SESSION_NICE
    assert priority(new_session=False)[-1] == session == AUTOGROUP.read_text().split()[-1]
