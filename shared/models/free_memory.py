"""Returns memory to the system once nothing holds a model any more."""

import ctypes
import gc
from contextlib import suppress

import mlx.core as mx


def free_memory() -> None:
    """Collect cycles, empty MLX's cache, and have glibc return its free memory (other C libraries
    do so by themselves).
    """
    gc.collect()
    mx.clear_cache()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
