"""A user's mistakes: one clear line, a non-zero exit code, no traceback. No daemon needs a model here."""

import subprocess
import sys

import pytest

from tests.harness.cli_instance import make_cli_instance


def daemon(cli_instance, role="inference", timeout=60):
    command = [sys.executable, "-m", f"specl.daemons.{role}"]
    return subprocess.run(command, env=cli_instance.environment, capture_output=True, text=True, timeout=timeout)


def test_daemon_down_gives_exit_code_3(cli_instance):
    done = cli_instance.run("ask", "hello")
    assert done.returncode == 3 and "honcho start" in done.stderr
    assert cli_instance.run("adapters", "rollback").returncode == 3
    assert cli_instance.run("train", "--now").returncode == 3


def test_status_is_useful_with_all_daemons_down(cli_instance):
    found = cli_instance.status()
    assert found["inference"]["state"] == found["collector"]["state"] == found["trainer"]["state"] == "stopped"
    assert len([problem for problem in found["problems"] if "honcho start" in problem]) == 4
    assert found["failures"]["trigger"] == 50


def test_unknown_setting_has_file_line_and_guess(cli_instance):
    (cli_instance.var / "settings.yaml").write_text("speculative:\n  temprature: 0.5\n")
    done = cli_instance.run("status")
    assert done.returncode == 2
    assert "settings.yaml:2" in done.stderr and "speculative.temprature" in done.stderr and "temperature" in done.stderr
    assert daemon(cli_instance).returncode == 78


def test_a_setting_of_the_wrong_type_is_named(cli_instance):
    (cli_instance.var / "settings.yaml").write_text("training:\n  lora:\n    rank: many\n")
    done = cli_instance.run("status")
    assert done.returncode == 2 and "settings.yaml:3" in done.stderr and "training.lora.rank" in done.stderr


def test_a_missing_settings_file_is_named(cli_instance):
    cli_instance.environment["SPECL_CONFIG"] = str(cli_instance.var / "nowhere.yaml")
    done = cli_instance.run("status")
    assert done.returncode == 2 and "nowhere.yaml" in done.stderr


def test_missing_model_stops_the_daemon(cli_instance):
    (cli_instance.var / "settings.yaml").write_text("models: {target: {name: ./no-such-model}}\n")
    done = daemon(cli_instance)
    assert done.returncode == 78
    assert "there is no model './no-such-model'" in done.stderr and "Traceback" not in done.stderr


def test_unreadable_model_stops_the_daemon(cli_instance):
    folder = cli_instance.var / "broken"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "unheard-of"}')
    (cli_instance.var / "settings.yaml").write_text(f"models: {{target: {{name: {folder}}}}}\n")
    done = daemon(cli_instance)
    assert done.returncode == 78 and "cannot be loaded" in done.stderr and "Traceback" not in done.stderr


def test_unwritable_run_directory_is_named(cli_instance):
    file = cli_instance.var / "file"
    file.write_text("")
    cli_instance.environment["SPECL_VAR"] = str(file / "var")
    done = daemon(cli_instance, "collector")
    assert done.returncode == 78 and "not writable" in done.stderr


@pytest.mark.process
def test_too_long_socket_path_is_named():
    cli_instance = make_cli_instance()
    cli_instance.environment["SPECL_VAR"] = str(cli_instance.var / ("long-" * 20))
    done = daemon(cli_instance, "collector")
    assert done.returncode == 78 and "SPECL_VAR" in done.stderr and "bytes" in done.stderr


def test_file_in_place_of_a_socket_is_named(cli_instance):
    (cli_instance.var / "run").mkdir()
    (cli_instance.var / "run" / "collector.sock").write_text("mine")
    done = daemon(cli_instance, "collector")
    assert done.returncode == 78 and "in the way of a socket" in done.stderr
    assert (cli_instance.var / "run" / "collector.sock").read_text() == "mine"


def test_demo_draft_and_models_explain_themselves(cli_instance):
    for arguments in (
        ("--help",),
        ("ask", "--help"),
        ("demo", "--help"),
        ("draft", "build", "--help"),
        ("store", "--help"),
    ):
        assert cli_instance.run(*arguments).returncode == 0
    assert cli_instance.run("nonsense").returncode == 2
