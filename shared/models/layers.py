"""The `layers` draft: some of the target's own layers between its embedding and its head, as an
ordinary model folder.

mlx-lm loads it with `--draft-model`, this program by `models.draft.name`. Only the layers and the
last norm are trained; embedding and head are the target's tensors as its files hold them, quantised
where they are, so they stay the same bit for bit. Does not know training, prompts, acceptance.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.utils import load_model

from specl.shared.errors import ConfigError, ModelError
from specl.shared.models.language_model import LanguageModel
from specl.shared.models.load import to_dense_fp32
from specl.shared.models.tensors import Tensors, flat_parameters, read_tensors
from specl.shared.runtime.atomic_files import atomic_dir

SHARED_MODULES = ("model.embed_tokens", "lm_head")
TOKENIZER_FILES = ("*.json", "tokenizer.model", "*.tiktoken", "*.txt", "*.jinja")
_NOT_TOKENIZER_FILES = ("config.json", "manifest.json", "model.safetensors.index.json")


def pick_layers(choice: str, total: int) -> tuple[int, ...]:
    """The layers that `--layers` selects of `total`. `5` is the first three and the last two (one
    more in front), `0,1,2,28,29` is those. Raises ConfigError.

    Both ends are taken, because the first layers build words up and the last ones shape the state
    that the head reads.
    """
    try:
        numbers = [int(part) for part in choice.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers:
        raise ConfigError(f"--layers is a number, or layers separated by commas, not {choice!r}")
    if "," not in choice:
        count = numbers[0]
        if not 1 <= count < total:
            raise ConfigError(
                f"--layers {count}: the target has {total} layers, so a draft has 1 to {total - 1} of them"
            )
        front = (count + 1) // 2
        return (*range(front), *range(total - (count - front), total))
    if numbers != sorted(set(numbers)) or numbers[0] < 0 or numbers[-1] >= total or len(numbers) >= total:
        raise ConfigError(f"--layers {choice}: name some of 0 to {total - 1}, each once, in order")
    return tuple(numbers)


def new_layers(target: LanguageModel, layers: Sequence[int], name: str = "new") -> LanguageModel:
    """A draft of those layers of `target` in fp32, to be trained; its embedding and head are
    frozen. `target` is not touched.
    """
    model, _ = load_model(target.path, lazy=True)
    model = to_dense_fp32(model)
    all_layers = model.model.layers
    model.model.layers = [all_layers[i] for i in layers]
    model.args.num_hidden_layers = len(layers)
    mx.eval(model.parameters())  # only what is left: the other layers are never computed
    model.freeze()
    for module in (*model.model.layers, model.model.norm):
        module.unfreeze()
    config = layers_config(target.config, layers)
    return LanguageModel(name, target.path, model, target.tokenizer, config, "", target.tokenizer_fingerprint)


def layers_config(config: dict[str, Any], layers: Sequence[int]) -> dict[str, Any]:
    """The target's config for some of its layers. Settings that have an entry for each layer keep
    those of `layers`.
    """
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
    add_files: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write the model folder, which appears by rename: trained weights in bf16, the target's
    embedding and head as they are.

    `add_files` may write more files into the folder before the rename.
    """
    trained = flat_parameters(draft.model.trainable_parameters())
    weights = {name: value.astype(mx.bfloat16) for name, value in trained.items()}
    shared, quantization = shared_tensors(target)
    config = draft.config | ({"quantization": quantization} if quantization else {})
    with atomic_dir(folder, sync=True) as scratch:
        mx.save_safetensors(str(scratch / "model.safetensors"), weights | shared, metadata={"format": "mlx"})
        (scratch / "config.json").write_text(json.dumps(config, indent=2))
        (scratch / "manifest.json").write_text(json.dumps(manifest, indent=2))
        for path in {path for pattern in TOKENIZER_FILES for path in target.path.glob(pattern)}:
            if path.name not in _NOT_TOKENIZER_FILES:
                shutil.copyfile(path, scratch / path.name)
        add_files(scratch)


def shared_tensors(target: LanguageModel) -> tuple[Tensors, dict[str, Any]]:
    """Embedding and head as the target's files hold them, and the `quantization` of their config
    (empty where they are dense).

    Raises ModelError where the files name them otherwise than mlx-lm does.
    """
    modules = SHARED_MODULES[:1] if target.config.get("tie_word_embeddings") else SHARED_MODULES
    shared: Tensors = {}
    for path in sorted(target.path.glob("model*.safetensors")):
        tensors = read_tensors(path)
        shared |= {name: tensors[name] for name in tensors if name.rpartition(".")[0] in modules}
    if missing := [name for name in modules if f"{name}.weight" not in shared]:
        raise ModelError(f"the weights of {target.name} have no {missing[0]}, so no `layers` draft can share it")
    quantised = [name for name in modules if f"{name}.scales" in shared]
    return shared, _quantization(target.config.get("quantization") or {}, quantised)


def _quantization(config: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    """`modules`' part of a config's `quantization`: the defaults of the model, and each module's
    exceptions.
    """
    if not modules:
        return {}
    defaults = {key: config[key] for key in ("group_size", "bits", "mode") if key in config}
    return defaults | {name: defaults | (config.get(name) or {}) for name in modules}
