"""The C++ under the compiler's sanitizers, as a program of its own: no MLX, no Python, nothing hidden by either."""

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "shared/native/src"
PLAIN = ["pool.cpp", "matrix.cpp", "stack.cpp", "isa_avx512.cpp", "isa_avx2.cpp", "isa_neon.cpp", "isa_scalar.cpp"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["address,undefined", "thread"])
def test_the_kernels_are_clean_under_sanitizers(kind, tmp_path):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / "sanitized"
    flags = ["-std=c++20", "-O1", "-g", "-ffp-contract=off", "-fno-strict-aliasing", "-w", "-pthread"]
    flags += ["-DSPECL_SANITIZED", "-fno-inline", f"-I{SOURCES}"]
    flags += [f"-fsanitize={kind}", "-fno-sanitize-recover=all"]
    sources = [Path(__file__).with_name("sanitized.cpp"), *(SOURCES / name for name in PLAIN)]
    built = subprocess.run([compiler, *flags, *sources, "-o", program], capture_output=True, text=True, check=False)
    if "cannot find" in built.stderr and "san" in built.stderr:
        pytest.skip(f"this compiler has no {kind} sanitizer")
    assert built.returncode == 0, built.stderr[-3000:]
    ran = subprocess.run([program], capture_output=True, text=True, timeout=1200, check=False)
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-6000:]
