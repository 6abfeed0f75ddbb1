"""`specl-ctl models`: which models the settings name, and where they lie."""

import json
from pathlib import Path
from typing import Any

import click

from specl.shared import config
from specl.shared.errors import ModelError
from specl.shared.paths import find_paths


@click.group()
def models() -> None:
    """Which models are used, and where they lie."""


def _where(name: str | None, folder: Path, is_draft: bool) -> str | None:
    """The folder a name stands for, without fetching anything."""
    from specl.shared.models import builtin

    if name is None:
        return None
    if is_draft:
        from specl.shared.models.pair import draft_folder

        found = draft_folder(name, folder)
        if found is not None:
            return str(found)
    if name == builtin.NAME:
        path = folder / name
        return str(path) if (path / "config.json").is_file() else None
    if Path(name).expanduser().is_dir():
        return str(Path(name).expanduser())
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json") if name.count("/") == 1 else None
    return str(Path(cached).parent) if isinstance(cached, str) else None


@models.command("list")
@click.option("--json", "as_object", is_flag=True)
def list_(as_object: bool) -> None:
    """Target and draft of the settings, with their folders (empty: not fetched yet)."""
    settings, folder = config.load(), find_paths().models
    found: dict[str, Any] = {
        role: {"name": model.name, "path": _where(model.name, folder, role == "draft")}
        for role, model in (("target", settings.models.target), ("draft", settings.models.draft))
    }
    if as_object:
        click.echo(json.dumps(found))
        return
    for role, item in found.items():
        click.echo(f"{role:<8}{item['name'] or 'none':<28}{item['path'] or 'not here yet: `specl-ctl models fetch`'}")


@models.command()
def fetch() -> None:
    """Fetch and convert what the settings name and is not here yet."""
    from specl.shared.models.load import resolve, to_stderr
    from specl.shared.models.pair import draft_folder

    settings, paths = config.load(), find_paths()
    click.echo(f"target  {resolve(settings.models.target.name, paths.models, to_stderr)}")
    draft = settings.models.draft.name
    if draft is not None:
        try:
            click.echo(f"draft   {draft_folder(draft, paths.models) or resolve(draft, paths.models, to_stderr)}")
        except ModelError as error:
            raise ModelError(f"the draft: {error}", error.hint) from error
