"""The file of what was typed into `specl-ctl chat`: where it lies, how messages are marked in it, whether it is kept."""

from pathlib import Path

from specl.shared.paths import Paths
from specl.shared.settings.schema import Records

FENCE = '"""'


HISTORY = "chat_history"  # in the logs' folder, where a purge looks message by message


def history_file(paths: Paths) -> Path:
    """Where typed messages are remembered."""
    return paths.logs / HISTORY


def history_is_kept(records: Records) -> bool:
    """Whether the settings allow text to stay on disk unchanged and unlimited."""
    return records.keep == "content" and not records.redact and not records.retention_days
