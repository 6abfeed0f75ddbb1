"""How loading tells its caller what takes long: one sentence a step. Knows no terminal and no log."""

import sys
from collections.abc import Callable

from specl.shared.runtime.terminal import visible

Report = Callable[[str], None]


def no_report(message: str) -> None:
    """For callers that show nothing."""


def to_stderr(message: str) -> None:
    """For programs without a terminal interface of their own."""
    print(visible(message), file=sys.stderr, flush=True)
