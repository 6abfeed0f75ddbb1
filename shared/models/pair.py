"""Target and draft by the settings' names, checked against each other, as an engine. Shipped drafts are found by name."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from specl.shared.config import Settings
from specl.shared.errors import ModelError
from specl.shared.models.head import HeadDraft, is_head, load_head
from specl.shared.models.load import LanguageModel, check_pair, load

if TYPE_CHECKING:
    from specl.shared.engine.engine import Engine

SHIPPED = Path(__file__).parent / "drafts"


def draft_folder(name: str, models: Path) -> Path | None:
    """Where a head draft of this name lies: a folder, one built under var/models, or a shipped one."""
    for folder in (Path(name).expanduser(), models / "drafts" / name, SHIPPED / name):
        if is_head(folder):
            return folder
    return None


def load_draft(
    name: str | None, target: LanguageModel, models: Path, precision: str, say: Callable[[str], None]
) -> HeadDraft | LanguageModel | None:
    """The draft for `target`. Raises ModelError where it is missing, damaged, or speaks another vocabulary."""
    if name is None:
        return None
    folder = draft_folder(name, models)
    if folder is not None:
        return load_head(folder, name, target)
    try:
        draft = load(name, models, precision, say)
    except ModelError as error:
        raise ModelError(
            f"the draft: {error}", error.hint or "set models.draft.name, or null to decode without a draft"
        ) from error
    check_pair(target, draft)
    return draft


def load_pair(settings: Settings, models: Path, say: Callable[[str], None] = lambda message: None) -> "Engine":
    """An engine with the settings' target and draft."""
    from specl.shared.engine.engine import Engine

    target = load(settings.models.target.name, models, settings.models.precision, say)
    draft = load_draft(settings.models.draft.name, target, models, settings.models.precision, say)
    return Engine(target, draft, settings)
