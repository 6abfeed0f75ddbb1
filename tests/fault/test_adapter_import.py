"""`adapters import`: what does not fit is refused with its reason, what does is judged, and the verdict is stored."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from specl.shared.adapters.external import read_external
from specl.shared.adapters.registry import Adapters
from specl.shared.errors import AdapterRejected
from specl.shared.settings.schema import Settings
from tests.harness.fake_models import fake_engine, fake_model, make_adapter, publish_adapter
from tests.harness.instance import SETTINGS
from tests.harness.waiting import wait_until


@pytest.fixture(scope="module")
def engine():
    return fake_engine(Settings(), None)


def rewrite(folder, name, **changes):
    document = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(document | changes))


def from_mlx_lm(folder):
    """A directory as mlx-lm's LoRA trainer leaves it: layers named within a block, or not at all; a checkpoint beside it."""
    folder.mkdir()
    model = fake_model("draft", 2).model
    model.freeze()
    parameters = {"rank": 4, "dropout": 0.0, "scale": 2.0}
    linear_to_lora_layers(model, 1, parameters)
    weights = {name: 0.05 * mx.random.normal(w.shape) for name, w in tree_flatten(model.trainable_parameters())}
    for name in ("adapters.safetensors", "0000100_adapters.safetensors"):
        mx.save_safetensors(str(folder / name), weights)
    settings = {"model": "a/draft", "fine_tune_type": "lora", "num_layers": 1, "lora_parameters": parameters, "seed": 0}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return weights


