"""What keeps it running for months: units, rotation of logs, completion, the version, and commands that start fast."""

import logging
import os
import plistlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from specl.cli import completion, service, version
from specl.cli.main import COMMANDS
from specl.shared.paths import DAEMONS, find_paths
from specl.shared.runtime import log

BIN = Path(sys.executable).parent


# ------------------------------------------------------------------------------------------------ units
def test_the_systemd_unit_says_what_runs_where(specl, monkeypatch, tmp_path):
    monkeypatch.setenv("SPECL_VAR", str(tmp_path / 'a "strange" 50% folder'))
    unit = specl("service", "systemd").stdout
    assert f'ExecStart="{sys.executable}" -P -m specl.daemons.supervise %i' in unit
    assert 'a \\"strange\\" 50%% folder"' in unit and "RestartPreventExitStatus=78" in unit


@pytest.mark.process
@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd here")
def test_systemd_accepts_the_unit(tmp_path):
    unit = tmp_path / "speclora@inference.service"
    unit.write_text(service.systemd_unit())
    done = subprocess.run(["systemd-analyze", "verify", "--user", str(unit)], capture_output=True, text=True)
    complaints = [line for line in done.stderr.splitlines() if "speclora" in line]
    assert not complaints, done.stderr


@pytest.mark.parametrize("role", DAEMONS)
def test_the_property_list_is_one(specl, role):
    job = plistlib.loads(specl("service", "launchd", role).stdout.encode())
    assert job["ProgramArguments"] == [sys.executable, "-P", "-m", "specl.daemons.supervise", role]
    assert job["EnvironmentVariables"]["SPECL_VAR"] == str(find_paths().root)


def test_launchd_without_a_role_says_what_to_name(specl):
    outcome = specl("service", "launchd")
    assert outcome.exit_code == 2 and "inference, collector, trainer, gateway" in outcome.stderr


def test_units_are_written_where_the_manager_looks(specl, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    outcome = specl("service", "systemd", "--write")
    assert (tmp_path / "config/systemd/user/speclora@.service").read_text() == service.systemd_unit()
    names = "speclora@inference speclora@collector speclora@trainer speclora@gateway"
    assert f"systemctl --user enable --now {names}\n" in outcome.stdout
    specl("service", "launchd", "--write")
    assert len(list((tmp_path / "home/Library/LaunchAgents").glob("org.speclora.*.plist"))) == len(DAEMONS)


def test_unit_keeps_the_folders_and_omits_the_token(specl, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"examples{os.pathsep}/opt/hooks")
    monkeypatch.setenv("OLLAMA_MODELS", "ollama")
    monkeypatch.setenv("SPECL_GATEWAY_TOKEN", "a-secret-of-the-shell")
    outcome = specl("service", "launchd", "gateway")
    kept = plistlib.loads(outcome.stdout.encode())["EnvironmentVariables"]
    assert kept["PYTHONPATH"] == f"{tmp_path / 'examples'}{os.pathsep}/opt/hooks"
    assert kept["OLLAMA_MODELS"] == str(tmp_path / "ollama")
    assert "a-secret-of-the-shell" not in outcome.stdout and "set gateway.token" in outcome.stderr


@pytest.mark.parametrize("enabled", [True, False])
def test_status_misses_a_gateway_only_if_enabled(specl, monkeypatch, tmp_path, enabled):
    (tmp_path / "s.yaml").write_text(f"gateway: {{enabled: {str(enabled).lower()}}}\n")
    monkeypatch.setenv("SPECL_CONFIG", str(tmp_path / "s.yaml"))
    missing = [text for text in specl("status", "--json").json["problems"] if text.startswith("gateway does not run")]
    assert len(missing) == enabled
    assert ("gateway" in specl("status").stdout) is enabled


def test_a_gateway_beside_daemons_elsewhere_is_not_missed(monkeypatch):
    from specl.shared import status
    from specl.shared.messaging import client
    from specl.shared.messaging.codes import DaemonState
    from specl.shared.messaging.daemon_status import CollectorStatus, StoreSummary
    from specl.shared.runtime.locks import Lock

    paths = find_paths().create()
    collector = CollectorStatus(DaemonState.READY, 1.0, 0, "", 0, {}, StoreSummary())
    monkeypatch.setattr(client.Client, "status", lambda self: client.DaemonStatuses(None, collector, None))

    def missed():
        with client.Client(paths) as asked:
            return any("gateway" in problem for problem in status.system_status(asked).problems)

    assert not missed() and not (paths.run / "collector.lock").exists()
    lock = Lock(paths.run, "collector")
    assert missed()
    lock.release()


# ------------------------------------------------------------------------------------------------ logs
@pytest.mark.process
def test_logs_are_rotated_and_few(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "LOG_BYTES", 4000)
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        log.set_up("collector", tmp_path)
        for n in range(400):
            log.get("test").info("something.happened", number=n, padding="x" * 100)
    finally:
        for handler in root.handlers:
            handler.close()
        root.handlers[:] = before
        root.setLevel(level)
        import structlog

        structlog.reset_defaults()
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["collector.log", *(f"collector.log.{n}" for n in range(1, log.LOG_FILES + 1))]
    assert all(path.stat().st_size <= 4000 for path in tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------ completion
def complete(words):
    environment = os.environ | {
        "_SPECL_CTL_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1),
    }  # fmt: skip
    done = subprocess.run([str(BIN / "specl-ctl")], env=environment, capture_output=True, text=True)
    return [line.split(",")[1] for line in done.stdout.splitlines()]


@pytest.mark.process
def test_commands_subcommands_and_options_complete():
    assert complete("specl-ctl st") == ["status", "store"]
    assert complete("specl-ctl store sh") == ["show"]
    assert complete("specl-ctl eval f --ag") == ["--against"]


@pytest.mark.process
@pytest.mark.parametrize("shell", completion.SHELLS)
def test_the_script_is_one_that_the_shell_reads(specl, shell):
    script = specl("completion", shell).stdout
    assert "_SPECL_CTL_COMPLETE" in script
    if shutil.which(shell):
        assert subprocess.run([shell, "-n"], input=script, text=True, capture_output=True).returncode == 0


# ------------------------------------------------------------------------------------------------ version
@pytest.mark.process
def test_the_version_names_commit_and_libraries(specl):
    output = specl("--version").stdout
    assert re.match(r"specl-ctl \d+\.\d+\.\d+", output) and "mlx-lm " in output and "Python 3." in output
    if (Path(version.__file__).resolve().parents[1] / ".git").exists():
        assert re.search(r"\(commit [0-9a-f]{12}(, changed)?\)", output)


# ------------------------------------------------------------------------------------------------ help and status
def test_every_listed_command_has_a_help_text(specl):
    for name in COMMANDS:
        outcome = specl(name, "--help")
        assert outcome.exit_code == 0 and "Usage: specl-ctl" in outcome.stdout, name


def test_status_waits_for_nobody_whose_lock_is_free(monkeypatch):
    from specl.shared.messaging import client
    from specl.shared.runtime.locks import Lock

    asked = []
    monkeypatch.setattr(client, "gather", lambda questions, timeout_s: asked.extend(questions) or {})
    paths = find_paths().create()
    held = Lock(paths.run, "collector")
    Lock(paths.run, "inference").release()
    client.Client(paths).status()
    held.release()
    assert asked == ["collector", "trainer"]  # of the trainer there is no trace: it may be elsewhere
