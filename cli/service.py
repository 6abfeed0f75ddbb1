"""`specl-ctl service`: units for systemd and launchd, which start the daemons at login and keep
them running.

Writes text; starts nothing itself.
"""

import os
import plistlib
import shlex
import sys
from pathlib import Path

import click

from specl.shared.errors import ConfigError
from specl.shared.paths import DAEMONS, find_paths
from specl.shared.runtime.supervisor import EX_CONFIG
from specl.shared.settings.load import settings_file

LABEL = "org.speclora"
FOLDERS = (
    "SPECL_MODELS",
    "HF_HOME",
    "OLLAMA_MODELS",
    "PYTHONPATH",
)  # written as absolute paths: a unit starts elsewhere
VARIABLES = ("SPECL_BLAS", "SPECL_NATIVE", "SPECL_NATIVE_ISA", "HF_HUB_OFFLINE")
TOKEN = "SPECL_GATEWAY_TOKEN"


@click.command()
@click.argument("manager", type=click.Choice(["systemd", "launchd"]))
@click.argument("role", type=click.Choice(DAEMONS), required=False)
@click.option("--write", is_flag=True, help="Write the units where the manager looks for them, instead of printing.")
def service(manager: str, role: str | None, write: bool) -> None:
    """Print a unit that keeps a daemon running. It names this program, run directory and settings
    file.

    \b
    specl-ctl service systemd                # one template unit for all four daemons
    specl-ctl service systemd --write        # into ~/.config/systemd/user; prints what to type next
    specl-ctl service launchd inference      # the property list of one role
    specl-ctl service launchd --write        # all of them into ~/Library/LaunchAgents

    The units hold the environment variables that say where models and modules are. The gateway's
    token belongs in the settings file (gateway.token), not in SPECL_GATEWAY_TOKEN, because a unit
    is no place for a secret.
    """
    if manager == "systemd":
        units = {"speclora@.service": systemd_unit()}
        folder = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "systemd" / "user"
        next_steps = [
            "systemctl --user daemon-reload",
            "systemctl --user enable --now " + " ".join(f"speclora@{name}" for name in DAEMONS),
            "loginctl enable-linger   # to run them while nobody is logged in",
        ]
    else:
        if role is None and not write:
            raise click.UsageError(
                f"a property list holds one daemon: name one of {', '.join(DAEMONS)}, or use --write"
            )
        units = {f"{LABEL}.{name}.plist": launchd_list(name) for name in ([role] if role else DAEMONS)}
        folder = Path.home() / "Library" / "LaunchAgents"
        next_steps = [f"launchctl bootstrap gui/$(id -u) {shlex.quote(str(folder / name))}" for name in units]
    if write:
        _write(folder, units, next_steps)
    else:
        click.echo("\n".join(units.values()), nl=False)
    if os.environ.get(TOKEN):
        click.echo(f"{TOKEN} is not in the units: set gateway.token in the settings file", err=True)


def _write(folder: Path, units: dict[str, str], next_steps: list[str]) -> None:
    find_paths().create()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in units.items():
            (folder / name).write_text(text, encoding="utf-8")
            click.echo(f"written: {folder / name}")
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}") from error
    click.echo("now stop `honcho start` where it runs, and type:")
    for line in next_steps:
        click.echo(f"  {line}")


def environment() -> dict[str, str]:
    """The variables with which the daemons find what this command finds."""
    variables = {"SPECL_VAR": str(find_paths().root)}
    if os.environ.get("SPECL_CONFIG"):
        variables["SPECL_CONFIG"] = str(settings_file().absolute())
    variables |= {name: _absolute(os.environ[name]) for name in FOLDERS if os.environ.get(name)}
    return variables | {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}


def _absolute(folders: str) -> str:
    """A folder, or several separated as in PATH, as absolute paths."""
    return os.pathsep.join(os.path.abspath(os.path.expanduser(folder)) for folder in folders.split(os.pathsep))


def _quoted(text: str) -> str:
    """The text in quotes, with the escapes of systemd."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%") + '"'


def systemd_unit() -> str:
    """A template unit of systemd; the name of an instance is the role."""
    lines = [f"Environment={_quoted(f'{name}={value}')}" for name, value in environment().items()]
    program = _quoted(sys.executable).replace("$", "$$")
    return "\n".join(
        [
            "# ~/.config/systemd/user/speclora@.service - made by `specl-ctl service systemd`",
            "[Unit]",
            "Description=SpecLoRA %i",
            "",
            "[Service]",
            *lines,
            f"ExecStart={program} -P -m specl.daemons.supervise %i",
            "Restart=on-failure",
            "RestartSec=5",
            f"# after a settings error starting again cannot help: `journalctl --user -u speclora@inference` names it\n"
            f"RestartPreventExitStatus={EX_CONFIG}",
            "# the supervisor stops its daemon and waits for it",
            "KillMode=mixed",
            "TimeoutStopSec=10",
            "",
            "[Install]",
            "WantedBy=default.target",
            "",
        ]
    )


def launchd_list(role: str) -> str:
    """The property list of launchd for one role."""
    paths = find_paths()
    job = {
        "Label": f"{LABEL}.{role}",
        "ProgramArguments": [sys.executable, "-P", "-m", "specl.daemons.supervise", role],
        "EnvironmentVariables": environment(),
        "RunAtLoad": True,
        # launchd cannot tell a crash from a settings error (neither exit code is 0), so it starts
        # the daemon again after either, with a minute between attempts
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": 60,
        "ExitTimeOut": 10,
        "ProcessType": "Interactive" if role == "inference" else "Background",
        # logs/ROLE.log has the same events, rotated; `specl-ctl doctor` names a settings error
        "StandardErrorPath": "/dev/null",
        "StandardOutPath": "/dev/null",
        "WorkingDirectory": str(paths.root),
    }
    return plistlib.dumps(job).decode()
