"""What speaks against work that can wait: the machine runs on its battery, or is hot. What cannot be read is no objection.

macOS: `pmset -g batt` and `pmset -g therm` (man pmset, under GETTING). Their lines, from Apple's pmset.c (PowerManagement,
apple-oss-distributions): `Now drawing from 'Battery Power'` (or `AC Power`, `UPS Power`); `Thermal Warning Level = N`, where IOPM.h
has 0 for normal and 255 for unknown; `CPU_Speed_Limit = N` per cent, 100 for all of it. Nothing recorded is a line
`Note: No thermal warning level has been recorded`.
Linux: the files of /sys/class/power_supply (the kernel's Documentation/ABI/testing/sysfs-class-power); heat is not looked at.
"""

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SUPPLIES = Path("/sys/class/power_supply")
PMSET = "/usr/bin/pmset"
PATIENCE_S = 2.0
UNKNOWN_LEVEL = 255
_BATTERY = re.compile(r"drawing from '(?:Battery|UPS) Power'")
_LEVEL = re.compile(r"Thermal Warning Level\s*=\s*(\d+)")
_LIMIT = re.compile(r"CPU_(?:Speed|Scheduler)_Limit\s*=\s*(\d+)")


@dataclass(frozen=True, slots=True)
class Power:
    """A look at the machine."""

    on_battery: bool = False
    hot: bool = False


def read() -> Power:
    """How it is now; on a Mac two short commands."""
    if sys.platform == "darwin":
        return read_mac(_pmset)
    return Power(on_battery=drains(SUPPLIES)) if sys.platform == "linux" else Power()


def read_mac(pmset: Callable[[str], str]) -> Power:
    """The same by what `pmset -g WHAT` prints."""
    return Power(drawing_from_battery(pmset("batt")), is_hot(pmset("therm")))


def drawing_from_battery(told: str) -> bool:
    """Whether `pmset -g batt` says that the battery, or a UPS, is what feeds the machine."""
    return _BATTERY.search(told) is not None


def is_hot(told: str) -> bool:
    """Whether `pmset -g therm` tells of a warning or of a processor that is held back."""
    warned = any(0 < int(level) < UNKNOWN_LEVEL for level in _LEVEL.findall(told))
    return warned or any(int(limit) < 100 for limit in _LIMIT.findall(told))


def drains(supplies: Path) -> bool:
    """Whether a battery of the machine (not a mouse's) discharges and nothing that feeds it is plugged in."""
    discharges = False
    try:
        found = sorted(supplies.iterdir())
    except OSError:
        return False
    for supply in found:
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


def _pmset(what: str) -> str:
    """What it prints; nothing where it cannot be run or hangs."""
    try:
        done = subprocess.run(
            [PMSET, "-g", what], stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE_S, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode("utf-8", "replace")
