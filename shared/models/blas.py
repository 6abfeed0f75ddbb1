"""Binds a fast BLAS under MLX on Linux, at import, before MLX loads. On macOS (Accelerate) there is
nothing to do.

The `mlx[cpu]` wheel carries the reference BLAS: 8192x2048 times 64 rows takes 924 ms against 31 ms
(measured, 2 cores). libmlx binds `cblas_*` lazily through the global scope, so a library loaded
first with RTLD_GLOBAL wins. In this order: scipy-openblas32 through our shim (built at install
where there is a C compiler), the system's libopenblas, PyPI's ngsolve-openblas.
`SPECL_BLAS=/path/to/lib.so` overrides, `SPECL_BLAS=none` leaves MLX alone.
"""

import ctypes
import ctypes.util
import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REMEDY = "install a C compiler and reinstall (`pip install --force-reinstall --no-deps .`), or the package libopenblas0-pthread"


@dataclass(frozen=True, slots=True)
class Blas:
    """The BLAS that is bound. `fast` is false only for the reference BLAS."""

    name: str
    fast: bool
    note: str = ""


def _scipy_openblas() -> tuple[Path, Path] | None:
    """The library of scipy-openblas32 and the shim of this package; None unless both are installed."""
    spec = importlib.util.find_spec("scipy_openblas32")
    shims = sorted(Path(__file__).parent.glob("_cblas_shim*.so"))
    if spec is None or not spec.submodule_search_locations or not shims:
        return None
    libraries = sorted(Path(spec.submodule_search_locations[0]).glob("lib/libscipy_openblas*.so"))
    return (libraries[0], shims[0]) if libraries else None


def _candidates() -> Iterator[tuple[str, list[str]]]:
    """Providers and the libraries to load for each, best first."""
    if pair := _scipy_openblas():
        yield "scipy-openblas32", [str(path) for path in pair]
    if system := ctypes.util.find_library("openblas"):
        yield f"system {system}", [system]
    for folder in map(Path, sys.path):
        for library in folder.glob("ngsolve_openblas*/**/libopenblas*.so*"):
            yield "ngsolve-openblas", [str(library)]


def _load(libraries: list[str]) -> str:
    """Load libraries into the global scope; why that failed, or empty."""
    try:
        for library in libraries:
            handle = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
        handle.cblas_sgemm  # noqa: B018 - raises AttributeError where the symbol is missing
    except (OSError, AttributeError) as error:
        return str(error)
    _HANDLES.extend(ctypes.CDLL(library) for library in libraries)
    return ""


def bind() -> Blas:
    """Bind the best provider that is installed. Never raises: without one MLX computes, slowly."""
    if sys.platform != "linux":
        return Blas("the system's", fast=True)
    override = os.environ.get("SPECL_BLAS", "")
    if override == "none":
        return Blas("mlx's own", fast=False, note="SPECL_BLAS=none")
    if "mlx.core" in sys.modules:
        return Blas("mlx's own", fast=False, note="mlx was imported before specl; import specl.shared.models first")
    failures = []
    for name, libraries in [(override, [override])] if override else list(_candidates()):
        failure = _load(libraries)
        if not failure:
            return Blas(name, fast=True)
        failures.append(f"{name}: {failure}")
    return Blas("reference (slow)", fast=False, note="; ".join(failures) or "no OpenBLAS found")


def set_threads(count: int) -> None:
    """Use `count` threads in products, never more than this process has cores; 0 leaves the
    provider's choice (all).

    Threads beyond the cores would wait for each other by spinning. Does nothing on providers that
    are not OpenBLAS.
    """
    if count <= 0:
        return
    if hasattr(os, "sched_getaffinity"):
        count = min(count, len(os.sched_getaffinity(0)))
    for handle in _HANDLES:
        for symbol in ("scipy_openblas_set_num_threads", "openblas_set_num_threads"):
            if hasattr(handle, symbol):
                getattr(handle, symbol)(ctypes.c_int(count))


_HANDLES: list[ctypes.CDLL] = []
BOUND = bind()
