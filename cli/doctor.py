"""`specl-ctl doctor`: what this machine has, what is wrong, and what to do about it."""

import errno
import os
import platform
import shutil
import socket
from collections.abc import Iterator
from importlib.metadata import version

import click

from specl.shared import config
from specl.shared.errors import ConfigError, SpecLoraError
from specl.shared.paths import DAEMONS, ROLES, find_paths
from specl.shared.process import holder_of, is_locked

OK, WARN, BAD = "ok", "warn", "bad"
Finding = tuple[str, str, str]


def _machine() -> Iterator[Finding]:
    yield (
        OK,
        "machine",
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    )
    libraries = ", ".join(f"{name} {version(name)}" for name in ("mlx", "mlx-lm", "pyzmq", "sqlalchemy"))
    yield OK, "libraries", libraries


def _blas() -> Iterator[Finding]:
    from specl.shared.models import blas

    bound = blas.BOUND
    if bound.fast:
        yield OK, "blas", bound.name
    else:
        yield WARN, "blas", f"{bound.name}: products are 5 to 30 times slower ({bound.note}). {blas.REMEDY}"
    import mlx.core as mx

    yield OK, "device", str(mx.default_device())
    yield from _native()


def _native() -> Iterator[Finding]:
    """The C++ kernels; on a GPU and on macOS nothing is missing without them."""
    from specl.shared import native
    from specl.shared.models.fast import on_cpu

    if native.available():
        yield OK, "kernels", f"native {native.instruction_set()}, {native.threads()} threads"
    elif on_cpu():
        yield WARN, "kernels", native.reason()


def _folders() -> Iterator[Finding]:
    paths = find_paths().create()
    free = shutil.disk_usage(paths.root).free / 2**30
    yield (OK if free > 2 else WARN), "disk", f"{free:.1f} GiB free at {paths.root}"
    for role in DAEMONS if config.load().gateway.enabled else ROLES:
        if is_locked(paths.run, role):
            yield OK, role, f"runs (pid {holder_of(paths.run, role)})"
        else:
            yield WARN, role, "does not run; start it with `honcho start`"
    paths.socket("inference-pub")
    models = [path for path in paths.models.iterdir() if path.is_dir()] if paths.models.is_dir() else []
    taken = sum(file.stat().st_size for folder in models for file in folder.rglob("*") if file.is_file()) / 1e9
    yield OK, "models", f"{len(models)} folders, {taken:.1f} GB at {paths.models}"


def _ports() -> Iterator[Finding]:
    """The TCP ports that the settings name: ours, free, or another program's."""
    settings, paths = config.load(), find_paths()
    wanted: list[tuple[str, str, int, bool]] = []
    if settings.gateway.enabled and settings.gateway.port:
        wanted.append(("gateway.port", settings.gateway.host, settings.gateway.port, is_locked(paths.run, "gateway")))
    if settings.bus.transport == "tcp":
        for place, role in enumerate(role for role in ROLES for _ in range(2)):
            wanted.append(("bus.port", settings.bus.host, settings.bus.port + place, is_locked(paths.run, role)))
    for setting, host, port, ours in wanted:
        taken = _is_taken(host, port)
        if taken and not ours:
            level = WARN if setting == "gateway.port" else BAD  # the others do without the gateway
            yield level, "port", f"{port} of {host} is taken by another program: set {setting}, or end that program"
        else:
            yield OK, "port", f"{port} of {host} is {'ours' if taken else 'free'}"


def _is_taken(host: str, port: int) -> bool:
    """Whether somebody listens there. Raises ConfigError for an address that this machine does not have."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return True
            raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return False


def _settings() -> Iterator[Finding]:
    settings = config.load()
    yield OK, "settings", str(config.settings_file())
    from specl.cli.models import _where

    folder = find_paths().models
    for role, name, is_draft in (
        ("target", settings.models.target.name, False),
        ("draft", settings.models.draft.name, True),
    ):
        where = _where(name, folder, is_draft)
        if name is None:
            yield OK, role, "none"
        else:
            yield (OK if where else WARN), role, f"{name}: {where or 'not here yet, `specl-ctl models fetch`'}"


def _memory() -> Iterator[Finding]:
    """What the settings' models will take, where they are here."""
    from specl.shared.models import memory
    from specl.shared.models.load import located
    from specl.shared.models.pair import draft_folder, estimate_pair

    settings, folder = config.load(), find_paths().models
    target, name = located(settings.models.target.name, folder), settings.models.draft.name
    draft = (draft_folder(name, folder) or located(name, folder)) if name else None
    if target is None or not target.is_dir() or (name and (draft is None or not draft.is_dir())):
        yield OK, "memory", "told when the models are here: `specl-ctl models fetch`"
        return
    found, machine = estimate_pair(settings, target, draft)
    allowed = memory.limit(settings, machine)
    room = "any amount" if allowed == float("inf") else f"{allowed / 1e9:.1f} GB"
    yield OK, "memory", f"estimated {found.describe()}; {room} may be taken of {machine.memory / 1e9:.1f} GB"
    memory.check(found, settings, machine, training=False)
    if found.total(training=True) > allowed:
        yield WARN, "memory", "serving fits, training beside it does not: the draft will not learn here"


def _costs() -> Iterator[Finding]:
    """The calibrated curve, where inference has measured one."""
    import json

    for path in sorted(find_paths().costs.glob("*.json"), key=lambda p: p.stat().st_mtime)[-1:]:
        kept = json.loads(path.read_text())
        verify = ", ".join(f"{w}: {1000 * s:.0f}" for w, s in kept["verify"].items())
        draft = ", ".join(f"{k}: {1000 * s:.0f}" for k, s in kept["draft"].items())
        yield OK, "costs", f"target step by width {verify} ms; draft by depth {draft or '-'} ms"


@click.command()
def doctor() -> None:
    """Check machine, BLAS, disk, locks, settings and models, and say what to do. Exit code 1 where something is broken."""
    worst = OK
    for check in (_machine, _blas, _folders, _ports, _settings, _memory, _costs):
        try:
            findings = list(check())
        except SpecLoraError as error:
            findings = [(BAD, check.__name__.strip("_"), f"{error} {error.hint}".strip())]
        for level, name, text in findings:
            colour = {OK: "green", WARN: "yellow", BAD: "red"}[level]
            click.echo(f"{click.style(f'{level:<5}', fg=colour)}{name:<11}{text}")
            worst = level if level == BAD else worst
    if worst == BAD:
        raise SystemExit(1)
