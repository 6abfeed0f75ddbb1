"""`specl-ctl doctor`: checks of this machine, the settings and the run directory; each problem
comes with what to do about it.

A check is a function that yields findings. It changes nothing, except that the run
directory is made.
"""

import errno
import json
import os
import platform
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from typing import NamedTuple

import click

from specl.shared.errors import ConfigError, SpecLoraError
from specl.shared.messaging.endpoints import Addresses, check_exposure, gateway_token
from specl.shared.paths import DAEMONS, ROLES, find_paths
from specl.shared.runtime.locks import holder_of, is_locked
from specl.shared.settings.load import load_settings, settings_file
from specl.shared.settings.plugins import is_plugin, load_plugin

OK, WARN, BAD = "ok", "warn", "bad"


class Finding(NamedTuple):
    """One line of the report: OK, WARN or BAD, what was checked, and a sentence."""

    level: str
    name: str
    text: str


def check_machine() -> Iterator[Finding]:
    """System, processor cores, Python and the libraries that matter."""
    system = f"{platform.system()} {platform.machine()}"
    yield Finding(OK, "machine", f"{system}, {os.cpu_count()} cores, Python {platform.python_version()}")
    libraries = ", ".join(f"{name} {version(name)}" for name in ("mlx", "mlx-lm", "pyzmq", "sqlalchemy"))
    yield Finding(OK, "libraries", libraries)


def check_blas() -> Iterator[Finding]:
    """The BLAS that matrix products use, the device and the native kernels."""
    from specl.shared.models import blas

    bound = blas.BOUND
    if bound.fast:
        yield Finding(OK, "blas", bound.name)
    else:
        text = f"{bound.name}: matrix products are 5 to 30 times slower ({bound.note}). {blas.REMEDY}"
        yield Finding(WARN, "blas", text)
    import mlx.core as mx

    yield device_finding(platform.system(), mx.default_device().type.name)
    yield from _native()


def device_finding(system: str, kind: str) -> Finding:
    """Where MLX runs models: `kind` is `cpu` or `gpu`."""
    if system != "Darwin":
        return Finding(OK, "device", kind)
    if kind == "gpu":
        return Finding(OK, "device", "gpu (Metal)")
    return Finding(
        WARN,
        "device",
        "cpu: MLX does not use the Metal of this Mac, and answers will be slow. It needs Apple silicon and a Python for arm64: "
        "if `python -c 'import platform; print(platform.machine())'` prints arm64, run `pip install --force-reinstall mlx`",
    )


def _native() -> Iterator[Finding]:
    """The C++ kernels for the CPU. A GPU and macOS do without them."""
    from specl.shared import native
    from specl.shared.models.cpu_kernels import on_cpu

    if native.available():
        yield Finding(OK, "kernels", f"native {native.instruction_set()}, {native.threads()} threads")
    elif on_cpu():
        yield Finding(WARN, "kernels", native.reason())


def check_folders() -> Iterator[Finding]:
    """Disk space, which daemons run, and the models folder."""
    paths = find_paths().create()
    free = shutil.disk_usage(paths.root).free / 2**30
    yield Finding(OK if free > 2 else WARN, "disk", f"{free:.1f} GiB free at {paths.root}")
    for role in DAEMONS if load_settings().gateway.enabled else ROLES:
        if is_locked(paths.run, role):
            yield Finding(OK, role, f"runs (pid {holder_of(paths.run, role)})")
        else:
            yield Finding(WARN, role, "does not run; start it with `honcho start`")
    paths.socket("inference-pub")  # raises where the path is too long
    models = [path for path in paths.models.iterdir() if path.is_dir()] if paths.models.is_dir() else []
    size = sum(file.stat().st_size for folder in models for file in folder.rglob("*") if file.is_file()) / 1e9
    yield Finding(OK, "models", f"{len(models)} folders, {size:.1f} GB at {paths.models}")


def check_access() -> Iterator[Finding]:
    """Who may connect to the daemons, by the checks that daemons make when they start."""
    settings, paths = load_settings(), find_paths()
    if settings.gateway.enabled:
        token = gateway_token(settings.gateway)
        check_exposure(settings.gateway, token)
        yield Finding(OK, "gateway", f"{settings.gateway.host}, {'with' if token else 'without'} a token")
    keys = Addresses(paths, settings.bus).keys
    if keys is not None and not keys.server_secret:
        text = f"the keys in {paths.keys} are a client's: this machine can use daemons on another machine, and run none"
        yield Finding(WARN, "bus", text)
    else:
        yield Finding(OK, "bus", f"{settings.bus.transport}, {'with' if keys else 'without'} keys")


def check_plugins() -> Iterator[Finding]:
    """The custom code that the settings name, imported as daemons import it that are started in
    this folder.
    """
    settings = load_settings()
    named = {"speculative.drafter": settings.speculative.drafter, "training.loss.type": settings.training.loss.type}
    for setting, name in named.items():
        if name is not None and is_plugin(name):
            load_plugin(name, setting)
            yield Finding(OK, "plugin", f"{setting}: {name}")


