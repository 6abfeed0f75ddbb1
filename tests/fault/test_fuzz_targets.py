"""Every target of the documented fuzzer runs, on its own seeds and on spoiled ones; atheris itself is not needed for that."""

import importlib
import random
import shutil
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

NAME = "tests.fault.fuzz_decoder"


@pytest.fixture
def fuzzer(monkeypatch):
    monkeypatch.setitem(sys.modules, "atheris", SimpleNamespace(instrument_imports=lambda **more: nullcontext()))
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    fuzz_decoder = importlib.import_module(NAME)

    folder = fuzz_decoder.SCRATCH / "corpus"
    folder.mkdir()
    fuzz_decoder.seeds(folder)
    yield fuzz_decoder.TARGETS, [path.read_bytes() for path in sorted(folder.glob("seed-*"))]
    fuzz_decoder.open_store().close()
    shutil.rmtree(fuzz_decoder.SCRATCH)
    sys.modules.pop(NAME)


def test_every_target_of_the_fuzzer_runs(fuzzer):
    targets, seeds = fuzzer
    chance = random.Random(11)
    for target in targets.values():
        for seed in [b"", *seeds]:
            target(seed)
            for _ in range(3):
                spoiled = bytearray(seed or b"\0")
                spoiled[chance.randrange(len(spoiled))] = chance.randrange(256)
                target(bytes(spoiled))
    assert {"wire", "record"} <= set(targets)
