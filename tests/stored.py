"""A target on disk: a random Llama of four layers with a tokenizer, plain or quantised as the built-in model is."""

import json

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import llama

from specl.shared.models.load import load
from tests.fakes import write_tokenizer

SHAPE = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 320, "rope_theta": 10000.0,
    "max_position_embeddings": 4096, "eos_token_id": 298,
}  # fmt: skip


def write_target(folder, tied, quantised):
    mx.random.seed(3)
    shape = SHAPE | {"tie_word_embeddings": tied}
    model = llama.Model(llama.ModelArgs.from_dict(shape))
    model.model.embed_tokens.weight = model.model.embed_tokens.weight * 3  # laws that are not flat
    if quantised:
        own = {"model.embed_tokens": {"group_size": 32, "bits": 8}}
        nn.quantize(model, 32, 4, class_predicate=lambda name, m: own.get(name, hasattr(m, "to_quantized")))
        shape["quantization"] = {"group_size": 32, "bits": 4, **own}
    folder.mkdir()
    mx.save_safetensors(
        str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), metadata={"format": "mlx"}
    )
    (folder / "config.json").write_text(json.dumps(shape))
    write_tokenizer(folder)
    return load(folder.name, folder.parent, path=folder)
