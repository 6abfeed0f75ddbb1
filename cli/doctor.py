"""`specl-ctl doctor`: what this machine has, what is wrong, and what to do about it."""

import errno
import json
import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version

import click

from specl.shared.errors import ConfigError, SpecLoraError
from specl.shared.messaging.endpoints import Addresses, check_exposure, gateway_token
from specl.shared.paths import DAEMONS, ROLES, find_paths
from specl.shared.runtime.locks import holder_of, is_locked
from specl.shared.settings.load import load_settings, settings_file
from specl.shared.settings.plugins import is_plugin, load_plugin

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

    yield _device(platform.system(), mx.default_device().type.name)
    yield from _native()


def _device(system: str, kind: str) -> Finding:
    """Where models run: `cpu` or `gpu`, as MLX chose."""
    if system != "Darwin":
        return OK, "device", kind
    if kind == "gpu":
        return OK, "device", "gpu (Metal)"
    return (
        WARN,
        "device",
        "cpu: MLX does not use this Mac's Metal, and answers will be slow. It needs Apple silicon and a Python of its own kind: "
        "`python -c 'import platform; print(platform.machine())'` says arm64; then `pip install --force-reinstall mlx`",
    )


def _native() -> Iterator[Finding]:
    """The C++ kernels; on a GPU and on macOS nothing is missing without them."""
    from specl.shared import native
    from specl.shared.models.cpu_kernels import on_cpu

    if native.available():
        yield OK, "kernels", f"native {native.instruction_set()}, {native.threads()} threads"
    elif on_cpu():
        yield WARN, "kernels", native.reason()


def _folders() -> Iterator[Finding]:
    paths = find_paths().create()
    free = shutil.disk_usage(paths.root).free / 2**30
    yield (OK if free > 2 else WARN), "disk", f"{free:.1f} GiB free at {paths.root}"
    for role in DAEMONS if load_settings().gateway.enabled else ROLES:
        if is_locked(paths.run, role):
            yield OK, role, f"runs (pid {holder_of(paths.run, role)})"
        else:
            yield WARN, role, "does not run; start it with `honcho start`"
    paths.socket("inference-pub")
    models = [path for path in paths.models.iterdir() if path.is_dir()] if paths.models.is_dir() else []
    taken = sum(file.stat().st_size for folder in models for file in folder.rglob("*") if file.is_file()) / 1e9
    yield OK, "models", f"{len(models)} folders, {taken:.1f} GB at {paths.models}"


def _access() -> Iterator[Finding]:
    """Who may connect: the very checks that end a daemon at its start."""
    settings, paths = load_settings(), find_paths()
    if settings.gateway.enabled:
        token = gateway_token(settings.gateway)
        check_exposure(settings.gateway, token)
        yield OK, "gateway", f"{settings.gateway.host}, {'with' if token else 'without'} a token"
    keys = Addresses(paths, settings.bus).keys
    if keys is not None and not keys.server_secret:
        yield (
            WARN,
            "bus",
            f"the keys in {paths.keys} are a client's: this machine can ask daemons elsewhere, and run none",
        )
    else:
        yield OK, "bus", f"{settings.bus.transport}, {'with' if keys else 'without'} keys"


def _hooks() -> Iterator[Finding]:
    """Programs of the user's own that the settings name, imported as the daemons started in this folder would."""
    settings = load_settings()
    named = {"speculative.drafter": settings.speculative.drafter, "training.loss.type": settings.training.loss.type}
    sys.path.insert(0, os.getcwd())
    try:
        for setting, name in named.items():
            if name is not None and is_plugin(name):
                load_plugin(name, setting)
                yield OK, "hook", f"{setting}: {name}"
    finally:
        sys.path.remove(os.getcwd())


def _ports() -> Iterator[Finding]:
    """The TCP ports that the settings name: ours, free, or another program's."""
    settings, paths = load_settings(), find_paths()
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
    settings = load_settings()
    yield OK, "settings", str(settings_file())
    from specl.cli.models import model_folder

    folder = find_paths().models
    for role, name, is_draft in (
        ("target", settings.models.target.name, False),
        ("draft", settings.models.draft.name, True),
    ):
        where = model_folder(name, folder, is_draft)
        if name is None:
            yield OK, role, "none"
        else:
            yield (OK if where else WARN), role, f"{name}: {where or 'not here yet, `specl-ctl models fetch`'}"


def _memory() -> Iterator[Finding]:
    """What the settings' models will take, where they are here."""
    from specl.cli.memory_check import local_pair
    from specl.shared.loading.engine import estimate_pair
    from specl.shared.models import memory

    settings = load_settings()
    target, draft = local_pair(settings, find_paths().models)
    if target is None or (settings.models.draft.name and draft is None):
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
    for path in sorted(find_paths().costs.glob("*.json"), key=lambda p: p.stat().st_mtime)[-1:]:
        try:
            kept = json.loads(path.read_text())
            verify, draft = (
                ", ".join(f"{n}: {1000 * s:.0f}" for n, s in kept[name].items()) for name in ("verify", "draft")
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            yield WARN, "costs", f"{path} cannot be read; inference measures them anew when it starts"
        else:
            yield OK, "costs", f"target step by width {verify} ms; draft by depth {draft or '-'} ms"


CHECKS = (_machine, _blas, _folders, _access, _hooks, _ports, _settings, _memory, _costs)


def examine(checks: Iterable[Callable[[], Iterator[Finding]]] = CHECKS) -> Iterator[Finding]:
    """What every check finds. One that fails is a finding itself: a doctor who dies of what it finds helps nobody."""
    for check in checks:
        name = check.__name__.strip("_")
        try:
            yield from check()
        except SpecLoraError as error:
            yield BAD, name, f"{error}" + (f"; {error.hint}" if error.hint else "")
        except Exception as error:  # a broken library or file may raise anything: told, and the other checks go on
            yield BAD, name, f"this check failed: {type(error).__name__}: {error}"


@click.command()
@click.option(
    "--json", "as_object", is_flag=True, help="One JSON object: `ok`, and findings with level, name and text."
)
def doctor(as_object: bool) -> None:
    """Check machine, BLAS, disk, locks, who may connect, settings and models, and say what to do. Exit code 1 where
    something is broken.
    """
    worst = OK
    told = []
    for level, name, text in examine():
        worst = level if level == BAD else worst
        told.append({"level": level, "name": name, "text": text})
        if not as_object:
            colour = {OK: "green", WARN: "yellow", BAD: "red"}[level]
            click.echo(f"{click.style(f'{level:<5}', fg=colour)}{name:<11}{text}")
    if as_object:
        click.echo(json.dumps({"ok": worst != BAD, "findings": told}, ensure_ascii=False))
    if worst == BAD:
        raise SystemExit(1)
