"""The judge against targets that say nothing, and swaps under load, in small; the whole of both is in tests/bench."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
pytestmark = pytest.mark.slow


def test_permuted_targets_fail_and_true_ones_pass():
    spec = importlib.util.spec_from_file_location("bench_null", BENCH / "null.py")
    null = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(null)
    world = null.World()
    assert sum(null.decide(world, n, True, 30).verdict == "promoted" for n in range(6)) <= 1
    assert sum(null.decide(world, n, False, 30).low > 0 for n in range(3)) >= 2


def test_swaps_under_load_fail_no_request(tmp_path):
    # a process of its own: it puts a fake pair in place of the models
    command = [
        sys.executable,
        str(BENCH / "swaps.py"),
        "--requests",
        "40",
        "--swaps",
        "10",
        "--json",
        str(tmp_path / "f"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    found = json.loads((tmp_path / "f").read_text())
    assert done.returncode == 0 and found["requests"] == 40 and found["swaps"] == 10, found
    assert found["failed"] == found["texts_changed"] == 0 and found["base_identical"]
