"""An adapter's tensors: written to its directory, read from it, and checked against the draft that
they are for.

registry.py checks the files; this module checks names, shapes and values and reports every problem
at once. An adapter that changes nothing is refused, because it was never trained.
"""

import json
import math
from pathlib import Path
from tokenize import TokenError
from typing import Annotated, Literal

import mlx.core as mx
import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from specl.shared.adapters.manifest import Manifest, reasons
from specl.shared.adapters.registry import MAX_MANIFEST, Adapters
from specl.shared.engine.core import EngineCore, LoadedAdapter
from specl.shared.errors import AdapterRejected
from specl.shared.models.head import HeadDraft, hot_vocabulary_problems
from specl.shared.models.lora import LoraShape, Weights, change_norm_steps, check_steps
from specl.shared.models.tensors import read_tensors
from specl.shared.runtime.incremental import Steps, run_all


def write_tensors(folder: Path, shape: LoraShape, weights: Weights, hot: np.ndarray | None) -> None:
    """adapters.safetensors and adapter_config.json as mlx-lm writes them (scale = alpha / rank),
    hot_vocab.npy. Raises OSError.
    """
    try:
        mx.save_safetensors(str(folder / "adapters.safetensors"), dict(weights), metadata={"format": "mlx"})
    except RuntimeError as error:  # what mlx says of a full disk
        raise OSError(f"the adapter could not be written to {folder}: {error}") from error
    config = {
        "fine_tune_type": "lora",
        "num_layers": -1,
        "lora_parameters": {
            "rank": shape.rank,
            "scale": shape.scale,
            "dropout": shape.dropout,
            "keys": list(shape.keys),
        },
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    if hot is not None:
        np.save(folder / "hot_vocab.npy", hot.astype(np.uint32))


def _distinct(keys: list[str]) -> list[str]:
    if len(set(keys)) != len(keys):
        raise ValueError("a layer is named twice")
    return keys


class _LoraParameters(BaseModel):
    """The fields of mlx-lm's `lora_parameters` that are read."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    rank: Annotated[int, Field(ge=1)]
    scale: float
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    keys: Annotated[list[str], Field(min_length=1), AfterValidator(_distinct)]


class _AdapterConfig(BaseModel):
    """What is read of an adapter_config.json; mlx-lm writes its training arguments beside it."""

    model_config = ConfigDict(strict=True)

    fine_tune_type: Literal["lora"]
    lora_parameters: _LoraParameters


def read_config(folder: Path) -> bytes:
    """An adapter_config.json of at most MAX_MANIFEST bytes. Raises OSError, AdapterRejected."""
    with open(folder / "adapter_config.json", "rb") as file:
        data = file.read(MAX_MANIFEST + 1)
    if len(data) > MAX_MANIFEST:
        raise AdapterRejected(f"adapter {folder.name}: adapter_config.json has more than {MAX_MANIFEST} bytes")
    return data


def read_shape(folder: Path) -> LoraShape:
    """The LoRA of an adapter_config.json. Raises AdapterRejected with every field that is wrong."""
    try:
        lora = _AdapterConfig.model_validate_json(read_config(folder)).lora_parameters
    except OSError as error:
        raise AdapterRejected(f"adapter {folder.name}: adapter_config.json cannot be read: {error}") from error
    except ValidationError as error:
        raise AdapterRejected(f"adapter {folder.name}: adapter_config.json cannot be used: {reasons(error)}") from error
    return LoraShape(lora.rank, lora.scale * lora.rank, lora.dropout, tuple(lora.keys))


def load_adapter(adapters: Adapters, path: str | Path, engine: EngineCore) -> tuple[LoadedAdapter, Manifest]:
    """`load_adapter_steps`, all at once."""
    return run_all(load_adapter_steps(adapters, path, engine))


def load_adapter_steps(
    adapters: Adapters, path: str | Path, engine: EngineCore
) -> Steps[tuple[LoadedAdapter, Manifest]]:
    """Verify an adapter completely for this engine's draft and read it. Raises AdapterRejected with
    every reason.
    """
    if engine.draft is None:
        raise AdapterRejected("there is no draft model to adapt")
    manifest = adapters.verify(path, engine.draft_fingerprint, engine.target.tokenizer_fingerprint)
    yield
    folder = adapters.folder / manifest.id
    shape = read_shape(folder)
    try:
        weights = read_tensors(folder / "adapters.safetensors")
        mx.eval(weights)  # reading is lazy: once evaluated, nothing that happens to the file later matters
    except (OSError, ValueError, RuntimeError) as error:
        raise AdapterRejected(f"adapter {manifest.id}: its weights cannot be read: {error}") from error
    hot = read_hot_vocabulary(folder / "hot_vocab.npy") if "hot_vocab.npy" in manifest.files else None
    yield
    if problems := (yield from check_adapter_steps(engine, shape, weights, hot)):
        raise AdapterRejected(f"adapter {manifest.id}: " + "; ".join(problems))
    return LoadedAdapter(manifest.id, shape, weights, hot.astype(np.int64) if hot is not None else None), manifest


def check_adapter_steps(
    engine: EngineCore, shape: LoraShape, weights: Weights, hot: np.ndarray | None
) -> Steps[list[str]]:
    """Everything that keeps these tensors from being an adapter for the engine's draft. Empty means
    usable.
    """
    draft, module = engine.draft, engine.draft_module
    if draft is None or module is None:
        return ["there is no draft model to adapt"]
    problems = yield from check_steps(module, shape, weights)
    if not problems:
        norm = yield from change_norm_steps(shape, weights)
        problems = ["it changes nothing: every weight change is zero"] if norm == 0 else []
        problems += [] if math.isfinite(norm) else ["its weight changes overflow together"]
    if hot is not None and isinstance(draft, HeadDraft):
        problems += hot_vocabulary_problems(hot, draft.shape.hot_size, draft.target.vocabulary_size)
    return problems


def read_hot_vocabulary(path: Path) -> np.ndarray:
    """The one array of a .npy file. Raises AdapterRejected where it is anything else."""
    where = f"adapter {path.parent.name}: {path.name}"
    try:
        # mapped, so that a header that claims more than the file holds fails before memory is
        # allocated
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, TypeError, EOFError, OverflowError, RecursionError, SyntaxError, TokenError) as error:
        raise AdapterRejected(f"{where} cannot be read: {error}") from error
    if not isinstance(mapped, np.ndarray):
        raise AdapterRejected(f"{where} is an archive, not one array")
    return np.array(mapped)
