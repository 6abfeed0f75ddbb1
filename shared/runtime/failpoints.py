"""Named crash points. `SPECL_CRASH_AT=outbox.after_commit` ends the process there, as kill -9 would, so that tests
can die at every step of delivery and publishing. `SPECL_CRASH_AT=name:3` dies at the third passage. `SPECL_CRASH_NOTE=FILE`
has whoever dies write the point's name there first, so that a test can tell where something did die.
"""

import os

POINTS = (
    "outbox.before_commit",
    "outbox.after_commit",
    "outbox.before_delete",
    "outbox.after_delete",
    "record.before_done",
    "fetch.before_request",
    "fetch.after_reply",
    "store.before_commit",
    "store.after_commit",
    "adapter.files_written",
    "adapter.before_rename",
    "adapter.after_rename",
    "adapter.before_current",
    "adapter.after_current",
    "adapter.before_publish",
    "training.after_checkpoint",
    "swap.before_activate",
    "swap.after_activate",
)
_passed: dict[str, int] = {}


def crash_point(name: str) -> None:
    """Die here if `SPECL_CRASH_AT` says so."""
    wanted = os.environ.get("SPECL_CRASH_AT")
    if not wanted:
        return
    point, _, nth = wanted.partition(":")
    if point != name:
        return
    _passed[name] = _passed.get(name, 0) + 1
    if _passed[name] >= int(nth or 1):
        if note := os.environ.get("SPECL_CRASH_NOTE"):
            with open(note, "a", encoding="utf-8") as file:
                file.write(f"{name}\n")
        os._exit(137)
