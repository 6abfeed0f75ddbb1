"""Plugins: code of the user's that the settings name as `module:name`. Knows how to import it,
nothing of its use.

Python looks for the module where it looks for every module: installed, on PYTHONPATH, and last, once a
plugin is named, in the folder where the daemons were started. The code runs with the daemon's rights, so a settings file
must be trusted as much as a program.
"""

import importlib
import os
import re
import sys
from collections.abc import Callable
from typing import Any, cast

from specl.shared.errors import ConfigError

NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_plugin(name: str) -> bool:
    """Whether `name` has the form `module:name`."""
    return NAME.fullmatch(name) is not None


def load_plugin(name: str, setting: str) -> Callable[..., Any]:
    """The callable that `name` stands for. Raises ConfigError, which names the setting, where there
    is none.
    """
    module, _, attribute = name.partition(":")
    if (folder := os.getcwd()) not in sys.path:
        sys.path.append(folder)  # last: files there must not replace installed modules
    try:
        hook = getattr(importlib.import_module(module), attribute)
    except AttributeError as error:
        raise ConfigError(f"{setting}: the module {module} has no {attribute!r}") from error
    except (Exception, SystemExit) as error:  # the user's module: importing it may raise anything
        reason = (str(error).splitlines() or [""])[0]
        raise ConfigError(
            f"{setting}: the module {module} cannot be imported ({type(error).__name__}: {reason})",
            "PYTHONPATH must name its folder when the daemons start",
        ) from error
    if not callable(hook):
        raise ConfigError(f"{setting}: {name} is not callable")
    return cast("Callable[..., Any]", hook)
