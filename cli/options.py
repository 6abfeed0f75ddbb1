"""The options of sampling, the same wherever a command has them, and whether anybody wants colours."""

import math
import os
import sys
from typing import Any

import click


class Number(click.FloatRange):
    """A range that `nan`, which compares with nothing, is not in."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number. Fails for one outside."""
        found = super().convert(value, param, ctx)
        if math.isnan(found):
            self.fail(f"{value!r} is no number.", param, ctx)
        return found


TEMPERATURE = Number(0, 10)
TOP_P = Number(0, 1, min_open=True)
_SAMPLING = {
    "max-tokens": (click.IntRange(1), "Most tokens of an answer."),
    "temperature": (TEMPERATURE, "0 is greedy: the target's own first choice every time."),
    "top-p": (TOP_P, "DraftSampler from the fewest tokens that weigh this much."),
    "top-k": (click.IntRange(0), "DraftSampler from this many tokens at most; 0: all."),
    "min-p": (Number(0, 1), "Leave out tokens less likely than this share of the first."),
    "seed": (click.IntRange(-(2**63), 2**63 - 1), "One seed, one text, whatever drafts."),
}


def sampling(*names: str) -> Any:
    """A decorator that adds these options (all of them without names), in this order; left out they are None."""

    def add(command: Any) -> Any:
        for name in reversed(names or tuple(_SAMPLING)):
            kind, said = _SAMPLING[name]
            command = click.option(f"--{name}", type=kind, help=said)(command)
        return command

    return add


def wants_colour() -> bool:
    """Whether stdout is a terminal of somebody who did not say no."""
    return sys.stdout.isatty() and not no_colour()


def no_colour() -> bool:
    """Whether NO_COLOR is set, to anything (https://no-color.org)."""
    return bool(os.environ.get("NO_COLOR"))
