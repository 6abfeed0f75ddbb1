"""The `layers` draft: some of the target's own layers between its embedding and its head, as an ordinary model folder.

What mlx-lm calls a draft model: it loads with `--draft-model` there and by `models.draft.name` here. Only its layers and the
last norm are its own; embedding and head are the target's tensors as they stand in its files, quantised where they are, so
they are the same bit for bit and never trained. What it does not know: training, prompts, acceptance.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from specl.shared.errors import ConfigError, ModelError
from specl.shared.models.load import LanguageModel, dense_fp32
from specl.shared.runtime.atomic_files import atomic_dir

SHARED = ("model.embed_tokens", "lm_head")
BESIDE = ("*.json", "tokenizer.model", "*.tiktoken", "*.txt", "*.jinja")  # what comes with the tokenizer
_NOT_BESIDE = ("config.json", "manifest.json", "model.safetensors.index.json")


def pick_layers(wish: str, total: int) -> tuple[int, ...]:
    """`5`: the first three and the last two of `total` layers (one more in front); `0,1,2,28,29`: those. Raises ConfigError.

    Both ends, because the first layers build words up and the last ones shape the state that the head reads.
    """
    try:
        numbers = [int(part) for part in wish.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers:
        raise ConfigError(f"--layers is a number, or layers separated by commas, not {wish!r}")
    if "," not in wish:
        count = numbers[0]
        if not 1 <= count < total:
            raise ConfigError(
                f"--layers {count}: the target has {total} layers, so a draft has 1 to {total - 1} of them"
            )
        front = (count + 1) // 2
        return (*range(front), *range(total - (count - front), total))
    if numbers != sorted(set(numbers)) or numbers[0] < 0 or numbers[-1] >= total or len(numbers) >= total:
        raise ConfigError(f"--layers {wish}: name some of 0 to {total - 1}, each once, in order")
    return tuple(numbers)


def new_layers(target: LanguageModel, layers: Sequence[int], name: str = "new") -> LanguageModel:
    """Those layers of `target` in fp32, to be trained: embedding and head are frozen. No weight of `target` is touched."""
    model, _ = load_model(target.path, lazy=True)
    model = dense_fp32(model)
    own = model.model.layers
    model.model.layers = [own[i] for i in layers]
    model.args.num_hidden_layers = len(layers)
    mx.eval(model.parameters())  # of what is left: the other layers are never computed
    model.freeze()
    for module in (*model.model.layers, model.model.norm):
        module.unfreeze()
    config = layers_config(target.config, layers)
    return LanguageModel(name, target.path, model, target.tokenizer, config, "", target.tokenizer_fingerprint)


def layers_config(config: dict[str, Any], layers: Sequence[int]) -> dict[str, Any]:
    """The target's config for some of its layers: settings that are a list by layer are cut alike."""
    total = int(config["num_hidden_layers"])
    cut = {
        key: [value[i] for i in layers] if isinstance(value, list) and len(value) == total else value
        for key, value in config.items()
        if key not in ("quantization", "quantization_config")
    }
    return cut | {"num_hidden_layers": len(layers)}


def save_layers(
    draft: LanguageModel,
    target: LanguageModel,
    folder: Path,
    manifest: dict[str, Any],
    beside: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write the model folder whole: own weights in bf16, the target's embedding and head as they are. `beside` adds files."""
    weights = {name: value.astype(mx.bfloat16) for name, value in tree_flatten(draft.model.trainable_parameters())}
    shared, quantization = shared_tensors(target)
    config = draft.config | ({"quantization": quantization} if quantization else {})
    with atomic_dir(folder, sync=True) as scratch:
        mx.save_safetensors(str(scratch / "model.safetensors"), weights | shared, metadata={"format": "mlx"})
        (scratch / "config.json").write_text(json.dumps(config, indent=2))
        (scratch / "manifest.json").write_text(json.dumps(manifest, indent=2))
        for path in {path for pattern in BESIDE for path in target.path.glob(pattern)}:
            if path.name not in _NOT_BESIDE:
                shutil.copyfile(path, scratch / path.name)
        beside(scratch)


def shared_tensors(target: LanguageModel) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """Embedding and head as the target's files hold them, and how they are quantised (empty where they are not).

    Raises ModelError where the files name them otherwise than mlx-lm does.
    """
    names = SHARED[:1] if target.config.get("tie_word_embeddings") else SHARED
    found: dict[str, mx.array] = {}
    for path in sorted(target.path.glob("model*.safetensors")):
        tensors = mx.load(str(path))
        found |= {name: tensors[name] for name in tensors if name.rpartition(".")[0] in names}
    if missing := [name for name in names if f"{name}.weight" not in found]:
        raise ModelError(f"the weights of {target.name} have no {missing[0]}, so no `layers` draft can share it")
    whole_model = target.config.get("quantization") or {}
    usual = {key: whole_model[key] for key in ("group_size", "bits", "mode") if key in whole_model}
    own = {name: usual | (whole_model.get(name) or {}) for name in names if f"{name}.scales" in found}
    return found, (usual | own if own else {})
