"""Reading what pmset prints and what Linux has in /sys; what cannot be read counts as mains power
and a cool machine.

The outputs of pmset come from public bug reports and posts, and from the format strings of Apple's
pmset.c where nobody published a warning. None of them was recorded on a Mac here.
"""

import pytest

from specl.shared.runtime import power
from specl.shared.runtime.power import Power, drawing_from_battery, is_discharging, is_hot, read_mac

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
    ("output", "expected"),
    [
        (ON_BATTERY, True),
        (UPS, True),
        (PLUGGED_IN, False),
        (FULL_BUT_NOT_CHARGING, False),
        (DESKTOP, False),
        ("", False),
    ],
)
def test_battery_and_ups_feed_a_mac(output, expected):
    assert drawing_from_battery(output) is expected


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (APPLE_SILICON, False), (INTEL, False), (FEW_CORES, False), ("", False), ("Error: No thermal warning level", False),
        (SLOWED, True), (SCHEDULED_AWAY, True),
        ("2026-01-02 10:00:00 +0100 Thermal Warning Level = 5\n", True), ("Thermal Warning Level = 100\n", True),
        ("Thermal Warning Level = 0\n", False), ("Thermal Warning Level = 255\n", False),
    ],
)  # fmt: skip
def test_a_mac_with_a_warning_is_hot(output, expected):
    assert is_hot(output) is expected


def test_a_mac_is_asked_for_power_and_heat():
    assert read_mac({"batt": ON_BATTERY, "therm": SLOWED}.__getitem__) == Power(True, True)
    assert read_mac({"batt": PLUGGED_IN, "therm": APPLE_SILICON}.__getitem__) == Power(False, False)


@pytest.mark.process
@pytest.mark.parametrize(
    "command", ["#!/bin/sh\nexit 1\n", "#!/bin/sh\nsleep 30\n", "#!/bin/sh\nprintf '\\377'\n", None]
)
def test_a_broken_pmset_counts_as_mains_power(tmp_path, monkeypatch, command):
    file = tmp_path / "pmset"
    if command is not None:
        file.write_text(command)
        file.chmod(0o700)
    monkeypatch.setattr(power, "PMSET", str(file))
    monkeypatch.setattr(power, "PMSET_TIMEOUT_S", 0.2)
    monkeypatch.setattr(power.sys, "platform", "darwin")
    assert power.read() == Power()


@pytest.mark.process
def test_pmset_gets_the_arguments_of_its_manual(tmp_path, monkeypatch):
    file = tmp_path / "pmset"
    file.write_text("""#!/bin/sh\n[ "$1 $2" = "-g batt" ] && echo "Now drawing from 'Battery Power'"\nexit 0\n""")
    file.chmod(0o700)
    monkeypatch.setattr(power, "PMSET", str(file))
    monkeypatch.setattr(power.sys, "platform", "darwin")
    assert power.read() == Power(on_battery=True)


@pytest.fixture
def supplies(tmp_path):
    """`supplies(AC={"type": "Mains", ...})`: a folder as in /sys/class/power_supply."""

    def make(**supplies):
        for name, files in supplies.items():
            (tmp_path / name).mkdir()
            for file, value in files.items():
                (tmp_path / name / file).write_text(f"{value}\n")
        return tmp_path

    return make


BATTERY = {"type": "Battery", "status": "Discharging", "scope": "System"}
AC = {"type": "Mains", "online": 0}


@pytest.mark.parametrize(
    ("present", "expected"),
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
def test_a_discharging_battery_feeds_a_linux_machine(supplies, present, expected):
    assert is_discharging(supplies(**present)) is expected


def test_no_power_supply_folder_means_mains(tmp_path):
    assert is_discharging(tmp_path / "nothing") is False


def test_the_power_of_this_machine_is_readable():
    assert isinstance(power.read(), Power)
