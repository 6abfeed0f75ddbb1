"""Options that several commands have: those of sampling, each with one meaning everywhere; and
whether output is coloured.
"""

import math
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


class Number(click.FloatRange):
    """A range of numbers that refuses `nan`, which click lets pass because it compares with
    nothing.
    """

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number. Fails for one outside of the range."""
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value!r} is no number.", param, ctx)
        return number


TEMPERATURE = Number(0, 10)
TOP_P = Number(0, 1, min_open=True)
_SAMPLING = {
    "max-tokens": (click.IntRange(1), "Most tokens of an answer."),
    "temperature": (TEMPERATURE, "0 is greedy: always the target's most likely token."),
    "top-p": (TOP_P, "Sample from the fewest tokens whose probabilities add up to this."),
    "top-k": (click.IntRange(0), "Sample from this many tokens at most; 0: all."),
    "min-p": (Number(0, 1), "Leave out tokens less likely than this share of the most likely one."),
    "seed": (
        click.IntRange(-(2**63), 2**63 - 1),
        "The same seed gives the same text, whatever drafts; -1: a random one.",
    ),
}


def sampling_options(*names: str) -> Callable[[Command], Command]:
    """A decorator that adds these options (all of them without names), in this order. An option
    left out is None.
    """

    def add(command: Command) -> Command:
        for name in reversed(names or tuple(_SAMPLING)):
            kind, text = _SAMPLING[name]
            command = click.option(f"--{name}", type=kind, help=text)(command)
        return command

    return add


def wants_colour() -> bool:
    """Whether stdout is a terminal and the user has not switched colours off."""
    return sys.stdout.isatty() and not no_colour()


def no_colour() -> bool:
    """Whether NO_COLOR is set, to anything (https://no-color.org)."""
    return bool(os.environ.get("NO_COLOR"))