def test_our_and_mlx_lm_adapters_are_read(tmp_path, engine):
    ours = publish_adapter(tmp_path, "000001")
    found = read_external(ours, engine)
    assert found.manifest.id == "000001" and found.adapter.shape.scale == 2.0
    weights = from_mlx_lm(tmp_path / "theirs")
    found = read_external(tmp_path / "theirs", engine)
    assert found.manifest is None and found.adapter.weights.keys() == weights.keys()
    assert len(found.adapter.shape.keys) == 7 and found.adapter.shape.rank == 4


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda f: rewrite(f, "manifest.json", base_fingerprint="other"), "trained on draft other"),
        (lambda f: rewrite(f, "manifest.json", tokenizer_fingerprint="other"), "tokenizer"),
        (lambda f: rewrite(f, "manifest.json", rank="four"), "manifest is malformed"),
        (lambda f: rewrite(f, "adapter_config.json", fine_tune_type="dora"), "fine_tune_type"),
        (lambda f: rewrite(f, "adapter_config.json", lora_parameters={"rank": 4}), "scale"),
        (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json is missing"),
        (lambda f: (f / "adapters.safetensors").write_bytes(b"x" * 40), "safetensors"),
        (lambda f: mx.save_safetensors(str(f / "adapters.safetensors"), {"w": mx.ones(3)}), "no LoRA matrices"),
        (lambda f: (f / "hot_vocab.npy").write_bytes(b"x"), "hot_vocab.npy cannot be read"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, engine, spoil, reason):
    folder = publish_adapter(tmp_path, "000001")
    spoil(folder)
    with pytest.raises(AdapterRejected, match=reason):
        read_external(folder, engine)


@pytest.mark.parametrize(
    ("how", "reason"), [({"nan": True}, "not finite"), ({"cut": 1}, "has shape"), ({"scale": 0.0}, "changes nothing")]
)
def test_tensors_that_cannot_be_used_are_named(tmp_path, engine, how, reason):
    with pytest.raises(AdapterRejected, match=reason):
        read_external(publish_adapter(tmp_path, "000001", **how), engine)


def control(instance, *arguments, command="import"):
    command = [str(Path(sys.executable).parent / "specl-ctl"), "adapters", command, *arguments]
    return subprocess.run(command, env=os.environ | instance.environment(), capture_output=True, text=True, timeout=120)


def runs(instance):
    with closing(sqlite3.connect(f"file:{instance.paths.store}?mode=ro", uri=True)) as db:
        return db.execute("SELECT verdict, cause, adapter_id, reason FROM training_runs ORDER BY n").fetchall()


def with_parent(folder, parent):
    scratch, manifest = make_adapter(folder, "000001")
    return Adapters(folder).publish(scratch, replace(manifest, parent_id=parent))


def test_daemons_import_good_and_refuse_bad_adapters(instance, tmp_path):
    instance.set(
        SETTINGS.replace(
            "enabled: false", "enabled: false, heldout_share: 0.5, min_heldout_generations: 4, regression_prompts: 4"
        )
    )
    instance.start("inference")
    instance.start("collector")
    instance.ready("inference")
    with instance.client() as client:
        for n in range(16):
            instance.ask(f"question {n}", client, temperature=0.8, max_tokens=12)
    instance.settle()
    instance.start("trainer", SPECL_TEST_RISING="1")
    instance.ready("trainer")
    bad = publish_adapter(tmp_path / "nan", "000001", nan=True)
    done = control(instance, str(bad))
    assert done.returncode == 1 and "not finite" in done.stdout and "Traceback" not in done.stderr
    done = control(instance, str(with_parent(tmp_path / "parent", "000007")))
    assert done.returncode == 1 and "was trained from adapter 000007" in done.stdout
    from_mlx_lm(tmp_path / "theirs")
    done = control(instance, "--json", str(tmp_path / "theirs"))
    output = json.loads(done.stdout)
    assert done.returncode == 0 and output["verdict"] == "promoted" and output["adapter_id"] == "000001", output
    wait_until(lambda: instance.status("inference")["adapter"]["active"] == "000001", 10, "it drafts")
    assert instance.ask("and now?", temperature=0.8, max_tokens=8).adapter_id == "000001"
    wait_until(lambda: len(runs(instance)) == 3, 10, "all verdicts are stored")
    assert [(run[0], run[1], run[2]) for run in runs(instance)] == [
        ("rejected", "import 000001", ""),
        ("rejected", "import 000001", ""),
        ("promoted", "import theirs", "000001"),
    ]
    assert not list(instance.paths.adapters.glob(".new-*"))
    listed = control(instance, "--all", command="list").stdout
    assert listed.count("rejected") == 2 and "current" in listed, listed
    shown = control(instance, command="show").stdout
    assert "promoted (import theirs)" in shown and "activated, promoted" in shown, shown
    print(listed, shown)


def test_non_adapter_directory_is_a_user_error(instance, tmp_path):
    done = control(instance, str(tmp_path / "nowhere"))
    assert done.returncode == 2 and "there is no directory" in done.stderr
    done = control(instance, str(tmp_path))
    assert done.returncode == 2 and "adapters.safetensors" in done.stderr
    folder = publish_adapter(tmp_path, "000001")
    done = control(instance, str(folder))
    assert done.returncode == 3 and "honcho start" in done.stderr
    assert not list(instance.paths.adapters.glob(".new-*"))
    shutil.rmtree(folder)


def test_forced_bad_adapter_rolls_back_within_twenty_requests(instance):
    instance.set(SETTINGS.replace("num_draft_tokens: 2", "num_draft_tokens: 2, ngram: false"))
    publish_adapter(instance.paths.adapters, "000001", scale=1.0)
    Adapters(instance.paths.adapters).set_current("")
    instance.start("inference")
    instance.ready("inference")
    with instance.client() as client:
        plain = [instance.ask(f"question {n}", client, max_tokens=24).text for n in range(8)]
        with instance.client() as other:
            assert other.set_adapter("000001").ok
        requests = 0
        while instance.status("inference")["adapter"]["active"]:
            assert instance.ask(f"question {requests % 8}", client, max_tokens=24).text == plain[requests % 8]
            requests += 1
            assert requests <= 20, instance.status("inference")["adapter"]
    assert "live acceptance" in Adapters(instance.paths.adapters).rolled_back()["000001"]
