"""`specl-ctl service`: units for systemd and launchd that start the daemons at login and keep them up. Starts nothing itself."""

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
FOLDERS = ("SPECL_MODELS", "HF_HOME", "OLLAMA_MODELS", "PYTHONPATH")  # written whole: a unit starts somewhere else
KEPT = ("SPECL_BLAS", "SPECL_NATIVE", "SPECL_NATIVE_ISA", "HF_HUB_OFFLINE")
TOKEN = "SPECL_GATEWAY_TOKEN"


@click.command()
@click.argument("manager", type=click.Choice(["systemd", "launchd"]))
@click.argument("role", type=click.Choice(DAEMONS), required=False)
@click.option("--write", is_flag=True, help="Write the units where the manager looks for them, instead of printing.")
def service(manager: str, role: str | None, write: bool) -> None:
    """Print a unit that keeps a daemon running, with this program, run directory and settings file in it.

    \b
    specl-ctl service systemd                # one template unit for all four daemons
    specl-ctl service systemd --write        # into ~/.config/systemd/user, and what to type then
    specl-ctl service launchd inference      # the property list of one role
    specl-ctl service launchd --write        # all of them into ~/Library/LaunchAgents

    The units keep the variables that say where models and modules are. A token of the gateway belongs into the settings
    file (gateway.token), not into SPECL_GATEWAY_TOKEN: a unit is no place for a secret.
    """
    if manager == "systemd":
        units = {"speclora@.service": systemd_unit()}
        folder = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "systemd" / "user"
        then = [
            "systemctl --user daemon-reload",
            "systemctl --user enable --now " + " ".join(f"speclora@{name}" for name in DAEMONS),
            "loginctl enable-linger   # to have them without anybody logged in",
        ]
    else:
        if role is None and not write:
            raise click.UsageError(
                f"a property list holds one daemon: name one of {', '.join(DAEMONS)}, or use --write"
            )
        units = {f"{LABEL}.{name}.plist": launchd_list(name) for name in ([role] if role else DAEMONS)}
        folder = Path.home() / "Library" / "LaunchAgents"
        then = [f"launchctl bootstrap gui/$(id -u) {shlex.quote(str(folder / name))}" for name in units]
    if write:
        _write(folder, units, then)
    else:
        click.echo("\n".join(units.values()), nl=False)
    if os.environ.get(TOKEN):
        click.echo(f"{TOKEN} is not in the units: set gateway.token in the settings file", err=True)


def _write(folder: Path, units: dict[str, str], then: list[str]) -> None:
    find_paths().create()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in units.items():
            (folder / name).write_text(text, encoding="utf-8")
            click.echo(f"written: {folder / name}")
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}") from error
    click.echo("now stop `honcho start` where it runs, and type:")
    for line in then:
        click.echo(f"  {line}")


def environment() -> dict[str, str]:
    """What the daemons need to find what this command finds."""
    found = {"SPECL_VAR": str(find_paths().root)}
    if os.environ.get("SPECL_CONFIG"):
        found["SPECL_CONFIG"] = str(settings_file().absolute())
    found |= {name: _whole(os.environ[name]) for name in FOLDERS if os.environ.get(name)}
    return found | {name: os.environ[name] for name in KEPT if os.environ.get(name)}


def _whole(folders: str) -> str:
    """A folder, or several as PATH has them, as they are named from anywhere."""
    return os.pathsep.join(os.path.abspath(os.path.expanduser(folder)) for folder in folders.split(os.pathsep))


def _quoted(text: str) -> str:
    """As systemd reads it: in quotes, with its own escapes."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%") + '"'


def systemd_unit() -> str:
    """A template unit; the instance is the role."""
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
            f"ExecStart={program} -m specl.daemons.supervise %i",
            "Restart=on-failure",
            "RestartSec=5",
            f"# a settings error does not get better by trying again: `journalctl --user -u speclora@inference` names it\n"
            f"RestartPreventExitStatus={EX_CONFIG}",
            "# the keeper tells its daemon to stop and waits for it",
            "KillMode=mixed",
            "TimeoutStopSec=10",
            "",
            "[Install]",
            "WantedBy=default.target",
            "",
        ]
    )


def launchd_list(role: str) -> str:
    """The property list of one role. Its output goes to the run directory's logs."""
    paths = find_paths()
    job = {
        "Label": f"{LABEL}.{role}",
        "ProgramArguments": [sys.executable, "-m", "specl.daemons.supervise", role],
        "EnvironmentVariables": environment(),
        "RunAtLoad": True,
        # again after a crash; not after a settings error, which the keeper reports and leaves with another code than 0:
        # launchd cannot tell the two apart, so it waits a minute between attempts
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": 60,
        "ExitTimeOut": 10,
        "ProcessType": "Interactive" if role == "inference" else "Background",
        # the same events are in logs/ROLE.log, which is rotated; a settings error is named by `specl-ctl doctor`
        "StandardErrorPath": "/dev/null",
        "StandardOutPath": "/dev/null",
        "WorkingDirectory": str(paths.root),
    }
    return plistlib.dumps(job).decode()
