"""Named failpoints, where a test can end the process as `kill -9` would. They do nothing unless the
environment names one.

`SPECL_CRASH_AT=outbox.after_commit` ends the process at that point,
`SPECL_CRASH_AT=outbox.after_commit:3` at its third passage. `SPECL_CRASH_NOTE=FILE`: the process
first appends the name of the point to FILE, so that a test can tell which points were reached.
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
_passages: dict[str, int] = {}


def failpoint(name: str) -> None:
    """End the process here, with exit code 137, if `SPECL_CRASH_AT` names this point and its
    passage.
    """
    setting = os.environ.get("SPECL_CRASH_AT")
    if not setting:
        return
    point, _, passage = setting.partition(":")
    if point != name:
        return
    _passages[name] = _passages.get(name, 0) + 1
    if _passages[name] < int(passage or 1):
        return
    if note := os.environ.get("SPECL_CRASH_NOTE"):
        with open(note, "a", encoding="utf-8") as file:
            file.write(f"{name}\n")
    os._exit(137)
