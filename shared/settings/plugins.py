"""Someone's own code by name: `module:name` in the settings. Knows what to import, nothing of what it is for.

The module is looked for as Python does: installed, on PYTHONPATH, or in the folder that the daemons were started in. It runs
with the daemon's rights, so a settings file is as much to be trusted as a program.
"""

import importlib
import re
from collections.abc import Callable
from typing import Any

from specl.shared.errors import ConfigError

NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_hook(name: str) -> bool:
    """Whether it has the form `module:name`."""
    return NAME.fullmatch(name) is not None


def load_hook(name: str, setting: str) -> Callable[..., Any]:
    """What `name` stands for. Raises ConfigError that names the setting where there is no such thing to call."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except AttributeError as error:
        raise ConfigError(f"{setting}: the module {module} has no {attribute!r}") from error
    except Exception as error:  # a module of somebody else's: importing it may raise anything
        reason = (str(error).splitlines() or [""])[0]
        raise ConfigError(
            f"{setting}: the module {module} cannot be imported ({type(error).__name__}: {reason})",
            "PYTHONPATH must name its folder when the daemons start",
        ) from error
    if not callable(found):
        raise ConfigError(f"{setting}: {name} is not callable")
    return found
