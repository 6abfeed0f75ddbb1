"""Whether this machine has room for models in a command's own process, beside those that the running daemons hold."""

from pathlib import Path

import click

from specl.shared.errors import ModelError
from specl.shared.loading.engine import draft_folder, estimate_pair
from specl.shared.models import memory
from specl.shared.models.load import located
from specl.shared.paths import Paths
from specl.shared.runtime.locks import is_locked
from specl.shared.settings.schema import Settings


def folders(settings: Settings, models: Path) -> tuple[Path | None, Path | None]:
    """The settings' target and draft, where they are here as folders."""
    name = settings.models.draft.name
    draft = (draft_folder(name, models) or here(name, models)) if name else None
    return here(settings.models.target.name, models), draft


def here(name: str, models: Path) -> Path | None:
    """The model's folder, where it needs neither fetching nor converting first."""
    path = located(name, models)
    return path if path is not None and path.is_dir() else None


def check_memory(settings: Settings, paths: Paths, target: Path | None, draft: Path | None, what: str) -> None:
    """Raises ModelError where the models in these folders do not fit beside the daemons'. Says so where nobody can tell; of
    a model that is not here yet nothing is known.
    """
    if target is None:
        return
    try:
        own, machine = estimate_pair(settings, target, draft)
        needed, beside = own.total(training=False), _held(settings, paths)
    except ModelError as error:
        click.echo(f"memory is not checked: {error}", err=True)
        return
    allowed = memory.limit(settings, machine)
    if needed + beside <= allowed:
        return
    daemons = f" beside the {beside / 1e9:.1f} GB of the running daemons" if beside else ""
    raise ModelError(
        f"{what} needs about {needed / 1e9:.1f} GB{daemons}; {allowed / 1e9:.1f} GB may be taken of this machine's "
        f"{machine.memory / 1e9:.1f} GB",
        "stop the daemons meanwhile, take a smaller or more quantised model, or set memory.limit_gb",
    )


def _held(settings: Settings, paths: Paths) -> float:
    """Bytes that the inference daemon takes, or may take with its next request; 0 where it does not run."""
    target, draft = folders(settings, paths.models)
    if target is None or not is_locked(paths.run, "inference"):
        return 0.0
    return estimate_pair(settings, target, draft)[0].total(training=False)
