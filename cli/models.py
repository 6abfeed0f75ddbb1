"""`specl-ctl models`: the models of the settings and their folders, import of
GGUF files, downloads.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from specl.cli.terminal import echo
from specl.shared.errors import ModelError
from specl.shared.paths import find_paths
from specl.shared.settings.load import load_settings

if TYPE_CHECKING:
    from specl.shared.models.gguf_tensors import Quantize


@click.group()
def models() -> None:
    """Which models are used, and where; import GGUF files."""


def model_folder(name: str | None, models: Path, is_draft: bool) -> Path | None:
    """The folder of a target or draft of the settings, or None; fetches nothing."""
    from specl.shared.loading.engine import draft_folder
    from specl.shared.models.find import find_downloaded

    if name is None:
        return None
    return (draft_folder(name, models) if is_draft else None) or find_downloaded(name, models)


@models.command("list")
@click.option("--json", "as_object", is_flag=True, help="One JSON object; with --found a list.")
@click.option("--found", "found", is_flag=True, help="What Ollama and LM Studio have on this machine.")
def list_(as_object: bool, found: bool) -> None:
    """Target and draft of the settings, with their folders (empty: not fetched yet).

    With --found: models that Ollama and LM Studio keep here. Each can be used by its name, as
    `models.target.name` or in `specl-ctl models import NAME`.
    """
    if found:
        _list_local_models(as_object)
        return
    settings, models = load_settings(), find_paths().models
    names = {"target": settings.models.target.name, "draft": settings.models.draft.name}
    folders = {role: model_folder(name, models, role == "draft") for role, name in names.items()}
    if as_object:
        rows = {
            role: {"name": name, "path": str(folders[role]) if folders[role] else None} for role, name in names.items()
        }
        click.echo(json.dumps(rows))
        return
    for role, name in names.items():
        where = folders[role] or ("not here yet: `specl-ctl models fetch`" if name else "")
        echo(f"{role:<8}{name or 'none':<28}{where}".rstrip())


def _list_local_models(as_object: bool) -> None:
    from specl.shared.models.local_models import list_local_models

    models = list_local_models()
    if as_object:
        rows = [{"name": m.name, "path": str(m.path), "format": m.format, "bytes": m.size} for m in models]
        click.echo(json.dumps(rows))
        return
    if not models:
        click.echo("nothing of Ollama's or LM Studio's is here")
    for model in models:
        echo(f"{model.name:<48}{model.format:<6}{model.size / 1e9:>6.1f} GB  {model.path}")


@models.command("import")
@click.argument("file")
@click.option(
    "--quantize",
    type=click.Choice(["keep", "4", "8", "none"]),
    default="keep",
    show_default=True,
    help="keep: the file's own blocks; 4 or 8: quantise anew to that many bits; none: dense.",
)
@click.option("--name", help="What `models.target.name` will call it.  [default: from the file's name]")
@click.option("--json", "as_object", is_flag=True, help="One JSON object: name, path.")
def import_(file: str, quantize: "Quantize", name: str | None, as_object: bool) -> None:
    """Make a model of a GGUF file (Llama and Qwen2 families), its tokenizer and chat template included.

    FILE is a path, or a name that `specl-ctl models list --found` shows. Weights may be F32, F16, BF16, Q4_0, Q4_1, Q5_0,
    Q5_1, Q8_0, Q4_K, Q5_K or Q6_K.

    \b
    specl-ctl models import ~/Downloads/qwen2.5-0.5b-instruct-q8_0.gguf --name qwen-small
    specl-ctl models import ollama:llama3.2:1b
    """
    from specl.shared.models import local_models
    from specl.shared.models.gguf_import import import_gguf, suggested_name
    from specl.shared.models.report import to_stderr

    path = Path(file).expanduser()
    if file.startswith(local_models.PREFIXES):
        model = local_models.model_named(file, local_models.list_local_models())
        if model.format == "mlx":
            raise ModelError(f"{file} needs no import: it is an MLX model", f"set models.target.name to {file}")
        path = model.path
    elif not path.is_file():
        raise ModelError(f"there is no file {path}", "give a GGUF file, or a name that `models list --found` shows")
    name = name or suggested_name(file)
    folder = import_gguf(path, find_paths().models, name, quantize, to_stderr)
    if as_object:
        click.echo(json.dumps({"name": name, "path": str(folder)}))
    else:
        echo(f"{name} is at {folder}; use it with `models: {{target: {{name: {name}}}}}` in the settings file")
    if not json.loads((folder / "tokenizer_config.json").read_text()).get("chat_template"):
        click.echo("the file has no chat template: only plain completions will work, not chats", err=True)


@models.command()
def fetch() -> None:
    """Download and convert the settings' models that are not on this machine yet."""
    from specl.shared.loading.engine import draft_folder
    from specl.shared.models.find import ensure_model
    from specl.shared.models.report import to_stderr

    settings, paths = load_settings(), find_paths()
    echo(f"target  {ensure_model(settings.models.target.name, paths.models, to_stderr)}")
    draft = settings.models.draft.name
    if draft is not None:
        try:
            echo(f"draft   {draft_folder(draft, paths.models) or ensure_model(draft, paths.models, to_stderr)}")
        except ModelError as error:
            raise type(error)(f"the draft: {error}", error.hint) from error
