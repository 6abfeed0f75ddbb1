"""A damaged model folder is one sentence, whatever the architecture's code makes of it; no token is beyond its embedding."""

import json

import mlx.core as mx
import pytest

from specl.shared.engine.core import EngineCore
from specl.shared.engine.request_options import RequestOptions
from specl.shared.errors import ModelError, RequestRejected
from specl.shared.models.load import load
from tests.fakes import END, write_tokenizer

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


# ---------------------------------------------------------------------------------------------------- tokens
def write_model(folder, rows, added=("<|extra|>",), change=None):
    """A random Llama of `rows` embeddings with a tokenizer of 299 tokens and the `added` ones."""
    from mlx.utils import tree_flatten
    from mlx_lm.models.llama import Model, ModelArgs

    folder.mkdir(exist_ok=True)
    config = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32, "num_attention_heads": 2,
              "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "vocab_size": rows, "tie_word_embeddings": True}  # fmt: skip
    mx.random.seed(1)
    weights = dict(tree_flatten(Model(ModelArgs.from_dict(config)).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    for index, text in enumerate(added):
        tokenizer["added_tokens"].append(dict(tokenizer["added_tokens"][0], id=END + 1 + index, content=text))
    if change is not None:
        change(tokenizer)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.mark.parametrize("in_vocabulary", [False, True])
def test_tokens_beyond_the_embedding_stay_text(tmp_path, in_vocabulary):
    def change(tokenizer):
        if in_vocabulary:
            tokenizer["model"]["vocab"] |= {"<|extra|>": END + 1}

    folder = write_model(tmp_path / "m", END + 1, change=change)
    whole = load(str(write_model(tmp_path / "whole", END + 2, change=change)), tmp_path)
    model = load(str(folder), tmp_path)
    engine = EngineCore(model, None)
    ids = engine.encode("a<|extra|>b<|end|>")
    assert max(ids) == END and model.tokenizer.decode(ids) == "a<|extra|>b<|end|>"
    assert max(engine.encode_chat([{"role": "user", "content": "<|extra|>"}])[1]) <= END
    assert max(EngineCore(whole, None).encode("<|extra|>")) == END + 1
    assert model.tokenizer_fingerprint == whole.tokenizer_fingerprint


def test_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    with pytest.raises(ModelError, match="its tokenizer has .* tokens that its embedding of 200 rows does not hold"):
        load(str(write_model(tmp_path / "m", 200)), tmp_path)


@pytest.mark.parametrize("token", [-1, END + 1, 10**9])
def test_prompt_beyond_the_embedding_is_rejected(tmp_path, token):
    engine = EngineCore(load(str(write_model(tmp_path / "m", END + 1)), tmp_path), None)
    with pytest.raises(RequestRejected, match="a token that is not below"):
        engine.session([1, token, 2], RequestOptions(max_tokens=1))
