"""A coverage-guided fuzzer (libFuzzer, through atheris) on everything that opens foreign bytes. `pip install speclora[fuzz]`, then

    python -m tests.fault.fuzz_decoder wire -max_total_time=180
    python -m tests.fault.fuzz_decoder record|manifest|safetensors|hot|config ...

It stops at the first input that raises anything but the one error that its reader promises, and writes it to crash-*. `wire` is
what arrives on a socket, `record` what the collector makes rows of, the others the files of an adapter directory.
"""

import atexit
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing, suppress
from functools import cache
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["specl", "msgpack", "pydantic"]):
    import msgpack  # noqa: F401 - imported here to be instrumented

    from specl.shared.adapters import manifest, tensors
    from specl.shared.errors import AdapterRejected, ConfigError, WireError
    from specl.shared.messaging import codec, messages
    from specl.shared.settings.load import parse_settings
    from specl.shared.store import Store, schema

MEMORY = Path("/dev/shm")  # files there cost no disk
SCRATCH = Path(tempfile.mkdtemp(prefix="fuzz-", dir=MEMORY if MEMORY.is_dir() else None))


def _wire(data: bytes) -> None:
    try:
        value = codec.decode(data)
    except WireError:
        return
    assert codec.decode(codec.encode(value)) == value


def _record(data: bytes) -> None:
    kinds = [kind.__name__ for kind in messages.RECORDS]
    row = messages.Envelope("a", kinds[data[0] % len(kinds)] if data else "", data[1:])
    store = open_store()
    assert store.add_rows([row]) == ["a"]  # a row of a table, or of the quarantine; never an error
    store.summary()
    removed = 0
    with closing(sqlite3.connect(SCRATCH / "store.db")) as db, db:
        for table in (*schema.TABLES.values(), schema.quarantine, schema.disagreements):
            removed += db.execute(f"DELETE FROM {table.name}").rowcount
    assert removed


@cache
def open_store() -> Store:
    return Store(SCRATCH / "store.db")


def _manifest(data: bytes) -> None:
    with suppress(AdapterRejected):
        manifest.parse_manifest(data).score  # noqa: B018 - a property that must not raise


def _safetensors(data: bytes) -> None:
    path = SCRATCH / "adapters.safetensors"
    path.write_bytes(data)
    assert isinstance(manifest.header_problem(path), str)


def _hot(data: bytes) -> None:
    path = SCRATCH / "hot_vocab.npy"
    path.write_bytes(data)
    with suppress(AdapterRejected):
        tensors.hot_vocabulary_problems(tensors.read_hot_vocabulary(path), 8, 128)


def _config(data: bytes) -> None:
    with suppress(ConfigError):
        parse_settings(data.decode("utf-8", "replace"), Path("settings.yaml"))


TARGETS: dict[str, Callable[[bytes], None]] = {
    "wire": _wire, "record": _record, "manifest": _manifest, "safetensors": _safetensors, "hot": _hot, "config": _config,
}  # fmt: skip


def seeds(folder: Path) -> None:
    """Good inputs to begin with: what the fuzzer would take hours to find by itself."""
    from tests.fault.test_frames import GOOD
    from tests.harness.fake_models import make_adapter
    from tests.harness.records import generation

    scratch, _ = make_adapter(folder / "adapters", "000001")
    files = [path.read_bytes() for path in scratch.iterdir()]
    hot = (
        b"\x93NUMPY\x01\x00v\x00"
        + b"{'descr': '<u4', 'fortran_order': False, 'shape': (8,), }".ljust(117)
        + b"\n"
        + bytes(32)
    )
    yaml = b"models: {target: {name: x}}\ntraining:\n  lora: {rank: 4}\n  target_modules: [a, b]\n"
    manifest = b'{"id": "000001", "kind": "lora", "rank": 4, "alpha": 8.0, "modules": ["a"], "training": {"generations": ["x"]}}'
    for number, data in enumerate(
        [
            *GOOD,
            codec.encode(generation("a", size=4)),
            b"\0" + codec.encode(generation("a")),
            *files,
            hot,
            yaml,
            manifest,
        ]
    ):
        (folder / f"seed-{number}").write_bytes(data)


def main() -> None:
    """Fuzz one target; what follows its name goes to libFuzzer."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: {sys.argv[0]} {'|'.join(TARGETS)} [libFuzzer options]")
    corpus = SCRATCH / "corpus"
    corpus.mkdir()
    seeds(corpus)
    arguments = [sys.argv[0], "-max_len=8192", *sys.argv[2:], str(corpus)]
    atheris.Setup(arguments, TARGETS[sys.argv[1]])
    atexit.register(shutil.rmtree, SCRATCH, ignore_errors=True)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
