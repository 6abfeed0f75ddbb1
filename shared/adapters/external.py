"""An adapter directory made elsewhere, read strictly: SpecLoRA's own, or one that mlx-lm's LoRA trainer wrote.

mlx-lm names layers within a block or not at all, so the layers are taken from the tensors' names. A manifest is optional;
where there is one, its base, tokenizer and file hashes must be right. Whether the adapter is any good is the gate's to say.
"""

import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import mlx.core as mx
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from specl.shared.adapters.manifest import Manifest, header_problem, parse_manifest, reasons
from specl.shared.adapters.registry import FILES, FOREIGN, MAX_FILE, MAX_MANIFEST, sha256_of
from specl.shared.adapters.tensors import adapter_problems, read_hot
from specl.shared.engine.core import EngineCore, LoadedAdapter
from specl.shared.errors import AdapterRejected
from specl.shared.models.head import HeadDraft
from specl.shared.models.lora import LoraShape, Weights
from specl.shared.runtime.incremental import run_all

PARTS = (".lora_a", ".lora_b")


class _Parameters(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    rank: Annotated[int, Field(ge=1)]
    scale: float


class _Config(BaseModel):
    """What is read of an adapter_config.json; mlx-lm writes its training arguments beside it."""

    model_config = ConfigDict(strict=True)

    fine_tune_type: Literal["lora"] = "lora"
    lora_parameters: _Parameters


@dataclass(frozen=True, slots=True)
class ExternalAdapter:
    """A foreign adapter that fits the draft. `manifest` is what it says of itself, where it says anything."""

    adapter: LoadedAdapter
    manifest: Manifest | None


def read_external(folder: Path, engine: EngineCore) -> ExternalAdapter:
    """Everything about a directory but its worth. Raises AdapterRejected with every reason found."""
    if problems := _file_problems(folder):
        raise AdapterRejected("; ".join(problems))
    manifest = _manifest(folder)
    problems = _claims(folder, manifest, engine) if manifest is not None else []
    try:
        config = _Config.model_validate_json((folder / "adapter_config.json").read_bytes()).lora_parameters
    except ValidationError as error:
        raise AdapterRejected(f"adapter_config.json cannot be used: {reasons(error)}") from error
    weights: Weights = mx.load(str(folder / "adapters.safetensors"))
    mx.eval(weights)
    keys = tuple(sorted({name[: -len(PARTS[0])] for name in weights if name.endswith(PARTS)}))
    if not keys:
        raise AdapterRejected(
            "; ".join([*problems, "adapters.safetensors holds no LoRA matrices (NAME.lora_a, NAME.lora_b)"])
        )
    shape = LoraShape(config.rank, config.scale * config.rank, 0.0, keys)
    hot = read_hot(folder / "hot_vocab.npy") if (folder / "hot_vocab.npy").exists() else None
    if hot is not None and not isinstance(engine.draft, HeadDraft):
        problems.append("it has a hot vocabulary; the draft has none")
    problems += run_all(adapter_problems(engine, shape, weights, hot))
    if problems:
        raise AdapterRejected("; ".join(problems))
    return ExternalAdapter(
        LoadedAdapter("candidate", shape, weights, hot.astype(np.int64) if hot is not None else None), manifest
    )


def _file_problems(folder: Path) -> list[str]:
    present = {
        name: (folder / name).lstat() for name in FILES if (folder / name).is_symlink() or (folder / name).exists()
    }
    problems = [f"{name} is missing" for name in FOREIGN if name not in present]
    problems += [f"{name} is not a regular file" for name, info in present.items() if not stat.S_ISREG(info.st_mode)]
    problems += [f"{name} has {info.st_size} bytes" for name, info in present.items() if info.st_size > MAX_FILE]
    if not problems and (problem := header_problem(folder / "adapters.safetensors")):
        problems.append(problem)
    return problems


def _manifest(folder: Path) -> Manifest | None:
    try:
        with open(folder / "manifest.json", "rb") as file:
            return parse_manifest(file.read(MAX_MANIFEST + 1))
    except FileNotFoundError:
        return None


def _claims(folder: Path, manifest: Manifest, engine: EngineCore) -> list[str]:
    """What a manifest says that is not so here."""
    found = []
    if manifest.base_fingerprint != engine.draft_fingerprint:
        found.append(f"it was trained on draft {manifest.base_fingerprint}, this one is {engine.draft_fingerprint}")
    if manifest.tokenizer_fingerprint != engine.target.tokenizer_fingerprint:
        found.append("its tokenizer is another one")
    for name, told in manifest.files.items():
        path = folder / name
        if name in FILES and (not path.exists() or sha256_of(path) != told):
            found.append(f"{name} is not the file that its manifest names (sha256)")
    return found
