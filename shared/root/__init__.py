"""SpecLoRA: a local model server that gets faster the more it is used and never changes a word of what it says."""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from specl.shared.client import Client as Client


def __getattr__(name: str) -> object:
    """Load `Client` on first use, so that `import specl` stays light."""
    if name == "Client":
        from specl.shared.client import Client

        return Client
    raise AttributeError(f"module 'specl' has no attribute {name!r}")
