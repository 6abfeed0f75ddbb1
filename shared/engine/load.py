"""Target and draft by the settings' names, checked against each other, as an engine. Shipped drafts are found by name."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from specl.shared.errors import ModelError
from specl.shared.models import memory
from specl.shared.models.head import HeadDraft, is_head, load_head
from specl.shared.models.load import LanguageModel, check_pair, load, resolve
from specl.shared.settings.plugins import load_hook
from specl.shared.settings.schema import Settings

if TYPE_CHECKING:
    from specl.shared.engine.core import EngineCore
    from specl.shared.engine.custom_drafter import DrafterFactory, OnError

SHIPPED = Path(__file__).parents[1] / "models" / "drafts"


def draft_folder(name: str, models: Path) -> Path | None:
    """Where a draft of this name lies: a head's folder, one of either kind built under var/models, or a shipped one."""
    built = models / "drafts" / name
    for folder in (Path(name).expanduser(), built, SHIPPED / name):
        if is_head(folder) or (folder is built and (folder / "config.json").is_file()):
            return folder
    return None


def resolve_draft(name: str | None, models: Path, say: Callable[[str], None]) -> Path | None:
    """The folder of the draft `name`, head or language model; None for none. Raises ModelError where it is missing."""
    if name is None:
        return None
    folder = draft_folder(name, models)
    if folder is not None:
        return folder
    try:
        return resolve(name, models, say)
    except ModelError as error:
        raise _about_draft(error) from error


def _about_draft(error: ModelError) -> ModelError:
    return ModelError(f"the draft: {error}", error.hint or "set models.draft.name, or null to decode without a draft")


def load_draft(
    name: str | None, target: LanguageModel, models: Path, precision: str, say: Callable[[str], None]
) -> HeadDraft | LanguageModel | None:
    """The draft for `target`. Raises ModelError where it is missing, damaged, or speaks another vocabulary."""
    folder = resolve_draft(name, models, say)
    if name is None or folder is None:
        return None
    if is_head(folder):
        return load_head(folder, name, target)
    try:
        draft = load(name, models, precision, say, folder)
    except ModelError as error:
        raise _about_draft(error) from error
    check_pair(target, draft)
    return draft


def estimate_pair(settings: Settings, target: Path, draft: Path | None) -> tuple[memory.Estimate, memory.Machine]:
    """What the models in these folders will take on this machine."""
    machine = memory.this_machine(settings.models.precision)
    sizes = memory.size_of(target), memory.size_of(draft) if draft is not None else None
    return memory.estimate(*sizes, settings, machine), machine


def load_pair(
    settings: Settings,
    models: Path,
    say: Callable[[str], None] = lambda message: None,
    training: bool = False,
    drafter_factory: "DrafterFactory | None" = None,
    complain: "OnError | None" = None,
) -> "EngineCore":
    """An engine with the settings' target and draft; with `training`, for a process that trains beside the one that serves.
    `drafter_factory` (else the one that speculative.drafter names) and `complain`: see engine/custom_drafter.

    Raises ModelError, before anything is loaded, where memory cannot hold that.
    """
    from specl.shared.engine.core import EngineCore

    name, precision = settings.models.target.name, settings.models.precision
    path = resolve(name, models, say)
    draft = resolve_draft(settings.models.draft.name, models, say)
    try:
        found, machine = estimate_pair(settings, path, draft)
    except ModelError as error:  # an unusual config: whether it can be served is for `load` to say
        say(f"memory is not checked: {error}")
    else:
        memory.check(found, settings, machine, training)
    make = None
    if settings.speculative.drafter is not None and not training:
        make = load_hook(settings.speculative.drafter, "speculative.drafter")
    target = load(name, models, precision, say, path)
    drafted_by = load_draft(settings.models.draft.name, target, models, precision, say)
    return EngineCore(target, drafted_by, settings, drafter_factory or make, complain)
