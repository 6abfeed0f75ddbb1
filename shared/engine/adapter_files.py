"""An adapter directory's files to and from tensors: what `adapters.py` verifies as files is here verified as an adapter.

Names, shapes and values are checked all at once against the draft it is for; a zero adapter is refused, because it is one
that was never trained.
"""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np

from specl.shared.adapters import Adapters, Manifest
from specl.shared.engine.engine import Engine, LoadedAdapter
from specl.shared.errors import AdapterRejected
from specl.shared.models.head import HeadDraft
from specl.shared.models.lora import LoraShape, Weights, change_norm, problems


def write_files(folder: Path, shape: LoraShape, weights: Weights, hot: np.ndarray | None) -> None:
    """adapters.safetensors and adapter_config.json as mlx-lm writes them (scale = alpha / rank), hot_vocab.npy."""
    mx.save_safetensors(str(folder / "adapters.safetensors"), dict(weights), metadata={"format": "mlx"})
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


def read_shape(folder: Path) -> LoraShape:
    """The LoRA of an adapter_config.json. Raises AdapterRejected."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        lora = config["lora_parameters"]
        rank = int(lora["rank"])
        if config["fine_tune_type"] != "lora" or rank < 1:
            raise AdapterRejected(f"adapter {folder.name}: only LoRA adapters are supported")
        return LoraShape(rank, float(lora["scale"]) * rank, float(lora.get("dropout", 0.0)), tuple(lora["keys"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterRejected(f"adapter {folder.name}: adapter_config.json cannot be used: {error!r}") from error


def load_adapter(adapters: Adapters, path: str | Path, engine: Engine) -> tuple[LoadedAdapter, Manifest]:
    """Verify everything about an adapter for this engine's draft and read it. Raises AdapterRejected with the reasons."""
    draft = engine.draft
    if draft is None:
        raise AdapterRejected("there is no draft model to adapt")
    manifest = adapters.verify(path, engine.draft_fingerprint, engine.target.tokenizer_fingerprint)
    folder = adapters.folder / manifest.id
    shape = read_shape(folder)
    try:
        weights: Weights = mx.load(str(folder / "adapters.safetensors"))
        mx.eval(weights)  # mx.load is lazy: evaluated now, nothing that happens to the file later matters
        hot = np.load(folder / "hot_vocab.npy", allow_pickle=False) if (folder / "hot_vocab.npy").exists() else None
    except (OSError, ValueError, RuntimeError) as error:
        raise AdapterRejected(f"adapter {manifest.id}: it cannot be read: {error}") from error
    found = problems(engine.draft_module, shape, weights)
    if not found and change_norm(shape, weights) == 0:
        found = ["it changes nothing: every weight change is zero"]
    if hot is not None and isinstance(draft, HeadDraft) and not _hot_fits(hot, draft):
        found.append("its hot vocabulary does not fit the draft")
    if found:
        raise AdapterRejected(f"adapter {manifest.id}: " + "; ".join(found))
    return LoadedAdapter(manifest.id, shape, weights, hot.astype(np.int64) if hot is not None else None), manifest


def _hot_fits(hot: np.ndarray, draft: HeadDraft) -> bool:
    vocabulary = int(draft.target.config["vocab_size"])
    right_kind = hot.ndim == 1 and np.issubdtype(hot.dtype, np.integer)
    return right_kind and len(np.unique(hot)) == draft.shape.hot_size and int(hot.max(initial=0)) < vocabulary
