"""SpecLoRA: a local model server that gets faster the more it is used and never changes a word of
what it says.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from specl.shared.in_process import Answer as Answer
    from specl.shared.in_process import Engine as Engine
    from specl.shared.messaging.client import Client as Client

_MODULES = {"Client": "messaging.client", "Engine": "in_process", "Answer": "in_process"}


def __getattr__(name: str) -> object:
    """Import `Client`, `Engine` and `Answer` on first use, so that `import specl` stays fast."""
    if name in _MODULES:
        from importlib import import_module

        return getattr(import_module(f"specl.shared.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'specl' has no attribute {name!r}")
