"""SpecLoRA: a local model server that gets faster the more it is used and never changes a word of what it says."""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from specl.shared.in_process import Answer as Answer
    from specl.shared.in_process import Engine as Engine
    from specl.shared.messaging.client import Client as Client

_WHERE = {"Client": "messaging.client", "Engine": "in_process", "Answer": "in_process"}


def __getattr__(name: str) -> object:
    """Load `Client`, `Engine` and `Answer` on first use, so that `import specl` stays light."""
    if name in _WHERE:
        from importlib import import_module

        return getattr(import_module(f"specl.shared.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'specl' has no attribute {name!r}")