def check_ports() -> Iterator[Finding]:
    """The TCP ports in the settings: ours, free, or used by another program."""
    settings, paths = load_settings(), find_paths()
    ports: list[tuple[str, str, int, bool]] = []  # setting, host, port, whether our daemon runs
    if settings.gateway.enabled and settings.gateway.port:
        ports.append(("gateway.port", settings.gateway.host, settings.gateway.port, is_locked(paths.run, "gateway")))
    if settings.bus.transport == "tcp":
        for offset, role in enumerate(role for role in ROLES for _ in range(2)):
            ports.append(("bus.port", settings.bus.host, settings.bus.port + offset, is_locked(paths.run, role)))
    for setting, host, port, ours in ports:
        taken = _is_taken(host, port)
        if taken and not ours:
            level = WARN if setting == "gateway.port" else BAD  # the other daemons run without the gateway
            text = f"{port} of {host} is taken by another program: set {setting}, or end that program"
            yield Finding(level, "port", text)
        else:
            yield Finding(OK, "port", f"{port} of {host} is {'ours' if taken else 'free'}")


def _is_taken(host: str, port: int) -> bool:
    """Whether a program listens there. Raises ConfigError for an address that this machine does not
    have.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return True
            raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return False


def check_settings() -> Iterator[Finding]:
    """The settings file, and whether its models are on this machine."""
    settings = load_settings()
    yield Finding(OK, "settings", str(settings_file()))
    from specl.cli.models import model_folder

    folder = find_paths().models
    for role, name, is_draft in (
        ("target", settings.models.target.name, False),
        ("draft", settings.models.draft.name, True),
    ):
        where = model_folder(name, folder, is_draft)
        if name is None:
            yield Finding(OK, role, "none")
        else:
            yield Finding(OK if where else WARN, role, f"{name}: {where or 'not here yet, `specl-ctl models fetch`'}")


def check_memory() -> Iterator[Finding]:
    """The memory that the settings' models will take, if they are on this machine."""
    from specl.cli.memory_check import local_pair
    from specl.shared.loading.engine import estimate_pair
    from specl.shared.models import memory

    settings = load_settings()
    target, draft = local_pair(settings, find_paths().models)
    if target is None or (settings.models.draft.name and draft is None):
        yield Finding(OK, "memory", "estimated once the models are here: `specl-ctl models fetch`")
        return
    estimate, machine = estimate_pair(settings, target, draft)
    allowed = memory.limit(settings, machine)
    limit = "any amount" if allowed == float("inf") else f"{allowed / 1e9:.1f} GB"
    text = f"estimated {estimate.describe()}; {limit} may be taken of {machine.memory / 1e9:.1f} GB"
    yield Finding(OK, "memory", text)
    memory.check(estimate, settings, machine, training=False)
    if estimate.total(training=True) > allowed:
        yield Finding(WARN, "memory", "serving fits, training beside it does not: the draft will not learn here")


def check_costs() -> Iterator[Finding]:
    """The measured times of steps, if inference has measured them."""
    for path in sorted(find_paths().costs.glob("*.json"), key=lambda p: p.stat().st_mtime)[-1:]:
        try:
            costs = json.loads(path.read_text())
            verify, draft = (
                ", ".join(f"{n}: {1000 * s:.0f}" for n, s in costs[name].items()) for name in ("verify", "draft")
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            yield Finding(WARN, "costs", f"{path} cannot be read; inference measures them again when it starts")
        else:
            yield Finding(OK, "costs", f"target step by width {verify} ms; draft by depth {draft or '-'} ms")


CHECKS = (
    check_machine,
    check_blas,
    check_folders,
    check_access,
    check_plugins,
    check_ports,
    check_settings,
    check_memory,
    check_costs,
)


def examine(checks: Iterable[Callable[[], Iterator[Finding]]] = CHECKS) -> Iterator[Finding]:
    """The findings of all checks. A check that raises becomes a finding, and the others go on."""
    for check in checks:
        name = check.__name__.removeprefix("check_")
        try:
            yield from check()
        except SpecLoraError as error:
            yield Finding(BAD, name, f"{error}" + (f"; {error.hint}" if error.hint else ""))
        except Exception as error:  # a broken library or file may raise anything
            yield Finding(BAD, name, f"this check failed: {type(error).__name__}: {error}")


@click.command()
@click.option(
    "--json", "as_object", is_flag=True, help="One JSON object: `ok`, and findings with level, name and text."
)
def doctor(as_object: bool) -> None:
    """Check machine, BLAS, disk, locks, who may connect, settings and models, and say what to do.

    Exit code 1 if something is broken.
    """
    findings = []
    for finding in examine():
        findings.append(finding)
        if not as_object:
            colour = {OK: "green", WARN: "yellow", BAD: "red"}[finding.level]
            click.echo(f"{click.style(f'{finding.level:<5}', fg=colour)}{finding.name:<11}{finding.text}")
    healthy = all(finding.level != BAD for finding in findings)
    if as_object:
        rows = [{"level": finding.level, "name": finding.name, "text": finding.text} for finding in findings]
        click.echo(json.dumps({"ok": healthy, "findings": rows}, ensure_ascii=False))
    if not healthy:
        raise SystemExit(1)
