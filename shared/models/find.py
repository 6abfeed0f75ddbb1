"""From a model's name to its folder: a local folder, the built-in model, a GGUF file, Ollama's, LM
Studio's or the hub's.

Knows names and folders; loads no weights. `find_...` does no work, `ensure_model`
downloads and converts.
"""

import json
from contextlib import suppress
from pathlib import Path

from specl.shared.errors import ModelError, ModelUnavailable
from specl.shared.models import builtin, local_models
from specl.shared.models.gguf_import import conversion_folder, ensure_converted, is_gguf
from specl.shared.models.report import Report, no_report

HUB_FILES = ["*.json", "model*.safetensors", "tokenizer.model", "*.tiktoken", "*.txt", "*.jinja"]


def find_model(name: str, models: Path) -> Path | None:
    """The folder of a model that is on this machine, or a GGUF file that is not converted yet; None
    where there is neither.

    Raises ModelError for a name of Ollama's or LM Studio's that is not there.
    """
    path = Path(name).expanduser()
    if "/" not in name and (models / name / "config.json").is_file():
        return models / name
    if name.startswith(local_models.PREFIXES):
        path = local_models.model_named(name, local_models.list_local_models()).path
    if is_gguf(path):
        converted = conversion_folder(path, models)
        return converted if (converted / "config.json").is_file() else path
    return path if path.is_dir() else None


def find_downloaded(name: str, models: Path) -> Path | None:
    """`find_model`, the built-in model, or the hub's cache; None for everything that is not on this
    machine.
    """
    if name == builtin.NAME:
        return models / name if (models / name / "config.json").is_file() else None
    with suppress(ModelError):
        if (path := find_model(name, models)) is not None or name.count("/") != 1:
            return path
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(name, "config.json")
        return Path(cached).parent if isinstance(cached, str) else None
    return None


def ensure_model(name: str, models: Path, report: Report = no_report) -> Path:
    """The folder of the model `name`; downloads the built-in model or a hub model, and converts a
    GGUF file, on first use.

    Raises ModelError with one sentence that says what is wrong, and ModelUnavailable where the network or the disk failed.
    """
    if name == builtin.NAME:
        return builtin.ensure(models, report)
    path = find_model(name, models)
    if path is not None and not path.is_dir():
        return ensure_converted(path, models, report)
    if path is not None:
        if not (path / "config.json").is_file():
            raise ModelError(f"{path} is not a model folder: it has no config.json")
        return path
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelError(
            f"there is no model {name!r}", f"name a folder, a GGUF file, a hub model (owner/name) or `{builtin.NAME}`"
        )
    return _from_hub(name, report)


def _from_hub(name: str, report: Report) -> Path:
    """The copy in the hub's cache where it is whole: no start asks the network, and no newer
    revision becomes the model unasked. Otherwise it is downloaded.
    """
    if (cached := _whole_copy(name)) is not None:
        return cached
    report(f"looking for {name} on the hub")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub client raises its own, requests' and httpx's errors
        reason = str(error).strip().splitlines() or [type(error).__name__]
        kind = ModelError if _name_is_wrong(error) else ModelUnavailable
        raise kind(
            f"the hub model {name} cannot be fetched: {reason[0]}",
            "check the name and the network, or use a local folder",
        ) from error


def _whole_copy(name: str) -> Path | None:
    """The cached snapshot of a hub model, if every file that it needs is there."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=HUB_FILES, local_files_only=True))
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            weights = {str(file) for file in json.loads(index.read_bytes())["weight_map"].values()}
        else:
            weights = {"model.safetensors"}
    except Exception:  # nothing cached, or an index that was torn: what is missing is fetched
        return None
    needed = {"config.json", "tokenizer_config.json", *weights}
    return folder if all((folder / file).is_file() for file in needed) else None


def _name_is_wrong(error: Exception) -> bool:
    """Whether the hub knows no such model, or refuses it to this user: asking again later cannot help."""
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    return isinstance(error, (GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError))
