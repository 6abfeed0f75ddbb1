"""Adapter directories as files: whole or not there, and refused for the right reason."""

import json
import os
import struct
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from specl.shared.adapters import registry
from specl.shared.adapters.manifest import MAX_HEADER
from specl.shared.adapters.registry import Adapters, Manifest
from specl.shared.errors import AdapterRejected

ROOT = Path(__file__).resolve().parents[3]
BASE, TOKENIZER = "base-0", "tokenizer-0"


def run_python(code, **environment):
    """A fresh interpreter, for what must not happen in this process: dying."""
    command, environment = [sys.executable, "-c", code], os.environ | environment
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60)


def safetensors(data: bytes = bytes(16), header: dict | bytes | None = None) -> bytes:
    if header is None:
        header = {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def make_manifest(id, **changes):
    values = {
        "id": id,
        "kind": "lora",
        "created_at": 1.0,
        "base_model": "tiny",
        "base_fingerprint": BASE,
        "target_fingerprint": "target-0",
        "tokenizer_fingerprint": TOKENIZER,
        "parent_id": "",
        "training_run_id": "run",
        "rank": 4,
        "alpha": 8.0,
        "modules": ["q_proj"],
        "change_norm": 1.0,
        "metrics": {"heldout_after": 0.5},
        "training": {},
    }
    return Manifest(**(values | changes))


def publish(adapters, id=None, make_current=True, files=None, **changes):
    id = id or adapters.next_id()
    scratch = adapters.scratch(id)
    for name, data in ({"adapters.safetensors": safetensors(), "adapter_config.json": b"{}"} | (files or {})).items():
        (scratch / name).write_bytes(data)
    return adapters.publish(scratch, make_manifest(id, **changes), make_current)


@pytest.fixture
def adapters(tmp_path):
    (tmp_path / "adapters").mkdir()
    return Adapters(tmp_path / "adapters")


def refusal(adapters, path, base=BASE, tokenizer=TOKENIZER):
    with pytest.raises(AdapterRejected) as caught:
        adapters.verify(path, base, tokenizer)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------- publishing
def test_a_published_adapter_is_whole_current_and_verifies(adapters):
    path = publish(adapters, files={"hot_vocab.npy": b"numbers"})
    assert path == adapters.folder / "000001"
    assert adapters.current() == "000001"
    manifest = adapters.verify(path, BASE, TOKENIZER)
    assert set(manifest.files) == {"adapters.safetensors", "adapter_config.json", "hot_vocab.npy"}
    assert sorted(p.name for p in adapters.folder.iterdir()) == ["000001", "CURRENT"]


def test_ids_count_up_and_current_moves_on_request(adapters):
    publish(adapters)
    publish(adapters, make_current=False)
    assert adapters.ids() == ["000001", "000002"]
    assert adapters.current() == "000001"
    assert adapters.next_id() == "000003"


def test_published_adapter_is_never_changed(adapters):
    publish(adapters)
    with pytest.raises(OSError):
        publish(adapters, id="000001")


CRASH = """
from pathlib import Path
from specl.shared.adapters.registry import Adapters
from tests.shared.adapters.test_registry import publish
adapters = Adapters(Path({folder!r}))
publish(adapters)
publish(adapters)
"""


@pytest.mark.process
@pytest.mark.parametrize(
    ("point", "current", "ids"),
    [
        ("adapter.files_written", "000001", ["000001"]),
        ("adapter.before_rename", "000001", ["000001"]),
        ("adapter.after_rename", "000001", ["000001", "000002"]),
        ("adapter.before_current", "000001", ["000001", "000002"]),
        ("adapter.after_current", "000002", ["000001", "000002"]),
    ],
)
def test_dying_anywhere_leaves_current_on_a_whole_adapter(adapters, point, current, ids):
    died = run_python(CRASH.format(folder=str(adapters.folder)), SPECL_CRASH_AT=f"{point}:2")
    assert died.returncode == 137, died.stderr
    assert (adapters.current(), adapters.ids()) == (current, ids)
    for id in ids:
        adapters.verify(adapters.folder / id, BASE, TOKENIZER)
    adapters.sweep()
    assert not list(adapters.folder.glob(".new-*"))
    publish(adapters)
    assert adapters.current() == adapters.ids()[-1]


@pytest.mark.process
def test_dying_in_the_first_publication_leaves_nothing_current(adapters):
    died = run_python(CRASH.format(folder=str(adapters.folder)), SPECL_CRASH_AT="adapter.after_rename")
    assert died.returncode == 137, died.stderr
    assert adapters.current() == ""


# ---------------------------------------------------------------------------------------------------- names
def test_aliases_name_what_they_say(adapters):
    assert [adapters.resolve(name) for name in ("latest", "best", "current", "1", "000001", "nonsense")] == [""] * 6
    publish(adapters, metrics={"heldout_after": 0.6})
    publish(adapters, metrics={"heldout_after": 0.9})
    publish(adapters, make_current=False, metrics={"heldout_after": 0.7})
    assert adapters.resolve("latest") == "000003"
    assert adapters.resolve("best") == "000002"
    assert adapters.resolve("current") == "000002"
    assert adapters.resolve("3") == adapters.resolve("000003") == "000003"
    assert adapters.resolve("../adapters/000001") == adapters.resolve("") == adapters.resolve("9") == ""


@pytest.mark.parametrize("score", [None, "high", "0.9", [], {}, True, float("nan"), float("inf")])
def test_unscored_adapter_is_never_best(adapters, score):
    publish(adapters, metrics={"heldout_after": score})
    assert adapters.resolve("best") == ""
    publish(adapters, metrics={"heldout_after": 0.2})
    publish(adapters, metrics={"heldout_after": score})
    publish(adapters, metrics={})
    assert adapters.resolve("best") == "000002"


@pytest.mark.parametrize("text", ["", "7", "../../etc", "0000001", "\x00", "000001\n"])
def test_current_is_an_id_or_nothing(adapters, text):
    (adapters.folder / "CURRENT").write_text(text)
    assert adapters.current() == ("000001" if text.strip() == "000001" else "")


def test_pruning_keeps_five_current_best_and_requested(adapters):
    for number in range(10):
        publish(adapters, make_current=number == 1, metrics={"heldout_after": 0.9 if number == 0 else 0.1})
    assert adapters.prune(keep=["000004"]) == ["000003", "000005"]
    assert adapters.ids() == ["000001", "000002", "000004", "000006", "000007", "000008", "000009", "000010"]
    assert not list(adapters.folder.glob(".new-*"))


def test_dropped_id_is_synced_before_removal(adapters, monkeypatch):
    publish(adapters)
    events = []
    monkeypatch.setattr(registry, "write_file", lambda path, text, sync: events.append((path.name, text, sync)))
    monkeypatch.setattr(adapters, "_remove", lambda id: events.append(id))
    adapters.drop(["000001"])
    assert events == [("HIGHEST", "1", True), "000001"]


def test_a_missing_folder_holds_no_adapters(tmp_path):
    adapters = Adapters(tmp_path / "nowhere")
    assert (adapters.ids(), adapters.current(), adapters.next_id(), adapters.resolve("best")) == ([], "", "000001", "")


# ---------------------------------------------------------------------------------------------------- refusing
def test_an_adapter_outside_the_folder_is_refused(adapters, tmp_path):
    inside = publish(adapters)
    outside = tmp_path / "000001"
    os.rename(inside, outside)
    assert "outside" in refusal(adapters, outside)
    assert "outside" in refusal(adapters, adapters.folder / ".." / "000001")
    assert "outside" in refusal(adapters, "/etc")
    assert "not an adapter id" in refusal(adapters, adapters.folder / "..")
    assert "no adapter" in refusal(adapters, adapters.folder / "000001")


def test_link_as_folder_or_file_is_refused(adapters, tmp_path):
    path = publish(adapters)
    os.rename(path, tmp_path / "real")
    path.symlink_to(tmp_path / "real")
    assert "a link" in refusal(adapters, path)
    path.unlink()
    os.rename(tmp_path / "real", path)
    os.rename(path / "adapter_config.json", tmp_path / "config")
    (path / "adapter_config.json").symlink_to(tmp_path / "config")
    assert "adapter_config.json is not a regular file" in refusal(adapters, path)


def test_a_file_that_does_not_belong_is_refused(adapters):
    path = publish(adapters)
    (path / "evil.pkl").write_bytes(b"\x80\x04.")
    assert "evil.pkl does not belong" in refusal(adapters, path)


def test_every_problem_is_reported_together(adapters):
    path = publish(adapters)
    (path / "one.py").touch()
    (path / "two.py").touch()
    (path / "adapter_config.json").unlink()
    text = refusal(adapters, path)
    assert "one.py" in text and "two.py" in text and "adapter_config.json is missing" in text


@pytest.mark.parametrize("name", ["adapters.safetensors", "adapter_config.json", "hot_vocab.npy"])
def test_a_changed_file_is_refused(adapters, name):
    path = publish(adapters, files={"hot_vocab.npy": b"numbers"})
    data = bytearray((path / name).read_bytes())
    data[-1] ^= 1
    (path / name).write_bytes(data)
    assert f"{name} is not the file that was published" in refusal(adapters, path)


def test_file_named_by_the_manifest_must_exist(adapters):
    path = publish(adapters, files={"hot_vocab.npy": b"numbers"})
    (path / "hot_vocab.npy").unlink()
    assert "hot_vocab.npy is missing, though the manifest names it" in refusal(adapters, path)


def test_adapter_of_another_draft_is_refused(adapters):
    path = publish(adapters)
    assert "trained on draft base-0, this one is other" in refusal(adapters, path, base="other")
    assert "tokenizer" in refusal(adapters, path, tokenizer="other")


def entry(start, end, dtype="F32", shape=(4,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (safetensors()[:-1], "truncated"),
        (safetensors() + b"\x00", "truncated"),
        (safetensors()[:20], "not a whole"),
        (b"", "not a whole"),
        (b"abc", "not a whole"),
        (struct.pack("<Q", 2**63) + bytes(40), "not a whole"),
        (struct.pack("<Q", MAX_HEADER + 1) + bytes(40), "not a whole"),
        (safetensors(header=b"{broken"), "not a safetensors"),
        (safetensors(header=b"[" * 100_000), "not a safetensors"),
        (safetensors(header=b'{"a":' * 100_000), "not a safetensors"),
        (safetensors(header=b"\xff\xfe\xff"), "not a safetensors"),
        (safetensors(header=[1, 2]), "not a safetensors"),
        (safetensors(header={"w": 1}), "not a safetensors"),
        (safetensors(header={"w": entry("0", "many")}), "not a safetensors"),
        (safetensors(header={"w": entry(0, 1e999)}), "not a safetensors"),
        (safetensors(header={"w": entry(0, 16.5)}), "not a safetensors"),
        (safetensors(header={"w": entry(-16, 0)}), "not a safetensors"),
        (safetensors(header={"w": entry(0, None)}), "not a safetensors"),
        (safetensors(header={"w": entry(0, 16) | {"data_offsets": [0]}}), "not a safetensors"),
        (safetensors(header={"w": entry(0, 16) | {"data_offsets": {}}}), "not a safetensors"),
        (safetensors(header={"w": entry(0, 16) | {"data_offsets": [[0], [16]]}}), "not a safetensors"),
        (safetensors(header={"w": entry(0, 16, dtype="I32")}), "real numbers"),
        (safetensors(header={"w": entry(0, 16, dtype="U8", shape=[16])}), "real numbers"),
        (safetensors(header={"w": entry(0, 16, dtype=["F32"])}), "real numbers"),
        (safetensors(header={"w": entry(0, 12)}), "data_offsets [0, 12], not [0, 16]"),
        (safetensors(header={"w": entry(4, 16)}), "data_offsets [4, 16]"),
        (safetensors(header={"w": entry(16, 0)}), "data_offsets [16, 0]"),
        (safetensors(header={"w": entry(0, 16), "v": entry(0, 16)}), "data_offsets [0, 16], not [16, 32]"),
        (safetensors(header={"w": entry(0, 16, shape=[2**40, 2**40])}), "data_offsets"),
        (safetensors(header={"w": entry(0, 16), "v": entry(16, 32)}), "truncated"),
        (safetensors(data=b"", header={}), "truncated"),
        (b"PK\x03\x04" + bytes(200), "safetensors"),
        (b"\x80\x04\x95" + bytes(200), "safetensors"),
    ],
)
def test_damaged_safetensors_file_is_refused(adapters, data, reason):
    path = publish(adapters, files={"adapters.safetensors": data})
    assert reason in refusal(adapters, path)


def test_metadata_in_the_header_is_no_tensor(adapters):
    header = {"__metadata__": {"format": "mlx"}, "w": entry(0, 16)}
    path = publish(adapters, files={"adapters.safetensors": safetensors(header=header)})
    assert adapters.verify(path, BASE, TOKENIZER).id == "000001"


def test_a_giant_header_is_refused_unread(adapters):
    path = publish(adapters)
    with open(path / "adapters.safetensors", "wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER + 1))
        file.truncate(MAX_HEADER + 100)
    assert "not a whole safetensors file" in refusal(adapters, path)


WRONG = {
    "id": 1, "kind": None, "created_at": "today", "base_model": 3, "base_fingerprint": [], "target_fingerprint": {},
    "tokenizer_fingerprint": 0, "parent_id": None, "training_run_id": True, "rank": "four", "alpha": "8", "modules": "q_proj",
    "change_norm": None, "metrics": [], "training": "none", "files": [],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [*WRONG.items(), ("rank", 4.5), ("rank", True), ("rank", float("inf")),
    ("alpha", float("nan")), ("modules", [1]), ("modules", [["a"]]), ("files", {"adapters.safetensors": 1}), ("files", None),
    ("training", {"generations": 5}), ("training", {"generations": [["a"]]}), ("surprise", 1)])  # fmt: skip
def test_mistyped_manifest_is_refused_by_field(adapters, name, value):
    path = publish(adapters)
    document = json.loads((path / "manifest.json").read_text()) | {name: value}
    (path / "manifest.json").write_text(json.dumps(document))
    said = refusal(adapters, path)
    assert "000001: its manifest is malformed" in said and name in said
    assert (adapters.resolve("best"), adapters.resolve("latest")) == ("", "000001")
    assert adapters.trained_on(["a"]) == [] and adapters.prune(keep=[]) == []


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b"7", b"\xff\xff", b"[" * 100_000, b'{"id":' * 100_000, b"\x00"])
def test_non_manifest_is_a_refusal(adapters, text):
    path = publish(adapters)
    (path / "manifest.json").write_bytes(text)
    assert "000001: its manifest is malformed" in refusal(adapters, path)
    assert (adapters.resolve("best"), adapters.resolve("latest")) == ("", "000001")


def test_a_manifest_of_another_adapter_is_refused(adapters):
    path = publish(adapters)
    (path / "manifest.json").write_text((path / "manifest.json").read_text().replace("000001", "000009"))
    assert "says it is 000009" in refusal(adapters, path)


def test_a_manifest_reads_back_as_it_was_written(adapters):
    publish(adapters, parent_id="000000", training={"steps": 5})
    found = adapters.manifest("000001")
    assert asdict(found) | {"files": {}} == asdict(make_manifest("000001", parent_id="000000", training={"steps": 5}))
    with pytest.raises(AdapterRejected):
        adapters.manifest("000002")


def test_relative_paths_mean_this_folder(adapters):
    publish(adapters)
    assert adapters.verify(Path("000001"), BASE, TOKENIZER).id == "000001"
