"""The layers draft: the target's own layers, an ordinary model folder, the target's embedding bit for bit."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from specl.shared.errors import ConfigError
from specl.shared.loading.engine import load_draft, resolve_draft
from specl.shared.models.layers import layers_config, new_layers, pick_layers, save_layers
from specl.shared.models.load import check_pair, load
from specl.shared.models.lora import LoraShape, choose_layers, linear_layers
from tests.lora import fuse
from tests.stored import write_target


@pytest.fixture(scope="module", params=["plain", "untied", "quantised"])
def target(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("layers") / "target"
    return write_target(folder, tied=request.param != "untied", quantised=request.param == "quantised")


def same_bits(one, other):
    return np.array_equal(np.array(one.view(mx.uint8)), np.array(other.view(mx.uint8)))


@pytest.mark.parametrize(
    ("choice", "layers"),
    [
        ("5", (0, 1, 2, 28, 29)),
        ("1", (0,)),
        ("2", (0, 29)),
        ("4", (0, 1, 28, 29)),
        ("0, 7,29", (0, 7, 29)),
        ("3,", (3,)),
    ],
)
def test_layers_are_picked_from_both_ends(choice, layers):
    assert pick_layers(choice, 30) == layers


@pytest.mark.parametrize("choice", ["0", "30", "-1", "some", "", "1,1", "2,1", "0,30", "-1,2"])
def test_missing_layers_are_refused_in_one_sentence(choice):
    with pytest.raises(ConfigError, match="--layers"):
        pick_layers(choice, 30)


def test_layer_settings_are_cut_with_the_layers():
    config = {"num_hidden_layers": 3, "layer_types": ["a", "b", "c"], "eos_token_id": [1, 2], "quantization": {}}
    assert layers_config(config, (0, 2)) == {"num_hidden_layers": 2, "layer_types": ["a", "c"], "eos_token_id": [1, 2]}


def test_untrained_draft_computes_the_targets_layers(target):
    ids = mx.array([[5, 17, 40, 8, 22, 31]])
    inner = new_layers(target, (0, 2)).model.model
    x = target.model.model.embed_tokens(ids)
    for i in (0, 2):
        x = target.model.model.layers[i](x, "causal", None)
    assert mx.allclose(inner(ids), target.model.model.norm(x), atol=1e-4).item()


def test_only_layers_and_the_last_norm_are_trained(target):
    names = {name for name, _ in tree_flatten(new_layers(target, (0, 3)).model.trainable_parameters())}
    assert "model.norm.weight" in names and "model.layers.1.mlp.up_proj.weight" in names
    assert not any("embed_tokens" in name or "lm_head" in name for name in names)


def test_saved_draft_is_an_ordinary_model(target, tmp_path):
    made = new_layers(target, (0, 1, 3))
    save_layers(made, target, tmp_path / "drafts" / "small", {"kind": "layers"})
    folder = tmp_path / "drafts" / "small"
    theirs, ours = (dict(mx.load(str(path / "model.safetensors"))) for path in (target.path, folder))
    shared = [name for name in theirs if "embed_tokens" in name or "lm_head" in name]
    assert shared and all(same_bits(theirs[name], ours[name]) for name in shared)
    read = load_draft("small", target, tmp_path, "fp32", lambda text: None)  # by its name alone
    check_pair(target, read)
    assert resolve_draft("small", tmp_path, lambda text: None) == folder
    ids = mx.array([[5, 17, 40, 8]])
    assert mx.allclose(read.model(ids), made.model(ids), rtol=5e-2, atol=0.15).item()  # bf16 on disk
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 3


def test_mlx_lm_drafts_with_it(target, tmp_path):
    from mlx_lm import load as theirs
    from mlx_lm import stream_generate

    save_layers(new_layers(target, (0, 3)), target, tmp_path / "draft", {})
    model, tokenizer = theirs(str(target.path))
    draft, _ = theirs(str(tmp_path / "draft"))
    plain = [item.token for item in stream_generate(model, tokenizer, [5, 17, 40], max_tokens=12)]
    drafted = [item.token for item in stream_generate(model, tokenizer, [5, 17, 40], max_tokens=12, draft_model=draft)]
    assert drafted == plain


def test_lora_adapts_it(target, tmp_path):
    save_layers(new_layers(target, (0, 3)), target, tmp_path / "draft", {})
    draft = load("draft", tmp_path, "fp32", path=tmp_path / "draft")
    keys = choose_layers(draft.model, ["q_proj", "v_proj"])
    assert len(keys) == 4
    layers = linear_layers(draft.model)
    rng = mx.random.key(0)
    weights = {}
    for key in keys:
        out, inner = layers[key].weight.shape
        weights |= {f"{key}.lora_a": mx.random.normal((inner, 2), key=rng), f"{key}.lora_b": mx.ones((2, out)) * 0.1}
    ids = mx.array([[5, 17, 40, 8]])
    before = draft.model(ids)
    assert fuse(draft.model, LoraShape(2, 4.0, 0.0, keys), weights) == "fused"
    assert not mx.allclose(before, draft.model(ids), atol=1e-3).item()
