"""Whether the C++ extension can be used: it is built, for this MLX, this CPU has kernels, and its
self-test passes.

Decided once, at the first call. Promises: at most one warning, with the remedy; never an
exception. `SPECL_NATIVE=0` turns it off, `SPECL_NATIVE_ISA` names an instruction set (avx512,
avx2, neon, scalar).
"""

import functools
import importlib
import os
import sys
import warnings
from types import ModuleType

import mlx.core as mx
import numpy as np

REMEDY = "reinstall speclora beside this mlx: pip install --force-reinstall --no-deps --no-build-isolation ."

MAX_WIDTH = 16  # rows; wider inputs go to the ordinary product, which is faster there


@functools.cache
def load_extension() -> tuple[ModuleType | None, str]:
    """The extension and an empty text, or None and the reason."""
    if os.environ.get("SPECL_NATIVE", "1") == "0":
        return None, "turned off by SPECL_NATIVE=0"
    if sys.platform != "linux":
        return None, "built on Linux only"
    if mx.default_device().type != mx.DeviceType.cpu:
        return None, "MLX runs on a GPU"
    try:
        module = importlib.import_module("specl.shared.native._native")
    except ImportError as error:
        return None, _warn(f"the native CPU kernels are not built ({error}); with a C++ compiler, {REMEDY}")
    built, present = module.mlx_version, mx.__version__  # type: ignore[attr-defined]  # not in mlx's stubs
    if built != present:
        return None, _warn(f"the native CPU kernels were built for mlx {built}, this is {present}; {REMEDY}")
    isa = os.environ.get("SPECL_NATIVE_ISA", "")
    if isa and not module.use_isa(isa):
        return None, _warn(f"SPECL_NATIVE_ISA={isa}: this machine has {', '.join(module.isas())}")
    if not isa and module.isa() == "scalar":
        return None, "this CPU has none of AVX-512, AVX2 and NEON"
    try:
        problem = _self_test(module)
    except (TypeError, ValueError, RuntimeError) as error:  # another binding ABI refuses every array with a TypeError
        problem = str(error).splitlines()[0]
    if problem:
        return None, _warn(f"the native CPU kernels failed their self-test ({problem}) and are off; {REMEDY}")
    return module, ""


def _warn(text: str) -> str:
    warnings.warn(text, RuntimeWarning, stacklevel=4)
    return text


def _self_test(module: ModuleType) -> str:
    """Compare the extension's products with numpy's in float64; the first problem, or empty."""
    noise = np.random.default_rng(0)
    n, k = 37, 192
    dense = noise.standard_normal((n, k)).astype(np.float32)
    scales, offsets = (noise.standard_normal((n, k // 32)).astype(np.float16).astype(np.float32) for _ in range(2))
    packed = [module.pack_float(mx.array(dense), "f32"), module.pack_float(mx.array(dense), "bf16")]
    expected = [dense, np.array(mx.array(dense).astype(mx.bfloat16).astype(mx.float32))]
    for bits in (4, 8):
        values = noise.integers(0, 2**bits, (n, k)).astype(np.uint8)
        packed.append(module.pack_affine(mx.array(values), mx.array(scales), mx.array(offsets), bits, 32))
        expected.append(np.repeat(scales, 32, 1) * values + np.repeat(offsets, 32, 1))
    for weight, reference in zip(packed, expected, strict=True):
        if not np.allclose(np.array(weight.unpack()), reference, rtol=1e-6, atol=1e-6):
            return f"{weight.format} weights do not come back"
        for width in (1, 5, MAX_WIDTH):
            x = noise.standard_normal((width, k)).astype(np.float32)
            expected_y = x.astype(np.float64) @ np.array(weight.unpack()).astype(np.float64).T
            y = np.array(module.linear(mx.array(x), weight))
            tolerance = 1e-5 * np.abs(expected_y).max()
            if y.shape != expected_y.shape or not np.allclose(y, expected_y, rtol=1e-4, atol=tolerance):
                return f"{weight.format} product of {width} rows"
    return ""


def native() -> ModuleType:
    """The extension. Raises RuntimeError where `available()` is false."""
    module, problem = load_extension()
    if module is None:
        raise RuntimeError(problem)
    return module


def available() -> bool:
    """Whether this process can use the native kernels."""
    return load_extension()[0] is not None


def reason() -> str:
    """Why the native kernels cannot be used; empty where they can."""
    return load_extension()[1]


def instruction_sets() -> list[str]:
    """The instruction sets of this machine that there are kernels for, best first; `scalar` is
    always there.
    """
    names: list[str] = native().isas()
    return names


def instruction_set() -> str:
    """The instruction set in use."""
    return str(native().isa())


def use_instruction_set(name: str) -> None:
    """Switch to another of `instruction_sets()`; the results are the same bits."""
    if not native().use_isa(name):
        raise ValueError(f"this machine has no {name}, but {', '.join(instruction_sets())}")


def set_threads(n: int) -> None:
    """Set the pool's threads, the caller among them; 0 means one for each processor that this
    process may use.
    """
    if n < 0:
        raise ValueError("threads cannot be negative")
    native().set_threads(n)


def threads() -> int:
    """Threads that the next product will use."""
    return int(native().threads())
