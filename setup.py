"""The optional native parts; everything else is in pyproject.toml. Nothing is built on macOS, and a failed build never fails the install."""

import sys

from setuptools import Extension, setup

extensions = []
if sys.platform == "linux":
    extensions.append(
        # no Python module: a plain shared object that ctypes loads before MLX (shared/models/blas.py)
        Extension(
            "specl.shared.models._cblas_shim",
            ["shared/models/_cblas_shim.c"],
            optional=True,
            extra_compile_args=["-O2"],
        )
    )
setup(ext_modules=extensions)
