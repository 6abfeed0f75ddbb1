"""Every target of the documented fuzzer runs, on its own seeds and on spoiled ones; atheris itself is not needed for that."""

import random
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest


@pytest.fixture
def fuzzer(monkeypatch):
    monkeypatch.setitem(sys.modules, "atheris", SimpleNamespace(instrument_imports=lambda **more: nullcontext()))
    monkeypatch.delitem(sys.modules, "fuzz_decoder", raising=False)
    import fuzz_decoder

    yield fuzzer_with_seeds(fuzzer_module=fuzz_decoder)
    sys.modules.pop("fuzz_decoder")


def fuzzer_with_seeds(fuzzer_module):
    folder = fuzzer_module.SCRATCH / "corpus"
    folder.mkdir()
    fuzzer_module.seeds(folder)
    return fuzzer_module.TARGETS, [path.read_bytes() for path in sorted(folder.glob("seed-*"))]


def test_every_target_of_the_fuzzer_runs(fuzzer):
    targets, seeds = fuzzer
    chance = random.Random(11)
    for name, target in targets.items():
        for seed in [b"", *seeds]:
            target(seed)
            for _ in range(3):
                spoiled = bytearray(seed or b"\0")
                spoiled[chance.randrange(len(spoiled))] = chance.randrange(256)
                target(bytes(spoiled))
    assert {"wire", "record"} <= set(targets)
