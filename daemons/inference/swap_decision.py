"""What to do about CURRENT: activate the adapter that it names, roll one back, or nothing.

A pure function of ids and marks. Knows no file, no engine and no refusal.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Activate:
    """Make the adapter `id` the active one; empty for none."""

    id: str


@dataclass(frozen=True, slots=True)
class RollBack:
    """Activate `replacement` (empty: none) in place of `adapter`.

    `reason` is that of the mark of `adapter`. It is None where only CURRENT names an adapter that
    was rolled back, and the active one was not.
    """

    adapter: str
    replacement: str
    reason: str | None


Action = Activate | RollBack | None


def decide(current: str, active: str, previous: str, rolled_back: Mapping[str, str]) -> Action:
    """The action for the adapter that CURRENT names, the active one and the `previous` alias.

    `rolled_back` has the reason of each adapter that is rolled back: the trainer did it, or the
    process that did it was killed before CURRENT moved. None: nothing is to be done.
    """
    if current in rolled_back:
        replacement = previous if previous != current and previous not in rolled_back else ""
        return RollBack(active or current, replacement, rolled_back.get(active))
    if current == active:
        return None
    if active in rolled_back:
        return RollBack(active, current, rolled_back[active])
    return Activate(current)
