"""A user's mistakes: one clear line, a non-zero exit code, no traceback. No daemon needs a model here."""

import subprocess
import sys
import time

from tests.e2e.conftest import make_box


def daemon(box, role="inference", timeout=60):
    command = [sys.executable, "-m", f"specl.daemons.{role}"]
    return subprocess.run(command, env=box.environment, capture_output=True, text=True, timeout=timeout)


def test_a_daemon_that_is_down_gives_exit_code_3_and_the_command_within_two_seconds(box):
    start = time.monotonic()
    done = box.run("ask", "hello")
    assert done.returncode == 3 and "honcho start" in done.stderr
    assert time.monotonic() - start < 2.5  # two for the wait, the rest for a busy machine's process start
    assert box.run("adapters", "rollback").returncode == 3
    assert box.run("train", "--now").returncode == 3


def test_status_is_useful_with_all_daemons_down(box):
    found = box.status()
    assert found["inference"]["state"] == found["collector"]["state"] == found["trainer"]["state"] == "stopped"
    assert len([problem for problem in found["problems"] if "honcho start" in problem]) == 4
    assert found["failures"]["trigger"] == 50


def test_an_unknown_setting_is_named_with_file_line_and_a_guess(box):
    (box.var / "settings.yaml").write_text("speculative:\n  temprature: 0.5\n")
    done = box.run("status")
    assert done.returncode == 2
    assert "settings.yaml:2" in done.stderr and "speculative.temprature" in done.stderr and "temperature" in done.stderr
    assert daemon(box).returncode == 78


def test_a_setting_of_the_wrong_type_is_named(box):
    (box.var / "settings.yaml").write_text("training:\n  lora:\n    rank: many\n")
    done = box.run("status")
    assert done.returncode == 2 and "settings.yaml:3" in done.stderr and "training.lora.rank" in done.stderr


def test_a_missing_settings_file_is_named(box):
    box.environment["SPECL_CONFIG"] = str(box.var / "nowhere.yaml")
    done = box.run("status")
    assert done.returncode == 2 and "nowhere.yaml" in done.stderr


def test_a_missing_model_stops_the_daemon_with_one_sentence(box):
    (box.var / "settings.yaml").write_text("models: {target: {name: ./no-such-model}}\n")
    done = daemon(box)
    assert done.returncode == 78
    assert "there is no model './no-such-model'" in done.stderr and "Traceback" not in done.stderr


def test_an_unreadable_model_stops_the_daemon_with_one_sentence(box):
    folder = box.var / "broken"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "unheard-of"}')
    (box.var / "settings.yaml").write_text(f"models: {{target: {{name: {folder}}}}}\n")
    done = daemon(box)
    assert done.returncode == 78 and "cannot be loaded" in done.stderr and "Traceback" not in done.stderr


def test_a_run_directory_that_cannot_be_written_is_named(box):
    file = box.var / "file"
    file.write_text("")
    box.environment["SPECL_VAR"] = str(file / "var")
    done = daemon(box, "collector")
    assert done.returncode == 78 and "not writable" in done.stderr


def test_a_socket_path_that_is_too_long_is_named():
    box = make_box()
    box.environment["SPECL_VAR"] = str(box.var / ("long-" * 20))
    done = daemon(box, "collector")
    assert done.returncode == 78 and "SPECL_VAR" in done.stderr and "bytes" in done.stderr


def test_a_file_in_the_place_of_a_socket_is_named(box):
    (box.var / "run").mkdir()
    (box.var / "run" / "collector.sock").write_text("mine")
    done = daemon(box, "collector")
    assert done.returncode == 78 and "in the way of a socket" in done.stderr
    assert (box.var / "run" / "collector.sock").read_text() == "mine"


def test_demo_draft_and_models_explain_themselves(box):
    for arguments in (
        ("--help",),
        ("ask", "--help"),
        ("demo", "--help"),
        ("draft", "build", "--help"),
        ("store", "--help"),
    ):
        assert box.run(*arguments).returncode == 0
    assert box.run("nonsense").returncode == 2
