"""The memory estimate is arithmetic that can be done by hand, and what cannot fit is refused before anything is loaded."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Kind

from specl.shared.errors import ModelError
from specl.shared.loading.engine import load_engine
from specl.shared.models import memory
from specl.shared.models.gguf_file import convert
from specl.shared.models.memory import Machine, ModelSize, check, estimate, limit, size_of
from specl.shared.settings.load import load_settings
from specl.shared.settings.schema import Settings
from tests.shared.models import tiny_gguf

ROOT = Path(__file__).resolve().parents[3]
# Qwen2.5's published shapes; 4-bit files take 4.5 bits a weight
HALF_B = ModelSize(494_032_768, 278_000_000, True, 24, 896, 4864, 128, 151_936)
THREE_B = ModelSize(3_085_938_688, 1_740_000_000, True, 36, 2048, 11_008, 256, 151_936)
SEVEN_B = ModelSize(7_615_616_512, 4_280_000_000, True, 28, 3584, 18_944, 512, 152_064)
MAC_16, MAC_32 = Machine(16 * 2**30, False, False), Machine(32 * 2**30, False, False)
LINUX_16 = Machine(16 * 2**30, True, True)


def settings(**sections):
    return Settings.model_validate(sections)


def profile(name):
    return load_settings(ROOT / "configs" / name)


# ---------------------------------------------------------------------------------------------------- arithmetic
def test_weights_size_on_metal_and_cpu():
    assert SEVEN_B.weights(dense_fp32=False, native=False) == SEVEN_B.file_bytes
    assert SEVEN_B.weights(dense_fp32=True, native=False) == 4 * SEVEN_B.parameters
    beside = 1.25 * SEVEN_B.parameters + SEVEN_B.file_bytes
    assert SEVEN_B.weights(dense_fp32=True, native=True) == 4 * SEVEN_B.parameters + beside
    dense = replace(SEVEN_B, quantised=False)
    assert dense.weights(dense_fp32=True, native=True) == 6 * SEVEN_B.parameters


def test_cache_size_is_keys_and_values():
    assert THREE_B.cache(8192, dense_fp32=False) == 2 * 8192 * 36 * 256 * 2
    assert THREE_B.cache(8192, dense_fp32=True) == 2 * THREE_B.cache(8192, dense_fp32=False)


def test_lora_size_counts_seven_layers():
    shapes = [(896, 896), (896, 128), (896, 128), (896, 896), (896, 4864), (896, 4864), (4864, 896)]
    assert HALF_B.lora(8) == 24 * sum(8 * (a + b) for a, b in shapes)


def test_checkpointing_takes_less_and_a_larger_rank_more():
    plain, spare = settings(), settings(memory={"gradient_checkpointing": True})
    wide = settings(training={"lora": {"rank": 512}})
    learning = [estimate(THREE_B, HALF_B, s, MAC_16).training["learning"] for s in (spare, plain, wide)]
    assert learning == sorted(learning) and learning[0] < learning[1] < learning[2]


def test_the_trainer_holds_both_models_once_more():
    found = estimate(THREE_B, HALF_B, settings(), MAC_16)
    assert found.training["target"] == found.serving["target"] == THREE_B.file_bytes
    assert found.total(training=True) > 2 * (THREE_B.file_bytes + HALF_B.file_bytes)
    assert found.total(training=False) == sum(found.serving.values())


def test_without_a_draft_nothing_is_trained():
    assert estimate(THREE_B, None, settings(), MAC_16).training == {}


@pytest.mark.parametrize(
    ("name", "target", "mac"), [("mac-16gb.yaml", THREE_B, MAC_16), ("mac-32gb.yaml", SEVEN_B, MAC_32)]
)
def test_shipped_profiles_fit_their_machines(name, target, mac):
    found = estimate(target, HALF_B, profile(name), mac)
    check(found, profile(name), mac, training=True)


def test_the_profiles_are_the_sources():
    small, large = profile("mac-16gb.yaml"), profile("mac-32gb.yaml")
    assert small.models.target.name.endswith("Qwen2.5-3B-Instruct-4bit")
    assert large.models.target.name.endswith("Qwen2.5-7B-Instruct-4bit")
    assert {s.models.draft.name for s in (small, large)} == {"mlx-community/Qwen2.5-0.5B-Instruct-4bit"}
    assert (small.training.lora.rank, small.training.lora.alpha, small.training.batch_size) == (8, 16, 1)
    assert large.training.lora.rank > 8 and large.training.batch_size > 1 and small.memory.gradient_checkpointing


# ---------------------------------------------------------------------------------------------------- refusing
def test_memory_refusal_has_numbers_in_one_sentence():
    found = estimate(SEVEN_B, HALF_B, settings(), LINUX_16)
    with pytest.raises(ModelError) as caught:
        check(found, settings(models={"target": {"name": "seven"}}), LINUX_16, training=False)
    text = str(caught.value)
    assert text.startswith("serving seven needs about 4") and "target 44." in text and "\n" not in text
    assert "15.5 GB may be taken of this machine's 17.2 GB" in text and "memory.limit_gb" in caught.value.hint
    assert "training" not in text


def test_training_may_not_fit_where_serving_does():
    machine = Machine(8e9, False, False)
    found = estimate(SEVEN_B, HALF_B, settings(), machine)
    check(found, settings(), machine, training=False)
    with pytest.raises(ModelError, match="training while serving needs about"):
        check(found, settings(), machine, training=True)


def test_the_setting_overrides():
    found = estimate(SEVEN_B, HALF_B, settings(), LINUX_16)
    for limit_gb in (128, "none"):
        check(found, settings(memory={"limit_gb": limit_gb}), LINUX_16, training=True)
    with pytest.raises(ModelError, match=r"0\.5 GB may be taken"):
        check(found, settings(memory={"limit_gb": 0.5}), LINUX_16, training=False)
    assert limit(settings(), LINUX_16) == pytest.approx(0.9 * 16 * 2**30)
    assert limit(settings(memory={"limit_gb": "none"}), LINUX_16) == math.inf


# ---------------------------------------------------------------------------------------------------- files
@pytest.mark.parametrize("kind", [Kind.F16, Kind.Q4_0, Kind.Q8_0])
def test_a_models_size_is_read_from_its_headers(tmp_path, kind):
    truth = tiny_gguf.write(tmp_path / "m.gguf", "qwen2", kind)
    convert(tmp_path / "m.gguf", tmp_path / "model")
    found = size_of(tmp_path / "model")
    assert found.parameters == sum(value.size for value in truth.values())
    assert found.file_bytes == (tmp_path / "model" / "model.safetensors").stat().st_size
    assert found.quantised is (kind != Kind.F16)
    assert (found.layers, found.hidden, found.intermediate) == (tiny_gguf.LAYERS, tiny_gguf.WIDTH, tiny_gguf.INNER)
    assert found.kv_width == tiny_gguf.KV_HEADS * tiny_gguf.WIDTH // tiny_gguf.HEADS


def test_shipped_head_size_is_layer_and_vocabulary():
    folder = ROOT / "shared" / "models" / "drafts" / "smollm2-135m-head"
    found, shape = size_of(folder), json.loads((folder / "config.json").read_text())
    assert found.layers == 1 and found.vocabulary == shape["hot_size"] and not found.quantised
    assert found.parameters * 2 == pytest.approx(found.file_bytes, rel=0.01)


@pytest.mark.parametrize(
    "spoil",
    [{"config.json": b"{}"}, {"config.json": b"["}, {"model.safetensors": b"\xff" * 20}, {"model.safetensors": b""}],
)
def test_unknown_size_has_its_own_error(tmp_path, spoil):
    tiny_gguf.write(tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", tmp_path / "model")
    for name, data in spoil.items():
        (tmp_path / "model" / name).write_bytes(data)
    with pytest.raises(ModelError, match="cannot be read"):
        size_of(tmp_path / "model")


def test_loading_is_refused_exactly_when_too_large(tmp_path, monkeypatch):
    tiny_gguf.write(tmp_path / "m.gguf", "qwen2", Kind.Q8_0)
    names = {"target": {"name": str(tmp_path / "m.gguf")}, "draft": {"name": str(tmp_path / "m.gguf")}}
    engine = load_engine(settings(models=names), tmp_path / "models")
    assert engine.draft is not None
    monkeypatch.setattr("specl.shared.loading.engine.load", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(ModelError, match=r"needs about 0\.4 GB"):
        load_engine(settings(models=names, memory={"limit_gb": 0.1}), tmp_path / "models")


def test_container_limit_bounds_the_machines_memory(monkeypatch):
    machine = memory.this_machine("fp32")
    assert machine.memory > 1e8 and machine.dense_fp32
    monkeypatch.setattr(Path, "read_text", lambda self: "123456789" if "cgroup" in str(self) else "")
    assert memory.this_machine("native").memory == 123456789 and not memory.this_machine("native").dense_fp32


@pytest.mark.slow
def test_builtin_estimate_is_near_the_process_size():
    import os
    import subprocess
    import sys

    code = """
from specl.shared.settings.load import load_settings
from specl.shared.loading.engine import estimate_pair, load_engine, resolve_draft
from specl.shared.models.find import ensure_model
from specl.shared.paths import find_paths
models, settings = find_paths().models, load_settings()
found, _ = estimate_pair(settings, ensure_model("smollm2-135m", models), resolve_draft("smollm2-135m-head", models, print))
engine = load_engine(settings, models)
pages = int(open("/proc/self/statm").read().split()[1])
print(pages * 4096, sum(found.serving.values()) - found.serving["caches"] - 120e6)
"""
    if not sys.platform.startswith("linux") or not os.environ.get("SPECL_MODELS"):
        pytest.skip("reads /proc, and needs the built-in model in SPECL_MODELS")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    taken, estimated = map(float, done.stdout.split())
    assert estimated == pytest.approx(taken, rel=0.25)
