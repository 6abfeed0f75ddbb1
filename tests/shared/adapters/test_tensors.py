"""What is no adapter for this draft is refused with its reason; the daemon's swap keeps the old one through all of it."""

import io
import json
import shutil

import mlx.core as mx
import numpy as np
import pytest

from specl.daemons.inference.swap import AdapterSwap
from specl.shared.adapters import tensors as adapter_tensors
from specl.shared.adapters.manifest import Manifest
from specl.shared.adapters.registry import Adapters
from specl.shared.adapters.tensors import load_adapter, read_shape, write_tensors
from specl.shared.engine.core import EngineCore
from specl.shared.errors import AdapterRejected
from specl.shared.models.head import HeadDraft, new_head
from specl.shared.models.lora import LoraShape, choose_layers, linear_layers
from specl.shared.paths import Paths
from tests.lora import problems

HOT = np.arange(0, 60, 2)
KEYS = ("self_attn.q_proj", "mlp.down_proj")


def engine_with(tiny, draft):
    target = tiny(seed=21)
    if draft == "head":
        head = new_head(target, HOT)
        head.fingerprint = "head-0"
        return EngineCore(target, head)
    return EngineCore(target, tiny(seed=22, layers=1))


@pytest.fixture
def engine(tiny):
    return engine_with(tiny, "head")


@pytest.fixture
def adapters(tmp_path):
    return Adapters(Paths(tmp_path / "run", tmp_path / "models").create().adapters)


def random_weights(module, shape, scale=0.1, seed=0):
    mx.random.seed(seed)
    weights = {}
    for key in shape.keys:
        out, inner = linear_layers(module)[key].weight.shape
        weights[f"{key}.lora_a"] = scale * mx.random.normal((inner, shape.rank))
        weights[f"{key}.lora_b"] = scale * mx.random.normal((shape.rank, out))
    return weights


def publish(adapters, engine, change=lambda folder: None, weights=None, hot=HOT, **fields):
    """A good adapter for `engine`, but for what `change` does to its files before their hashes are taken."""
    module = engine.draft_module
    keys = KEYS if isinstance(engine.draft, HeadDraft) else choose_layers(module, "all")
    shape = LoraShape(4, 8.0, 0.0, keys)
    scratch = adapters.scratch(id := adapters.next_id())
    write_tensors(scratch, shape, weights or random_weights(module, shape), hot)
    change(scratch)
    values = {
        "id": id, "kind": "lora", "created_at": 1.0, "base_model": "tiny", "base_fingerprint": engine.draft_fingerprint,
        "target_fingerprint": engine.target.fingerprint, "tokenizer_fingerprint": engine.target.tokenizer_fingerprint,
        "parent_id": "", "training_run_id": "run", "rank": 4, "alpha": 8.0, "modules": list(keys), "change_norm": 1.0,
        "metrics": {"heldout_after": 0.5}, "training": {},
    }  # fmt: skip
    return adapters.publish(scratch, Manifest(**(values | fields)))


def said(adapters, engine, path):
    with pytest.raises(AdapterRejected) as caught:
        load_adapter(adapters, path, engine)
    text = str(caught.value)
    assert text.startswith(f"adapter {path.name}: ") and "\n" not in text
    return text


# ---------------------------------------------------------------------------------------------------- the good case
def test_what_was_written_is_what_is_read(adapters, engine):
    shape = LoraShape(4, 8.0, 0.0, KEYS)
    weights = random_weights(engine.draft_module, shape)
    path = publish(adapters, engine, weights=weights, hot=HOT + 1)
    loaded, manifest = load_adapter(adapters, path, engine)
    assert (loaded.id, loaded.shape, manifest.id) == ("000001", shape, "000001")
    assert all(mx.array_equal(loaded.weights[name], weights[name]) for name in weights)
    assert (loaded.hot == HOT + 1).all() and loaded.hot.dtype == np.int64


def test_language_model_draft_takes_no_hot_vocabulary(adapters, tiny):
    engine = engine_with(tiny, "model")
    loaded, _ = load_adapter(adapters, publish(adapters, engine, hot=None), engine)
    assert loaded.hot is None and len(loaded.shape.keys) == 7


def test_file_changes_after_loading_do_not_matter(adapters, engine):
    path = publish(adapters, engine)
    loaded, _ = load_adapter(adapters, path, engine)
    sums = {name: mx.sum(value).item() for name, value in loaded.weights.items()}
    shutil.rmtree(path)
    assert {name: mx.sum(value).item() for name, value in loaded.weights.items()} == sums
    assert (loaded.hot == HOT).all()


