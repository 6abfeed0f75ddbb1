"""Models that Ollama and LM Studio keep on this machine. Reads their folders, changes nothing.

Names: `ollama:llama3.2:1b` as Ollama names it, `lmstudio:publisher/model` for an MLX folder and
`lmstudio:publisher/model/file.gguf` for a GGUF file.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from specl.shared.errors import ModelError

MODEL_LAYER = "application/vnd.ollama.image.model"
PREFIXES = ("ollama:", "lmstudio:")
OLLAMA_SERVICE = Path("/usr/share/ollama/.ollama/models")  # what its installer sets up on Linux
_REGISTRY, _OFFICIAL, _LATEST = "registry.ollama.ai", "library", "latest"


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model as another program keeps it: a GGUF file, or a folder that mlx-lm reads."""

    name: str
    path: Path
    format: str  # gguf | mlx
    size: int  # bytes


def list_local_models() -> list[LocalModel]:
    """The models of this user and machine, sorted by name."""
    ollama = os.environ.get("OLLAMA_MODELS")
    return list_models_under(Path.home(), Path(ollama).expanduser() if ollama else None)


def list_models_under(home: Path, ollama: Path | None = None, service: Path = OLLAMA_SERVICE) -> list[LocalModel]:
    """The models under `home`, sorted by name.

    `ollama` is Ollama's models folder where the user has moved it (OLLAMA_MODELS), `service` the
    folder of an Ollama that runs as a system service. Where two folders have the same name, the
    first folder wins.
    """
    models: list[LocalModel] = []
    for folder in (ollama,) if ollama else (home / ".ollama" / "models", service):
        models += _readable(_ollama, folder)
    for folder in filter(Path.is_absolute, _lm_studio_folders(home)):
        models += _readable(_lm_studio, folder)
    return sorted({model.name: model for model in reversed(models)}.values(), key=lambda model: model.name)


def _readable(list_folder: Callable[[Path], Iterator[LocalModel]], folder: Path) -> list[LocalModel]:
    """A folder's models; none where the folder belongs to another user."""
    try:
        return list(list_folder(folder))
    except OSError:
        return []


def model_named(name: str, models: list[LocalModel]) -> LocalModel:
    """The one of `models` with that name; Ollama's tag `latest` may be left out. Raises ModelError
    where there is none.
    """
    for model in models:
        if model.name == name or (name.startswith("ollama:") and model.name == f"{name}:{_LATEST}"):
            return model
    raise ModelError(f"there is no model {name!r} here", "`specl-ctl models list --found` names what is")


def _ollama(folder: Path) -> Iterator[LocalModel]:
    """Each manifests/REGISTRY/NAMESPACE/MODEL/TAG is JSON that names blobs/sha256-HEX."""
    manifests = folder / "manifests"
    for manifest in sorted(path for path in manifests.glob("*/*/*/*") if path.is_file()):
        try:
            layers = json.loads(manifest.read_bytes())["layers"]
            digest = next(layer["digest"] for layer in layers if layer["mediaType"] == MODEL_LAYER)
            blob = folder / "blobs" / Path(digest.replace(":", "-")).name
            size = blob.stat().st_size
        except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration, RecursionError):
            continue  # not completely pulled, or no language model
        registry, namespace, model, tag = manifest.relative_to(manifests).parts
        official = registry == _REGISTRY and namespace == _OFFICIAL
        host = "" if registry == _REGISTRY else f"{registry}/"
        yield LocalModel(f"ollama:{model if official else f'{host}{namespace}/{model}'}:{tag}", blob, "gguf", size)


def _lm_studio_folders(home: Path) -> Iterator[Path]:
    """LM Studio's models folders: those of the home that its pointer file names and of its present
    and former default home, each after the downloads folder that its settings name.
    """
    homes = [home / ".lmstudio", home / ".cache" / "lm-studio"]
    with suppress(OSError, ValueError):
        homes.insert(0, Path((home / ".lmstudio-home-pointer").read_text().strip()))
    for folder in filter(Path.is_absolute, homes):
        with suppress(OSError, ValueError, KeyError, TypeError):
            yield Path(json.loads((folder / "settings.json").read_bytes())["downloadsFolder"])
        yield folder / "models"


def _lm_studio(folder: Path) -> Iterator[LocalModel]:
    """Each PUBLISHER/MODEL/ holds GGUF files, or the files of a hub model."""
    for model in sorted(path for path in folder.glob("*/*") if path.is_dir()):
        name = f"lmstudio:{model.parent.name}/{model.name}"
        weights = sorted(model.glob("*.safetensors"))
        if weights and (model / "config.json").is_file():
            yield LocalModel(name, model, "mlx", sum(path.stat().st_size for path in weights))
        for file in sorted(model.glob("*.gguf")):
            if file.is_file() and not file.name.startswith("mmproj"):  # the image encoder of a vision model
                yield LocalModel(f"{name}/{file.name}", file, "gguf", file.stat().st_size)
