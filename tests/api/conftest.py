"""A tiny random Llama as a folder on disk, with a tokenizer and a chat template: what `Engine.load`
takes by name.
"""

import json

import pytest
from mlx.utils import tree_flatten

from tests.conftest import tiny_model
from tests.fakes import END, write_tokenizer


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    import mlx.core as mx

    folder = tmp_path_factory.mktemp("tiny-llama")
    made = tiny_model(vocabulary=END + 1)
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(made.config | {"eos_token_id": END}))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(made.model.parameters())))
    return folder