def test_mlx_lm_arguments_in_the_config_are_ignored(tmp_path):
    lora = {"rank": 8, "scale": 20, "dropout": 0.05, "keys": ["a", "b"], "note": "x"}
    text = json.dumps({"fine_tune_type": "lora", "iters": 100, "model": "m", "lora_parameters": lora})
    (tmp_path / "adapter_config.json").write_text(text)
    assert read_shape(tmp_path) == LoraShape(8, 160.0, 0.05, ("a", "b"))


# ---------------------------------------------------------------------------------------------------- the config
def lora(**changes):
    def change(folder):
        file = folder / "adapter_config.json"
        document = json.loads(file.read_text())
        document["lora_parameters"] |= changes
        file.write_text(json.dumps(document))

    return change


def raw_config(data):
    return lambda folder: (folder / "adapter_config.json").write_bytes(data)


CONFIGS = {
    "rank Infinity": (lora(rank=float("inf")), "lora_parameters.rank"),
    "rank NaN": (lora(rank=float("nan")), "lora_parameters.rank"),
    "rank text": (lora(rank="8"), "lora_parameters.rank"),
    "rank true": (lora(rank=True), "lora_parameters.rank"),
    "rank none": (lora(rank=None), "lora_parameters.rank"),
    "rank half": (lora(rank=4.5), "lora_parameters.rank"),
    "rank zero": (lora(rank=0), "lora_parameters.rank"),
    "rank giant": (lora(rank=2**62), "has shape"),
    "scale NaN": (lora(scale=float("nan")), "lora_parameters.scale"),
    "scale Infinity": (lora(scale=float("inf")), "lora_parameters.scale"),
    "scale text": (lora(scale="1"), "lora_parameters.scale"),
    "scale too large": (lora(scale=1e308), "overflows"),
    "scale zero": (lora(scale=0), "changes nothing"),
    "dropout one": (lora(dropout=1.0), "lora_parameters.dropout"),
    "dropout above": (lora(dropout=7), "lora_parameters.dropout"),
    "dropout below": (lora(dropout=-0.1), "lora_parameters.dropout"),
    "dropout NaN": (lora(dropout=float("nan")), "lora_parameters.dropout"),
    "keys a dict": (lora(keys={"a": 1}), "lora_parameters.keys"),
    "keys text": (lora(keys="q_proj"), "lora_parameters.keys"),
    "keys unhashable": (lora(keys=[["q_proj"]]), "lora_parameters.keys"),
    "keys empty": (lora(keys=[]), "lora_parameters.keys"),
    "keys twice": (lora(keys=[*KEYS, KEYS[0]]), "a layer is named twice"),
    "keys unknown": (lora(keys=[*KEYS, "self_attn.x_proj"]), "no linear layer self_attn.x_proj"),
    "keys fewer": (lora(keys=[KEYS[0]]), "mlp.down_proj.lora_a is not part of this adapter"),
    "no parameters": (raw_config(b'{"fine_tune_type": "lora"}'), "lora_parameters: Field required"),
    "another kind": (raw_config(b'{"fine_tune_type": "full", "lora_parameters": {}}'), "fine_tune_type"),
    "a list": (raw_config(b"[]"), "adapter_config.json cannot be used"),
    "empty": (raw_config(b""), "adapter_config.json cannot be used"),
    "nested": (raw_config(b"[" * 100_000), "recursion limit"),
    "bytes": (raw_config(b"\xff\xfe"), "adapter_config.json cannot be used"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_unusable_config_is_refused(adapters, engine, kind):
    change, reason = CONFIGS[kind]
    assert reason in said(adapters, engine, publish(adapters, engine, change))


# ---------------------------------------------------------------------------------------------------- the weights
def tensors(**changes):
    """Change some tensors of the weights file; None takes one away."""

    def change(folder):
        file = str(folder / "adapters.safetensors")
        weights = {name: mx.array(np.array(value)) for name, value in mx.load(file).items()}
        for name, make in changes.items():
            name = name.replace("__", ".")
            weights[name] = make(weights[name]) if name in weights else make(None)
        mx.save_safetensors(file, {name: value for name, value in weights.items() if value is not None})

    return change


Q_A, Q_B = "self_attn__q_proj__lora_a", "self_attn__q_proj__lora_b"
WEIGHTS = {
    "integers": (tensors(**{Q_A: lambda w: w.astype(mx.int32)}), "real numbers"),
    "booleans": (tensors(**{Q_A: lambda w: w > 0}), "real numbers"),
    "complex": (tensors(**{Q_A: lambda w: w.astype(mx.complex64)}), "real numbers"),
    "NaN": (tensors(**{Q_A: lambda w: w * float("nan")}), "q_proj.lora_a has values that are not finite"),
    "infinite": (tensors(**{Q_B: lambda w: w + float("inf")}), "q_proj.lora_b has values that are not finite"),
    "product": (tensors(**{Q_A: lambda w: w * 1e30, Q_B: lambda w: w * 1e30}), "q_proj: its weight change overflows"),
    "norm": (tensors(**{Q_A: lambda w: w * 1e15, Q_B: lambda w: w * 1e15}), "overflow together"),
    "missing": (tensors(**{Q_A: lambda w: None}), "q_proj.lora_a is missing"),
    "surplus": (tensors(extra=lambda w: mx.ones((2,))), "extra is not part of this adapter"),
    "shape": (tensors(**{Q_A: lambda w: w[1:]}), "lora_a has shape (63, 4), not (64, 4)"),
    "flat": (tensors(**{Q_A: lambda w: w.reshape(-1)}), "lora_a has shape (256,)"),
    "zero": (tensors(**{name: lambda w: w * 0 for name in (Q_B, "mlp__down_proj__lora_b")}), "changes nothing"),
    "npz": (
        lambda folder: np.savez(open(folder / "adapters.safetensors", "wb"), a=np.ones(3)),
        "not a whole safetensors file",
    ),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_that_cannot_be_used_are_refused(adapters, engine, kind):
    change, reason = WEIGHTS[kind]
    assert reason in said(adapters, engine, publish(adapters, engine, change))


def test_everything_wrong_is_said_at_once(adapters, engine):
    text = said(
        adapters,
        engine,
        publish(adapters, engine, tensors(**{Q_A: lambda w: None}, extra=lambda w: mx.ones((2,))), hot=HOT[1:]),
    )
    assert "q_proj.lora_a is missing" in text and "extra is not part" in text and "hot vocabulary has 29" in text


def test_half_precision_adapter_must_not_overflow(adapters, tiny):

    engine = engine_with(tiny, "model")
    module, shape = engine.draft_module, LoraShape(4, 8.0, 0.0, ("model.layers.0.self_attn.q_proj",))
    weights = random_weights(module, shape, scale=200.0)
    assert problems(module, shape, weights) == []
    layer = linear_layers(module)[shape.keys[0]]
    kept = layer.weight
    layer.weight = kept.astype(mx.float16)
    found = problems(module, shape, weights)
    layer.weight = kept
    assert found == ["model.layers.0.self_attn.q_proj: its weight change overflows"]


# ---------------------------------------------------------------------------------------------------- the hot vocabulary
def hot_bytes(data):
    return lambda folder: (folder / "hot_vocab.npy").write_bytes(data)


def hot_array(array, **more):
    buffer = io.BytesIO()
    np.save(buffer, array, **more)
    return hot_bytes(buffer.getvalue())


def archive():
    buffer = io.BytesIO()
    np.savez(buffer, hot=HOT)
    return buffer.getvalue()


def promising(shape):
    """An array whose header promises more than the file holds."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<u4", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


HOTS = {
    "empty file": (hot_bytes(b""), "hot_vocab.npy cannot be read"),
    "cut": (hot_bytes(b"\x93NUMPY\x01"), "hot_vocab.npy cannot be read"),
    "noise": (hot_bytes(bytes(range(200))), "hot_vocab.npy cannot be read"),
    "bad header": (hot_bytes(b"\x93NUMPY\x01\x00\x10\x00{'descr': oh dear"), "hot_vocab.npy cannot be read"),
    "archive": (hot_bytes(archive()), "an archive, not one array"),
    "pickle": (hot_array(np.array([{}], dtype=object), allow_pickle=True), "hot_vocab.npy cannot be read"),
    "promise": (hot_bytes(promising((2**40,))), "hot_vocab.npy cannot be read"),
    "real numbers": (hot_array(HOT.astype(np.float32)), "not a list of token ids"),
    "scalar": (hot_array(np.int64(3)), "not a list of token ids"),
    "table": (hot_array(HOT.reshape(2, 15)), "not a list of token ids"),
    "text": (hot_array(np.array(["a"] * 30)), "not a list of token ids"),
    "none": (hot_array(HOT[:0]), "has 0 tokens; the draft scores 30"),
    "too few": (hot_array(HOT[1:]), "has 29 tokens"),
    "twice": (hot_array(np.r_[HOT[:-1], HOT[0]]), "names a token twice"),
    "more with doubles": (hot_array(np.r_[HOT, HOT[:1]]), "has 31 tokens"),
    "negative": (hot_array(np.r_[-1, HOT[1:]]), "from -1 to 58; tokens are 0 to 96"),
    "out of range": (hot_array(np.r_[HOT[:-1], 97]), "from 0 to 97"),
    "huge": (hot_array(np.r_[HOT[:-1].astype(np.uint64), np.uint64(2**63 + 5)]), "tokens are 0 to 96"),
}


@pytest.mark.parametrize("kind", HOTS)
def test_mismatched_hot_vocabulary_is_refused(adapters, engine, kind):
    change, reason = HOTS[kind]
    assert reason in said(adapters, engine, publish(adapters, engine, change))


def test_hot_vocabulary_named_by_manifest_must_exist(adapters, engine):
    path = publish(adapters, engine)
    (path / "hot_vocab.npy").unlink()
    assert "hot_vocab.npy is missing, though the manifest names it" in said(adapters, engine, path)


# ---------------------------------------------------------------------------------------------------- the swap
class Heard(list):
    def __call__(self, change):
        self.append((change.event, change.adapter_id, change.note))


@pytest.fixture
def swap(adapters, engine, tmp_path):
    heard = Heard()
    swap = AdapterSwap(Paths(tmp_path / "run", tmp_path / "models"), engine, heard)
    swap.heard = heard
    return swap


def drafting(engine):
    """The draft's present output on a fixed input: which weights draft, whatever they are called."""
    x = mx.ones((1, 1, 64)) * 0.1
    out = engine.draft.logits(engine.draft.head(x, x))
    return np.array(out).copy(), engine.draft.hot.copy()


SPOILT = {**CONFIGS, **WEIGHTS, **HOTS}


def test_every_refusal_leaves_the_old_adapter_drafting(adapters, engine, swap):
    publish(adapters, engine, hot=HOT + 1)
    swap.follow_current()
    assert engine.adapter_id == "000001"
    logits, hot = drafting(engine)
    for change, reason in SPOILT.values():
        path = publish(adapters, engine, change)
        swap.follow_current()
        assert engine.adapter_id == "000001"
        assert swap.heard[-1][:2] == ("rejected", path.name) and reason in swap.heard[-1][2]
    now, now_hot = drafting(engine)
    assert (now == logits).all() and (now_hot == hot).all()
    publish(adapters, engine)
    swap.follow_current()
    assert swap.heard[-1][:2] == ("activated", f"{len(SPOILT) + 2:06d}")


@pytest.mark.parametrize("where", ["load", "use"])
def test_unforeseen_error_is_a_refusal(adapters, engine, swap, monkeypatch, where):
    publish(adapters, engine, hot=HOT + 1)
    swap.follow_current()
    logits, hot = drafting(engine)
    path = publish(adapters, engine)
    if where == "load":
        monkeypatch.setattr(adapter_tensors, "check_steps", lambda *_: 1 / 0)
    else:
        real = EngineCore.switch_adapter

        def half(self, adapter):
            yield from real(self, adapter)
            if adapter is not None and adapter.id == path.name:
                raise ZeroDivisionError("division by zero")

        monkeypatch.setattr(EngineCore, "switch_adapter", half)
    swap.follow_current()
    assert "could not be loaded (ZeroDivisionError: division by zero)" in swap.rejected[path.name]
    assert engine.adapter_id == "000001"
    now, now_hot = drafting(engine)
    assert (now == logits).all() and (now_hot == hot).all()
    assert not swap.switch(path.name).ok


def test_announced_adapter_loads_in_steps(adapters, engine, swap):
    publish(adapters, engine, hot=HOT + 1)
    swap.follow_current()
    logits, hot = drafting(engine)
    path = publish(adapters, engine)
    swap.announced(path.name, str(path))
    pieces = 0
    while swap.under_way:
        now, now_hot = drafting(engine)
        assert engine.adapter_id == "000001" and (now == logits).all() and (now_hot == hot).all()
        swap.advance()
        pieces += 1
    assert engine.adapter_id == path.name and pieces > 5
    assert not (drafting(engine)[0] == logits).all()


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_errors_outside_the_candidate_are_raised(adapters, engine, swap, monkeypatch, error):
    publish(adapters, engine)
    monkeypatch.setattr(adapter_tensors, "check_steps", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(error):
        swap.follow_current()


def test_huge_adapter_config_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("specl.shared.adapters.tensors.MAX_MANIFEST", 100)
    (tmp_path / "adapter_config.json").write_bytes(b" " * 101)
    with pytest.raises(AdapterRejected, match="adapter_config.json has more than 100 bytes"):
        read_shape(tmp_path)
