"""`bench learning` on a tiny random model through real daemons: everything but the size is as it will be."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import pytest

from specl.cli.bench.learning_lines import column_lines, gain_lines
from tests.cli.test_bench import write_model

SETTINGS = """\
models: {{target: {{name: {target}}}, draft: {{name: {draft}}}}}
speculative: {{num_draft_tokens: 2}}
training: {{learning_rate: 5.0e-3, lora: {{rank: 16, alpha: 32}}, num_epochs: 4, regression_prompts: 8}}
serving: {{threads: 1}}
"""
SMALL = ("--tokens", "8", "--gap", "0.1")


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A settings file of a random target and a draft that is the target with noise."""
    root = tmp_path_factory.mktemp("models")
    target, draft = write_model(root / "target", 1), write_model(root / "draft", 1)
    weights = mx.load(str(draft / "model.safetensors"))
    mx.random.seed(5)
    noisy = {name: value + 0.03 * mx.random.normal(value.shape) * (value.ndim == 2) for name, value in weights.items()}
    mx.save_safetensors(str(draft / "model.safetensors"), noisy, metadata={"format": "mlx"})
    file = root / "settings.yaml"
    file.write_text(SETTINGS.format(target=target, draft=draft))
    return file


@pytest.fixture
def short():
    """A folder with a short path: those of sockets are limited."""
    folder = Path(tempfile.mkdtemp(prefix="bl-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def start(settings, short, *arguments):
    """`specl-ctl bench learning` as a process; its scratch folders are made under `short`."""
    environment = os.environ | {"SPECL_CONFIG": str(settings), "SPECL_VAR": str(short / "var"), "TMPDIR": str(short)}
    command = [str(Path(sys.executable).parent / "specl-ctl"), "bench", "learning", *SMALL, "--out", str(short / "out")]
    return subprocess.Popen(
        [*command, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def left_behind(short):
    """Processes that were started with `short` as their temporary folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"TMPDIR={short}\0".encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def test_learning_stream_reports_every_figure(settings, short):
    pytest.importorskip("matplotlib")
    process = start(settings, short, "--requests", "12", "--trigger", "8", "--plain-every", "3", "--shift", "--json")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    report = json.loads(out)
    kept = json.loads((short / "out" / "learning.json").read_text())
    assert report.items() <= kept.items()
    assert (short / "out" / "learning.png").read_bytes().startswith(b"\x89PNG")
    on, off = (kept["passes"]["n-gram off"][side]["rows"] for side in ("on", "off"))
    assert [row["prompt"] for row in on] == [row["prompt"] for row in off] and len(on) == 12
    assert {row["kind"] for row in on[:6]}.isdisjoint({row["kind"] for row in on[6:]})
    for row in on + off:
        assert 0 <= row["hits"] <= row["positions"] == len(row["output"])
        assert row["drafted"] >= row["accepted"] and row["tokens_by_source"]["ngram"] == 0
        assert row["tokens_per_second"] > 0 and (row["plain"] is not None) == (row["n"] % 3 == 0)
    assert all(row["adapter_id"] == "" for row in off)
    window = report["report"]["n-gram off"]["windows"]["second half"]
    assert window["pairs"] == 6 and window["on_against_off"]["speed"]["low"] > 0
    assert report["report"]["n-gram off"]["words"] == {"compared": 12, "different": 0}
    assert not left_behind(short) and not list(short.glob("specl-*"))


@pytest.mark.process
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")
def test_ctrl_c_stops_daemons_and_keeps_measurements(settings, short):
    process = start(settings, short, "--requests", "500", "--no-plot")
    end = time.monotonic() + 120
    while "of 500" not in (line := process.stderr.readline()):
        assert line and time.monotonic() < end, "no progress was reported"
    assert "min left" in line and left_behind(short)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, err
    kept = json.loads((short / "out" / "learning.json").read_text())
    assert kept["cut_short"] and kept["passes"]["n-gram off"]["on"]["rows"]
    assert not left_behind(short) and not list(short.glob("specl-*"))


@pytest.mark.slow
def test_unseen_prompts_are_measured_around_one_run(settings, short):
    process = start(settings, short, "--gain", "--requests", "20", "--unseen", "4", "--train-minutes", "0.1", "--json")
    out, err = process.communicate(timeout=600)
    assert "Traceback" not in err
    report = json.loads(out)["report"]
    if process.returncode:  # the judge may say no to so little
        assert report["training"]["verdict"] == "rejected" and "no adapter was promoted" in err
        assert report["before"]["fixed"]["agreement"] > 0
    else:
        assert report["training"]["verdict"] == "promoted" and report["prompts"] == 4
        assert report["agreement_gain"]["low"] <= report["agreement_gain"]["value"] <= report["agreement_gain"]["high"]
        assert report["words"]["different"] == 0
    assert not left_behind(short) and not list(short.glob("specl-*"))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--kinds", "poems"), "there is no kind 'poems'; known: record-to-json"),
        (("--kinds", "record-to-json,record-to-json"), "each once"),
        (("--shift", "--kinds", "record-to-json"), "--shift needs two kinds"),
        (("--gain", "--shift"), "--shift is about a stream"),
        (("--gain", "--no-off"), "--no-off is about a stream"),
        (("--requests", "3"), "3 is not in the range"),
        (("--out", "/proc/nowhere"), "cannot write to /proc/nowhere"),
    ],
)
def test_bad_usage_is_one_sentence_before_anything_starts(specl, arguments, text):
    done = specl("bench", "learning", *arguments)
    assert done.exit_code == 2
    assert text in done.stderr and "Traceback" not in done.stderr


def test_without_a_draft_there_is_nothing_to_learn(specl, tmp_path, monkeypatch):
    file = tmp_path / "settings.yaml"
    file.write_text("models: {draft: {name: null}}\n")
    monkeypatch.setenv("SPECL_CONFIG", str(file))
    done = specl("bench", "learning", "--no-plot", "--out", tmp_path / "out")
    assert done.exit_code == 2 and "there is no draft to train" in done.stderr


def test_report_reads_well_with_one_or_two_arms():
    change = {"value": 1.25, "low": 1.1, "high": 1.4, "n": 10}
    figures = {"tokens_per_second": 50.0, "speed_to_plain": 1.5, "agreement": None, "acceptance": 0.4}
    window = {"requests": [0, 10], "on": figures, "off": figures, "on_against_off": {"speed": change}}
    report = {"windows": {"whole": window, "last quarter": {"requests": [8, 10], "on": figures}}, "words": None}
    report |= {"adapters": [{"adapter": "", "from_request": 0, "requests": 10}], "training": []}
    text = "\n".join(column_lines("n-gram off", report))
    assert "n-gram off, whole (0 to 9)" in text and "1.25x (1.10 to 1.40)" in text
    assert "adapter none: from request 0, 10 requests" in text
    assert max(map(len, text.splitlines())) <= 100


def test_gain_is_reported_with_its_interval():
    sides = {"fixed": {"agreement": 0.1, "acceptance": 0.1}, "auto": {"tokens_per_second": 40.0}}
    report = {"prompts": 40, "before": sides, "after": sides, "words": {"different": 0, "compared": 40}}
    report["agreement_gain"] = {"value": 0.5, "low": 0.45, "high": 0.55, "n": 40}
    text = "\n".join(gain_lines(report))
    assert "agreement (k = 4)" in text and "+0.500 (+0.450 to +0.550)" in text
    assert "0 of 40" in text
