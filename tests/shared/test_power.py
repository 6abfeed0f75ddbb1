"""What pmset prints and what Linux has in /sys, read; and that what cannot be read is no objection.

The texts of pmset were recorded by others (none of this ran on a Mac here): public bug reports and posts, and the format strings of
Apple's pmset.c where nobody published a warning.
"""

import pytest

from specl.shared.runtime import power
from specl.shared.runtime.power import Power, drains, drawing_from_battery, is_hot, read_mac

ON_BATTERY = """\
Now drawing from 'Battery Power'
 -InternalBattery-0 (id=4653155)\t100%; discharging; 20:00 remaining present: true
"""
PLUGGED_IN = """\
Now drawing from 'AC Power'
 -InternalBattery-0 (id=24182883)\t100%; charged; 0:00 remaining present: true
"""
FULL_BUT_NOT_CHARGING = """\
Now drawing from 'AC Power'
 -InternalBattery-0 (id=4653155)\t80%; AC attached; not charging present: true
"""
DESKTOP = "Now drawing from 'AC Power'\n"
UPS = "Now drawing from 'UPS Power'\n -Back-UPS ES 700G (id=1)\t98%; discharging; 0:40 remaining present: true\n"

APPLE_SILICON = """\
Note: No thermal warning level has been recorded
Note: No performance warning level has been recorded
Note: No CPU power status has been recorded
"""
INTEL = """\
Note: No thermal warning level has been recorded
Note: No performance warning level has been recorded
2025-04-06 20:50:47 -0500 CPU Power notify
\tCPU_Scheduler_Limit \t= 100
\tCPU_Available_CPUs \t= 12
\tCPU_Speed_Limit \t= 100
"""
SLOWED = """\
2021-07-07 12:32:50 -0400 CPU Power notify
\tCPU_Scheduler_Limit \t= 100
\tCPU_Available_CPUs \t= 8
\tCPU_Speed_Limit \t= 90
"""
SCHEDULED_AWAY = (
    "CPU Power notify\n\tCPU_Scheduler_Limit \t= 40\n\tCPU_Available_CPUs \t= 8\n\tCPU_Speed_Limit \t= 100\n"
)
FEW_CORES = "\tCPU_Scheduler_Limit \t= 100\n\tCPU_Available_CPUs \t= 8\n\tCPU_Speed_Limit \t= 100\n"


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (ON_BATTERY, True),
        (UPS, True),
        (PLUGGED_IN, False),
        (FULL_BUT_NOT_CHARGING, False),
        (DESKTOP, False),
        ("", False),
    ],
)
def test_what_feeds_a_mac(told, expected):
    assert drawing_from_battery(told) is expected


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (APPLE_SILICON, False), (INTEL, False), (FEW_CORES, False), ("", False), ("Error: No thermal warning level", False),
        (SLOWED, True), (SCHEDULED_AWAY, True),
        ("2026-01-02 10:00:00 +0100 Thermal Warning Level = 5\n", True), ("Thermal Warning Level = 100\n", True),
        ("Thermal Warning Level = 0\n", False), ("Thermal Warning Level = 255\n", False),
    ],
)  # fmt: skip
def test_whether_a_mac_is_hot(told, expected):
    assert is_hot(told) is expected


def test_a_mac_is_asked_both():
    assert read_mac({"batt": ON_BATTERY, "therm": SLOWED}.__getitem__) == Power(True, True)
    assert read_mac({"batt": PLUGGED_IN, "therm": APPLE_SILICON}.__getitem__) == Power(False, False)


@pytest.mark.parametrize(
    "command", ["#!/bin/sh\nexit 1\n", "#!/bin/sh\nsleep 30\n", "#!/bin/sh\nprintf '\\377'\n", None]
)
def test_a_pmset_that_fails_hangs_or_is_not_there_is_no_objection(tmp_path, monkeypatch, command):
    file = tmp_path / "pmset"
    if command is not None:
        file.write_text(command)
        file.chmod(0o700)
    monkeypatch.setattr(power, "PMSET", str(file))
    monkeypatch.setattr(power, "PATIENCE_S", 0.2)
    monkeypatch.setattr(power.sys, "platform", "darwin")
    assert power.read() == Power()


def test_pmset_is_called_as_its_manual_says(tmp_path, monkeypatch):
    file = tmp_path / "pmset"
    file.write_text("""#!/bin/sh\n[ "$1 $2" = "-g batt" ] && echo "Now drawing from 'Battery Power'"\nexit 0\n""")
    file.chmod(0o700)
    monkeypatch.setattr(power, "PMSET", str(file))
    monkeypatch.setattr(power.sys, "platform", "darwin")
    assert power.read() == Power(on_battery=True)


@pytest.fixture
def supplies(tmp_path):
    """`supplies(AC={"type": "Mains", ...})`: a folder as in /sys/class/power_supply."""

    def make(**found):
        for name, facts in found.items():
            (tmp_path / name).mkdir()
            for fact, value in facts.items():
                (tmp_path / name / fact).write_text(f"{value}\n")
        return tmp_path

    return make


BATTERY = {"type": "Battery", "status": "Discharging", "scope": "System"}
AC = {"type": "Mains", "online": 0}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"AC": AC, "BAT0": BATTERY}, True),
        ({"AC": AC, "BAT0": {"type": "Battery", "status": "Discharging"}}, True),  # `scope` is often not there
        ({"AC": {"type": "Mains", "online": 1}, "BAT0": BATTERY}, False),  # a weak charger under load
        ({"AC": AC, "usb": {"type": "USB", "online": 1}, "BAT0": BATTERY}, False),
        ({"AC": AC, "BAT0": BATTERY | {"status": "Full"}, "BAT1": BATTERY}, True),
        ({"BAT0": BATTERY}, True),
        ({"AC": AC, "BAT0": BATTERY | {"status": "Charging"}}, False),
        ({"AC": AC, "mouse": BATTERY | {"scope": "Device"}}, False),
        ({"AC": AC}, False),
        ({"odd": {}}, False),
        ({}, False),
    ],
)
def test_what_feeds_a_linux_machine(supplies, found, expected):
    assert drains(supplies(**found)) is expected


def test_a_machine_without_the_folder_is_fed(tmp_path):
    assert drains(tmp_path / "nothing") is False


def test_this_machine_can_be_looked_at():
    assert isinstance(power.read(), Power)
