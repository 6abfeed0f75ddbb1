"""Whether models that a command loads into its own process fit into memory beside those of the
running daemons.

Knows settings, folders and estimates; loads nothing.
"""

from pathlib import Path

from specl.cli.terminal import echo
from specl.shared.errors import ModelError
from specl.shared.loading.engine import draft_folder, estimate_pair
from specl.shared.models import memory
from specl.shared.models.find import find_model
from specl.shared.paths import Paths
from specl.shared.runtime.locks import is_locked
from specl.shared.settings.schema import Settings


def local_pair(settings: Settings, models: Path) -> tuple[Path | None, Path | None]:
    """The folders of the settings' target and draft; None for one that is not here yet."""
    name = settings.models.draft.name
    draft = (draft_folder(name, models) or local_path(name, models)) if name else None
    return local_path(settings.models.target.name, models), draft


def local_path(name: str, models: Path) -> Path | None:
    """The folder of a model that needs neither fetching nor converting first, else None."""
    path = find_model(name, models)
    return path if path is not None and path.is_dir() else None


def check_memory(settings: Settings, paths: Paths, target: Path | None, draft: Path | None, purpose: str) -> None:
    """Raise ModelError if the models in these folders do not fit beside those of the daemons.
    `purpose` begins its sentence.

    Nothing is checked for a target that is not on this machine yet. A model whose size cannot be
    estimated is reported on stderr.
    """
    if target is None:
        return
    try:
        estimate, machine = estimate_pair(settings, target, draft)
        needed, daemons = estimate.total(training=False), _used_by_daemons(settings, paths)
    except ModelError as error:
        echo(f"memory is not checked: {error}", err=True)
        return
    allowed = memory.limit(settings, machine)
    if needed + daemons <= allowed:
        return
    beside = f" beside the {daemons / 1e9:.1f} GB of the running daemons" if daemons else ""
    raise ModelError(
        f"{purpose} needs about {needed / 1e9:.1f} GB{beside}; {allowed / 1e9:.1f} GB may be taken of this machine's "
        f"{machine.memory / 1e9:.1f} GB",
        "stop the daemons meanwhile, take a smaller or more quantised model, or set memory.limit_gb",
    )


def _used_by_daemons(settings: Settings, paths: Paths) -> float:
    """Bytes that the inference daemon uses or may use later; 0 if it does not run."""
    target, draft = local_pair(settings, paths.models)
    if target is None or not is_locked(paths.run, "inference"):
        return 0.0
    return estimate_pair(settings, target, draft)[0].total(training=False)
