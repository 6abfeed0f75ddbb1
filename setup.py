"""The optional native parts; everything else about the package stands in pyproject.toml.

What cannot be built (no compiler, no headers) never fails an installation: the package then works on the
ordinary path and says so once. Nothing is built on macOS, where MLX's own kernels are the fast path.
"""

import sys
from pathlib import Path

from setuptools import Extension, setup

NATIVE = Path("shared/native/src")


def native_extension() -> Extension | None:
    """The MLX extension of specl.shared.native; None where its headers are missing."""
    try:
        import mlx.core
        import nanobind
    except ImportError as missing:
        print(f"speclora: built without the native CPU kernels ({missing})", file=sys.stderr)
        return None
    mlx_root = Path(mlx.core.__file__).parent
    nanobind_root = Path(nanobind.include_dir()).parent
    sources = sorted(str(p) for p in NATIVE.glob("*.cpp"))
    return Extension(
        "specl.shared.native._native",
        sources=sources,
        depends=[str(p) for pattern in ("*.h", "*.inl") for p in NATIVE.glob(pattern)],
        include_dirs=[
            str(mlx_root / "include"),
            str(nanobind_root / "include"),
            str(nanobind_root / "src"),
            str(nanobind_root / "ext" / "robin_map" / "include"),
        ],
        # one domain with mlx's own bindings, so that its arrays are ours
        define_macros=[("NB_DOMAIN", "mlx"), ("NDEBUG", None), ("NB_COMPACT_ASSERTIONS", None)],
        library_dirs=[str(mlx_root / "lib")],
        libraries=["mlx"],
        # mlx.core is imported first and its library is then found by name; the path serves the plain layout as well
        runtime_library_dirs=["$ORIGIN/../../../mlx/lib"],
        extra_compile_args=[
            "-std=c++20",
            "-O3",
            # a product's last bit must not depend on what the compiler chose to contract
            "-ffp-contract=off",
            "-fvisibility=hidden",
            "-fno-strict-aliasing",
            "-pthread",
            "-Wno-maybe-uninitialized",
            "-Wno-uninitialized",
            "-g0",
        ],
        extra_link_args=["-pthread", "-Wl,-s"],
        language="c++",
        optional=True,
    )


def blas_shim() -> Extension:
    """No Python module: a plain shared object that ctypes loads before MLX (shared/models/blas.py)."""
    return Extension(
        "specl.shared.models._cblas_shim",
        ["shared/models/_cblas_shim.c"],
        optional=True,
        extra_compile_args=["-O2"],
    )


extensions = [blas_shim(), native_extension()] if sys.platform == "linux" else []
setup(ext_modules=[extension for extension in extensions if extension is not None])
