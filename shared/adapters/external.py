"""Reads an external adapter strictly: one that another SpecLoRA or mlx-lm's LoRA trainer wrote.

mlx-lm names layers within a block or not at all, so the layers are taken from the tensors' names. A
manifest is optional; where there is one, its base, tokenizer and file hashes must be right. Does
not judge quality: the trainer's judge does.
"""

import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import mlx.core as mx
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from specl.shared.adapters.manifest import Manifest, header_problem, parse_manifest, reasons
from specl.shared.adapters.registry import EXTERNAL_FILES, FILES, MAX_FILE, MAX_MANIFEST, sha256_of
from specl.shared.adapters.tensors import check_adapter_steps, read_config, read_hot_vocabulary
from specl.shared.engine.core import EngineCore, LoadedAdapter
from specl.shared.errors import AdapterRejected
from specl.shared.models.head import HeadDraft
from specl.shared.models.lora import LoraShape
from specl.shared.models.tensors import read_tensors
from specl.shared.runtime.incremental import run_all

SUFFIXES = (".lora_a", ".lora_b")


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
    """An external adapter that fits the draft, and its manifest where it has one."""

    adapter: LoadedAdapter
    manifest: Manifest | None


def read_external(folder: Path, engine: EngineCore) -> ExternalAdapter:
    """Read and check a directory completely. Raises AdapterRejected with every reason found."""
    if problems := _file_problems(folder):
        raise AdapterRejected("; ".join(problems))
    manifest = _manifest(folder)
    problems = _manifest_problems(folder, manifest, engine) if manifest is not None else []
    try:
        config = _Config.model_validate_json(read_config(folder)).lora_parameters
    except ValidationError as error:
        raise AdapterRejected(f"adapter_config.json cannot be used: {reasons(error)}") from error
    weights = read_tensors(folder / "adapters.safetensors")
    mx.eval(weights)
    keys = tuple(sorted({name[: -len(SUFFIXES[0])] for name in weights if name.endswith(SUFFIXES)}))
    if not keys:
        raise AdapterRejected(
            "; ".join([*problems, "adapters.safetensors holds no LoRA matrices (NAME.lora_a, NAME.lora_b)"])
        )
    shape = LoraShape(config.rank, config.scale * config.rank, 0.0, keys)
    hot = read_hot_vocabulary(folder / "hot_vocab.npy") if (folder / "hot_vocab.npy").exists() else None
    if hot is not None and not isinstance(engine.draft, HeadDraft):
        problems.append("it has a hot vocabulary; the draft has none")
    problems += run_all(check_adapter_steps(engine, shape, weights, hot))
    if problems:
        raise AdapterRejected("; ".join(problems))
    return ExternalAdapter(
        LoadedAdapter("candidate", shape, weights, hot.astype(np.int64) if hot is not None else None), manifest
    )


def _file_problems(folder: Path) -> list[str]:
    present = {
        name: (folder / name).lstat() for name in FILES if (folder / name).is_symlink() or (folder / name).exists()
    }
    problems = [f"{name} is missing" for name in EXTERNAL_FILES if name not in present]
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


def _manifest_problems(folder: Path, manifest: Manifest, engine: EngineCore) -> list[str]:
    """Statements of a manifest that are not true of its files or of this engine's models."""
    problems = []
    if manifest.base_fingerprint != engine.draft_fingerprint:
        problems.append(f"it was trained on draft {manifest.base_fingerprint}, this one is {engine.draft_fingerprint}")
    if manifest.tokenizer_fingerprint != engine.target.tokenizer_fingerprint:
        problems.append("its tokenizer is another one")
    for name, sha256 in manifest.files.items():
        path = folder / name
        if name in FILES and (not path.exists() or sha256_of(path) != sha256):
            problems.append(f"{name} is not the file that its manifest names (sha256)")
    return problems
