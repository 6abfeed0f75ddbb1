"""Whether the machine runs on its battery or is hot. What cannot be read counts as neither. Knows
nothing of who asks.

macOS: `pmset -g batt` and `pmset -g therm` (man pmset, under GETTING). Their lines are those of
Apple's pmset.c (PowerManagement, apple-oss-distributions): `Now drawing from 'Battery Power'` (or
`AC Power`, `UPS Power`); `Thermal Warning Level = N`, where IOPM.h has 0 for normal and 255 for
unknown; `CPU_Speed_Limit = N` per cent, 100 for no limit. Where nothing was recorded, the line is
`Note: No thermal warning level has been recorded`. Linux: the files of /sys/class/power_supply (the
kernel's Documentation/ABI/testing/sysfs-class-power); heat is not read.
"""

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SUPPLIES = Path("/sys/class/power_supply")
PMSET = "/usr/bin/pmset"
PMSET_TIMEOUT_S = 2.0
UNKNOWN_LEVEL = 255
_BATTERY = re.compile(r"drawing from '(?:Battery|UPS) Power'")
_LEVEL = re.compile(r"Thermal Warning Level\s*=\s*(\d+)")
_LIMIT = re.compile(r"CPU_(?:Speed|Scheduler)_Limit\s*=\s*(\d+)")


@dataclass(frozen=True, slots=True)
class Power:
    """The state of the machine's power supply and of its temperature."""

    on_battery: bool = False
    hot: bool = False


def read() -> Power:
    """The present state; on a Mac from two short commands."""
    if sys.platform == "darwin":
        return read_mac(_pmset)
    return Power(on_battery=is_discharging(SUPPLIES)) if sys.platform == "linux" else Power()


def read_mac(pmset: Callable[[str], str]) -> Power:
    """The state of a Mac; `pmset(topic)` returns what `pmset -g TOPIC` prints."""
    return Power(drawing_from_battery(pmset("batt")), is_hot(pmset("therm")))


def drawing_from_battery(output: str) -> bool:
    """Whether the output of `pmset -g batt` names the battery, or a UPS, as the source of power."""
    return _BATTERY.search(output) is not None


def is_hot(output: str) -> bool:
    """Whether the output of `pmset -g therm` has a thermal warning or a limit of the processor
    below 100 per cent.
    """
    warning = any(0 < int(level) < UNKNOWN_LEVEL for level in _LEVEL.findall(output))
    return warning or any(int(limit) < 100 for limit in _LIMIT.findall(output))


def is_discharging(power_supplies: Path) -> bool:
    """Whether a battery of the machine (not a mouse's) discharges and no charger is plugged in."""
    discharges = False
    try:
        supplies = sorted(power_supplies.iterdir())
    except OSError:
        return False
    for supply in supplies:
        kind = _word(supply / "type")
        if kind in ("Mains", "USB", "Wireless") and _word(supply / "online") not in ("", "0"):
            return False
        if kind == "Battery" and _word(supply / "scope") != "Device":
            discharges |= _word(supply / "status") == "Discharging"
    return discharges


def _word(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _pmset(topic: str) -> str:
    """What `pmset -g TOPIC` prints; empty where it cannot be run or takes longer than
    PMSET_TIMEOUT_S.
    """
    try:
        process = subprocess.run(
            [PMSET, "-g", topic], stdin=subprocess.DEVNULL, capture_output=True, timeout=PMSET_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return process.stdout.decode("utf-8", "replace")
