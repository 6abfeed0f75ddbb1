"""A damaged model folder is one sentence, whatever the architecture's code makes of it."""

import json

import mlx.core as mx
import pytest

from specl.shared.errors import ModelError
from specl.shared.models.load import load

WRONG = {"model_type": "llama", "hidden_size": "a", "num_hidden_layers": 1, "intermediate_size": 4,
         "num_attention_heads": 1, "rms_norm_eps": 1e-5, "vocab_size": 10}  # fmt: skip


@pytest.mark.parametrize("damaged", [{"model_type": "llama"}, WRONG, [], None, {"model_type": ["llama"]}])
def test_wrong_config_is_a_one_line_model_error(tmp_path, damaged):
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {"x": mx.zeros((2,))})
    (tmp_path / "config.json").write_text(json.dumps(damaged))
    with pytest.raises(ModelError, match=r"^the model \S+ cannot be loaded: \S.*$") as caught:
        load(str(tmp_path), tmp_path)
    assert "\n" not in str(caught.value)


def test_an_error_without_words_is_named(tmp_path, monkeypatch):
    def fails(*arguments, **named):
        raise ValueError

    monkeypatch.setattr("specl.shared.models.load.load_model", fails)
    with pytest.raises(ModelError, match="cannot be loaded: ValueError$"):
        load("x", tmp_path, path=tmp_path)
