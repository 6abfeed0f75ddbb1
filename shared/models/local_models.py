"""Models that other programs have already put on this machine: Ollama's and LM Studio's. Reads their folders, changes nothing.

Names: `ollama:llama3.2:1b` as Ollama itself says it, `lmstudio:publisher/model` for an MLX folder and
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
class Found:
    """A model as another program keeps it: a GGUF file, or a folder that mlx-lm reads."""

    name: str
    path: Path
    format: str  # gguf | mlx
    size: int  # bytes


def search(home: Path, ollama: Path | None = None, service: Path = OLLAMA_SERVICE) -> list[Found]:
    """Everything found under `home`, by name; `ollama` is its models folder where that is elsewhere (OLLAMA_MODELS), `service`
    where a system's own Ollama keeps them. A name that is in two of these is the one found first.
    """
    found: list[Found] = []
    for folder in (ollama,) if ollama else (home / ".ollama" / "models", service):
        found += _readable(_ollama, folder)
    for folder in filter(Path.is_absolute, _lm_studio_folders(home)):
        found += _readable(_lm_studio, folder)
    return sorted({item.name: item for item in reversed(found)}.values(), key=lambda item: item.name)


def _readable(look: Callable[[Path], Iterator[Found]], folder: Path) -> list[Found]:
    """What is there; nothing where it belongs to another user."""
    try:
        return list(look(folder))
    except OSError:
        return []


def search_here() -> list[Found]:
    """The same for the user's own home and environment."""
    named = os.environ.get("OLLAMA_MODELS")
    return search(Path.home(), Path(named).expanduser() if named else None)


def find(name: str, among: list[Found]) -> Found:
    """The model of that name; Ollama's tag may be left out for `latest`. Raises ModelError where there is none."""
    for item in among:
        if item.name == name or (name.startswith("ollama:") and item.name == f"{name}:{_LATEST}"):
            return item
    raise ModelError(f"there is no model {name!r} here", "`specl-ctl models list --found` names what is")


def _ollama(folder: Path) -> Iterator[Found]:
    """manifests/REGISTRY/NAMESPACE/MODEL/TAG is JSON that names blobs/sha256-HEX."""
    manifests = folder / "manifests"
    for manifest in sorted(path for path in manifests.glob("*/*/*/*") if path.is_file()):
        try:
            layers = json.loads(manifest.read_bytes())["layers"]
            digest = next(layer["digest"] for layer in layers if layer["mediaType"] == MODEL_LAYER)
            blob = folder / "blobs" / Path(digest.replace(":", "-")).name
            size = blob.stat().st_size
        except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration, RecursionError):
            continue  # half pulled, or no language model
        registry, namespace, model, tag = manifest.relative_to(manifests).parts
        official = registry == _REGISTRY and namespace == _OFFICIAL
        host = "" if registry == _REGISTRY else f"{registry}/"
        yield Found(f"ollama:{model if official else f'{host}{namespace}/{model}'}:{tag}", blob, "gguf", size)


def _lm_studio_folders(home: Path) -> Iterator[Path]:
    """Its models folders: of the home that it says it has, of its present and its former default, each with the downloads folder
    that its settings name.
    """
    homes = [home / ".lmstudio", home / ".cache" / "lm-studio"]
    with suppress(OSError, ValueError):
        homes.insert(0, Path((home / ".lmstudio-home-pointer").read_text().strip()))
    for place in filter(Path.is_absolute, homes):
        with suppress(OSError, ValueError, KeyError, TypeError):
            yield Path(json.loads((place / "settings.json").read_bytes())["downloadsFolder"])
        yield place / "models"


def _lm_studio(folder: Path) -> Iterator[Found]:
    """PUBLISHER/MODEL/ holds GGUF files, or a folder as the hub has it."""
    for model in sorted(path for path in folder.glob("*/*") if path.is_dir()):
        name = f"lmstudio:{model.parent.name}/{model.name}"
        weights = sorted(model.glob("*.safetensors"))
        if weights and (model / "config.json").is_file():
            yield Found(name, model, "mlx", sum(path.stat().st_size for path in weights))
        for file in sorted(model.glob("*.gguf")):
            if file.is_file() and not file.name.startswith("mmproj"):  # the eyes of a vision model
                yield Found(f"{name}/{file.name}", file, "gguf", file.stat().st_size)
