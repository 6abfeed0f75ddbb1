"""What commands print: foreign text with visible escapes, and letters that the terminal lacks
replaced. Files and pipes get JSON that any of them can hold.
"""

import json
import sys
from typing import Any

import click

from specl.shared.runtime.terminal import visible


def tolerate_letters() -> None:
    """Let stdout and stderr replace what their encoding cannot hold, instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None and getattr(stream, "errors", "") in ("strict", "surrogateescape"):
            reconfigure(errors="replace")


def echo(text: object = "", err: bool = False) -> None:
    """Print a line that holds foreign text."""
    click.echo(visible(text), err=err)


def echo_answer(text: str) -> None:
    """Print a piece of an answer: with visible escapes on a terminal, as it is in a pipe or file."""
    click.echo(visible(text) if sys.stdout.isatty() else text, nl=False)


def json_line(value: Any) -> str:
    """A JSON value in one line: letters as they are where stdout can hold all of them, else as
    escapes.
    """
    encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("_", "-")
    return json.dumps(value, ensure_ascii=encoding not in ("utf-8", "utf8"))
