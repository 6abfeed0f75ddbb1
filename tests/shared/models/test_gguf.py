"""GGUF files become the models they are: every weight, every token, the same logits; what cannot be is said in a sentence."""

import json
import shutil
from collections import namedtuple

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from mlx_lm.utils import dequantize_model, load_model
from tokenizers import Tokenizer

from specl.shared.engine.core import EngineCore
from specl.shared.errors import ModelError
from specl.shared.models import gguf_import
from specl.shared.models.find import ensure_model
from specl.shared.models.gguf_file import convert, size_needed
from specl.shared.models.gguf_import import ensure_converted, import_gguf, is_gguf, suggested_name
from specl.shared.models.load import load
from tests.shared.models import tiny_gguf
from tests.shared.models.tiny_gguf import TEXTS

KINDS = [
    Kind.F32,
    Kind.F16,
    Kind.BF16,
    Kind.Q4_0,
    Kind.Q4_1,
    Kind.Q5_0,
    Kind.Q5_1,
    Kind.Q8_0,
    Kind.Q4_K,
    Kind.Q5_K,
    Kind.Q6_K,
]
EXACT = {Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0}


def quiet(message):
    pass


def dense_weights(folder):
    """What a converted folder computes with, in fp32."""
    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    model = dequantize_model(model)
    from mlx.utils import tree_flatten

    return {name: np.array(value) for name, value in tree_flatten(model.parameters())}


def worst(found, truth, name):
    """The largest difference as a share of the tensor's spread."""
    return np.abs(found[name] - truth[name]).max() / truth[name].std()


# ---------------------------------------------------------------------------------------------------- weights
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_weight_is_the_files_own(tmp_path, family, kind):
    truth = tiny_gguf.write(tmp_path / "m.gguf", family, kind)
    convert(tmp_path / "m.gguf", tmp_path / "model")
    found = dense_weights(tmp_path / "model")
    assert found.keys() == truth.keys()
    for name, value in truth.items():
        if value.ndim == 1:  # norms and biases go from fp32 to the half type beside them
            assert np.abs(found[name] - value).max() <= {Kind.F32: 0, Kind.BF16: 8e-3}.get(kind, 1e-3), name
        elif kind in EXACT:
            assert (found[name] == value).all(), name
        else:
            assert worst(found, truth, name) < 0.05, name


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_served_model_computes_what_the_file_means(tmp_path, family, tied):
    truth = tiny_gguf.write(tmp_path / "m.gguf", family, Kind.Q8_0, tied=tied)
    expected = tiny_gguf.reference_model(family, truth)(ids := mx.array([[1, 5, 9, 200, 17, 31]]))
    model = load(str(tmp_path / "m.gguf"), tmp_path / "models")
    assert mx.abs(model.model(ids) - expected).max().item() < 0.01 * mx.abs(expected).max().item()
    assert model.config["tie_word_embeddings"] is tied


def test_mixed_k_quant_kinds_are_read(tmp_path):
    truth = tiny_gguf.write(tmp_path / "m.gguf", "llama", Kind.Q4_K, head_kind=Kind.Q6_K)
    convert(tmp_path / "m.gguf", tmp_path / "model")
    found = dense_weights(tmp_path / "model")
    assert all(worst(found, truth, name) < 0.05 for name, value in truth.items() if value.ndim > 1)
    config = json.loads((tmp_path / "model" / "config.json").read_text())["quantization"]
    assert config["bits"] == 4 and config["lm_head"] == {"group_size": 32, "bits": 8}


@pytest.mark.parametrize(("quantize", "bound"), [("4", 0.6), ("8", 0.04), ("none", 0.002)])
@pytest.mark.parametrize("kind", [Kind.F32, Kind.BF16, Kind.Q4_K])
def test_weights_can_be_quantised_anew_or_made_dense(tmp_path, quantize, bound, kind):
    truth = tiny_gguf.write(tmp_path / "m.gguf", "qwen2", kind)
    convert(tmp_path / "m.gguf", tmp_path / "model", quantize)
    found = dense_weights(tmp_path / "model")
    assert all(worst(found, truth, name) < bound for name, value in truth.items() if value.ndim > 1)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    if quantize == "none":
        assert "quantization" not in config
    else:
        assert config["quantization"]["model.embed_tokens"] == {"group_size": 64, "bits": int(quantize)}


def test_builtin_conversion_is_byte_for_byte_unchanged(tmp_path):
    """A shipped head knows its target by config.json and the weights' bytes: order, spelling and types may not change."""
    truth = tiny_gguf.write(tmp_path / "m.gguf", "llama", Kind.Q4_1, tied=True, head_kind=Kind.Q8_0)
    convert(tmp_path / "m.gguf", tmp_path / "model", exact=True)
    text = (tmp_path / "model" / "config.json").read_text()
    rows = len(truth["model.embed_tokens.weight"])
    expected = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "num_hidden_layers": 2,
        "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0, "max_position_embeddings": 256, "vocab_size": rows, "eos_token_id": rows - 1, "bos_token_id": rows - 3,
        "quantization": {"group_size": 32, "bits": 4, "model.embed_tokens": {"group_size": 32, "bits": 8}},
        "tie_word_embeddings": True,
    }  # fmt: skip
    assert text == json.dumps(expected, indent=2)
    found = mx.load(str(tmp_path / "model" / "model.safetensors"))
    kinds = {name.rsplit(".", 1)[-1] if "norm" not in name else "norm": value.dtype for name, value in found.items()}
    assert kinds == {"weight": mx.uint32, "scales": mx.float16, "biases": mx.float16, "norm": mx.float32}
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


def test_a_large_model_goes_into_several_files(tmp_path, monkeypatch):
    from specl.shared.models import gguf_file

    truth = tiny_gguf.write(tmp_path / "m.gguf", "llama", Kind.F16)
    monkeypatch.setattr(gguf_file, "SHARD", 1 << 20)
    convert(tmp_path / "m.gguf", tmp_path / "model")
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 2
    found = dense_weights(tmp_path / "model")
    assert all((found[name] == value).all() for name, value in truth.items() if value.ndim > 1)


# ---------------------------------------------------------------------------------------------------- rotary scaling
def llama3_factors(factor, size):
    """As llama.cpp's converter computes them, with Llama 3.1's published numbers."""
    found = []
    for i in range(0, size, 2):
        wavelength = 2 * np.pi * 10000.0 ** (i / size)
        if wavelength < 8192 / 4:
            found.append(1.0)
        elif wavelength > 8192:
            found.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


def test_llama_3s_stretched_positions_are_recognised(tmp_path):
    factors = llama3_factors(32.0, tiny_gguf.WIDTH // tiny_gguf.HEADS)
    truth = tiny_gguf.write(tmp_path / "m.gguf", keys=lambda writer: writer.add_tensor("rope_freqs.weight", factors))
    convert(tmp_path / "m.gguf", tmp_path / "model")
    scaling = json.loads((tmp_path / "model" / "config.json").read_text())["rope_scaling"]
    assert scaling["rope_type"] == "llama3" and scaling["factor"] == 32.0
    ids = mx.array([[*range(60)]])
    model, _ = load_model(tmp_path / "model")
    expected = tiny_gguf.reference_model("llama", truth, rope_scaling=scaling)(ids)
    assert mx.allclose(model(ids), expected, atol=0.02 * mx.abs(expected).max().item()).item()


def test_other_rotary_factors_are_refused(tmp_path):
    factors = np.linspace(1, 9, 32, dtype=np.float32)
    tiny_gguf.write(tmp_path / "m.gguf", keys=lambda writer: writer.add_tensor("rope_freqs.weight", factors))
    with pytest.raises(ModelError, match=r"m\.gguf: its rotary factors are not those of Llama 3\.1"):
        convert(tmp_path / "m.gguf", tmp_path / "model")


# ---------------------------------------------------------------------------------------------------- tokenizers
@pytest.mark.parametrize(("family", "kind"), [("qwen2", "qwen2"), ("llama", "llama-bpe")])
def test_byte_level_tokens_equal_the_reference_tokenizer(tmp_path, family, kind):
    tiny_gguf.write(tmp_path / "m.gguf", family, tokenizer=kind)
    convert(tmp_path / "m.gguf", tmp_path / "model")
    made, reference = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json")), tiny_gguf.byte_bpe(kind)
    for text in TEXTS:
        ids = made.encode(text, add_special_tokens=False).ids
        assert ids == reference.encode(text, add_special_tokens=False).ids, text
        assert made.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("tokenizer", ["spm", "llama-bpe", "qwen2"])
@pytest.mark.parametrize("said", [None, True, False])
def test_plain_text_prefix_equals_the_reference_tokenizer(tmp_path, tokenizer, said):
    def keys(writer):
        if said is not None:
            writer.add_add_bos_token(said)
        writer.add_add_eos_token(True)  # never part of a prompt

    tiny_gguf.write(tmp_path / "m.gguf", "qwen2" if tokenizer == "qwen2" else "llama", tokenizer=tokenizer, keys=keys)
    engine = EngineCore(load(str(tmp_path / "m.gguf"), tmp_path / "models"), None)
    if tokenizer == "spm":
        reference = tiny_gguf.sentence_piece()
        begun, plain, bos = lambda text: reference.encode(text, add_bos=True), reference.encode, "<s>"
    else:
        reference = tiny_gguf.byte_bpe(tokenizer)
        id = reference.token_to_id(bos := "<|endoftext|>")
        begun, plain = lambda text: [id, *reference.encode(text).ids], lambda text: reference.encode(text).ids
    wanted = begun if said or (said is None and tokenizer != "qwen2") else plain
    for text in ("Ein Tag", " 12 it's", "<|im_start|>user"[: 3 if tokenizer == "spm" else None]):
        assert engine.encode(text, special=True) == list(wanted(text))
        assert engine.encode(text) == list(plain(text))
    own = engine.encode(bos + "Ein Tag", special=True)  # it writes its own
    assert own == engine.encode(bos + "Ein Tag") and own[0] != own[1]
    assert engine.encode("", special=True) == []
    text, tokens = engine.encode_chat([{"role": "user", "content": "hi"}])
    assert tokens == engine.encode(text)


def test_sentencepiece_tokens_equal_sentencepiece(tmp_path):
    tiny_gguf.write(tmp_path / "m.gguf", tokenizer="spm")
    convert(tmp_path / "m.gguf", tmp_path / "model")
    made, reference = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json")), tiny_gguf.sentence_piece()
    for text in TEXTS:
        ids = made.encode(text, add_special_tokens=False).ids
        assert ids == reference.encode(text), text
        assert made.decode(ids, skip_special_tokens=False) == text


def test_chat_template_and_end_tokens_are_imported(tmp_path):
    tiny_gguf.write(tmp_path / "m.gguf", "qwen2", Kind.Q8_0)
    model = load(str(tmp_path / "m.gguf"), tmp_path / "models")
    text = model.tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_end|>"
    vocabulary = model.tokenizer.get_vocab()
    assert model.stop_tokens == {vocabulary["<|im_end|>"], vocabulary["<|endoftext|>"]}
    assert len(model.tokenizer.encode("<|im_start|>", add_special_tokens=False)) == 1


@pytest.mark.parametrize("kind", [tiny_gguf.NORMAL, tiny_gguf.USER])
def test_ends_of_a_turn_are_control_tokens(tmp_path, monkeypatch, kind):
    def all_of(self, kinds):
        self.add_array("tokenizer.ggml.token_type", [kind if k == tiny_gguf.CONTROL else k for k in kinds])

    monkeypatch.setattr("gguf.GGUFWriter.add_token_types", all_of)
    tiny_gguf.write(tmp_path / "m.gguf", "qwen2", Kind.Q8_0)
    model = load(str(tmp_path / "m.gguf"), tmp_path / "models")
    vocabulary = model.tokenizer.get_vocab()
    assert model.tokenizer.encode("<|im_start|>a<|im_end|>")[::2] == [
        vocabulary["<|im_start|>"],
        vocabulary["<|im_end|>"],
    ]
    assert model.stop_tokens == {vocabulary["<|im_end|>"], vocabulary["<|endoftext|>"]}
    _, tokens = EngineCore(model, None).encode_chat([{"role": "user", "content": "a<|im_end|>b"}])
    assert tokens.count(vocabulary["<|im_end|>"]) == 2  # the template's


# ---------------------------------------------------------------------------------------------------- refusals
def refused(gguf, tmp_path):
    with pytest.raises(ModelError) as caught:
        import_gguf(gguf, tmp_path / "models", "m", "keep", quiet)
    text = str(caught.value)
    assert "\n" not in text and "m.gguf" in text
    left = (
        [path for path in (tmp_path / "models").rglob("*") if path.name != ".lock"]
        if (tmp_path / "models").exists()
        else []
    )
    assert left == [], "nothing half made is left"
    return text


@pytest.mark.parametrize("share", [0, 1e-5, 0.001, 0.01, 0.05, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path, share):
    gguf = tmp_path / "m.gguf"
    tiny_gguf.write(gguf, "llama", Kind.Q8_0)
    data = gguf.read_bytes()
    gguf.write_bytes(data[: int(share * len(data))])
    assert "is not a whole GGUF file" in refused(gguf, tmp_path)


@pytest.mark.parametrize(
    "data", [b"", b"GGUF", b"PK\x03\x04" + bytes(1000), b"GGUF" + b"\xff" * 100, b"GGUF\x03\0\0\0" + b"\xff" * 500]
)
def test_what_is_no_gguf_file_is_refused(tmp_path, data):
    (tmp_path / "m.gguf").write_bytes(data)
    assert "is not a whole GGUF file" in refused(tmp_path / "m.gguf", tmp_path)


def write_with(gguf, architecture="llama", **more):
    """A file with another architecture's name."""
    tiny_gguf.write(gguf, "llama", Kind.Q8_0, **more)
    data = gguf.read_bytes()
    gguf.write_bytes(data.replace(b"llama", architecture.encode()))


def test_an_unknown_architecture_is_refused_by_name(tmp_path):
    write_with(tmp_path / "m.gguf", "mamba")
    assert refused(tmp_path / "m.gguf", tmp_path) == (
        "m.gguf: GGUF architecture 'mamba' is not supported; `llama` and `qwen2` are"
    )


def test_an_unsupported_quantisation_is_refused_by_name(tmp_path):
    from gguf import GGUFWriter

    real = GGUFWriter.add_tensor

    def as_iq(self, name, tensor, **more):
        if name.endswith("ffn_up.weight"):
            tensor, more = np.zeros((tiny_gguf.INNER, 136), np.uint8), {"raw_dtype": Kind.IQ4_XS}
        return real(self, name, tensor, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GGUFWriter, "add_tensor", as_iq)
        tiny_gguf.write(tmp_path / "m.gguf", "llama", Kind.Q8_0)
    text = refused(tmp_path / "m.gguf", tmp_path)
    assert text.startswith("m.gguf: GGUF quantisation IQ4_XS is not supported; F32, F16, BF16, Q4_0") and "Q6_K" in text


def test_missing_tensor_is_noticed_before_loading(tmp_path):
    drop = {"blk.1.ffn_up.weight"}
    tiny_gguf.write(tmp_path / "m.gguf", change=lambda name, value: None if name in drop else value)
    assert "m.gguf does not hold a whole model" in refused(tmp_path / "m.gguf", tmp_path)


def test_a_missing_key_is_named(tmp_path):
    gguf = tmp_path / "m.gguf"
    tiny_gguf.write(gguf)
    gguf.write_bytes(gguf.read_bytes().replace(b"llama.block_count", b"llama.block_cound"))
    assert refused(gguf, tmp_path) == "m.gguf: the GGUF file has no llama.block_count"


def test_values_too_large_for_fp16_are_refused(tmp_path):
    def huge(name, value):
        return value * 1e6 if name == "blk.0.ffn_norm.weight" else value

    tiny_gguf.write(tmp_path / "m.gguf", "llama", Kind.Q8_0, change=huge)
    with pytest.raises(ModelError, match=r"blk\.0\.ffn_norm\.weight has values that fp16 cannot hold"):
        convert(tmp_path / "m.gguf", tmp_path / "model")


def test_too_little_disk_is_reported_before_writing(tmp_path, monkeypatch):
    tiny_gguf.write(tmp_path / "m.gguf")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(gguf_import.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    with pytest.raises(ModelError, match=r"needs 0\.0 GB; .* has 0\.0 GB free"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "models", "m", "keep", quiet)


def test_disk_that_fills_up_leaves_nothing(tmp_path):
    import resource
    import signal

    tiny_gguf.write(tmp_path / "m.gguf", kind=Kind.F16)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, old[1]))
        with pytest.raises(ModelError, match="cannot write the model under"):
            import_gguf(tmp_path / "m.gguf", tmp_path / "models", "m", "keep", quiet)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in (tmp_path / "models").iterdir()] == [".lock"]


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16])
def test_padded_embedding_is_imported_whole(tmp_path, kind):
    def pad(name, value):
        wide = name in ("token_embd.weight", "output.weight")
        return np.concatenate([value, value[:7]]) if wide else value

    tiny_gguf.write(tmp_path / "m.gguf", "qwen2", kind, change=pad)
    convert(tmp_path / "m.gguf", tmp_path / "model")
    found = dense_weights(tmp_path / "model")["lm_head.weight"]
    assert (found[-7:] == found[:7]).all()


def test_estimated_size_is_the_size_on_disk(tmp_path):
    for kind, quantize in (
        (Kind.F16, "keep"),
        (Kind.Q4_K, "keep"),
        (Kind.Q6_K, "keep"),
        (Kind.F16, "4"),
        (Kind.Q4_0, "none"),
    ):
        tiny_gguf.write(tmp_path / "m.gguf", kind=kind)
        convert(tmp_path / "m.gguf", tmp_path / "model", quantize)
        size = sum(path.stat().st_size for path in (tmp_path / "model").iterdir())
        assert 0 <= size_needed(tmp_path / "m.gguf", quantize) - size <= 33 << 20
        shutil.rmtree(tmp_path / "model")


# ---------------------------------------------------------------------------------------------------- names and places
def test_an_imported_model_is_known_by_its_name(tmp_path):
    tiny_gguf.write(tmp_path / "m.gguf", "qwen2", Kind.Q4_0)
    made = import_gguf(tmp_path / "m.gguf", tmp_path / "models", "my-qwen", "keep", quiet)
    assert ensure_model("my-qwen", tmp_path / "models") == made == tmp_path / "models" / "my-qwen"
    assert load("my-qwen", tmp_path / "models").name == "my-qwen"
    with pytest.raises(ModelError, match="there is already a model my-qwen"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "models", "my-qwen", "keep", quiet)


@pytest.mark.parametrize(
    "name", ["", "..", "../x", "a/b", "smollm2-135m", "drafts", "converted", "-x", "a\nb", "x" * 200]
)
def test_a_bad_name_is_refused(tmp_path, name):
    tiny_gguf.write(tmp_path / "m.gguf")
    with pytest.raises(ModelError, match="cannot be called"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "models", name, "keep", quiet)


def test_changed_source_file_is_converted_again(tmp_path):
    gguf, said = tmp_path / "Some Model.Q8_0.gguf", []
    tiny_gguf.write(gguf, kind=Kind.Q8_0)
    first = ensure_model(str(gguf), tmp_path / "models", said.append)
    assert ensure_model(str(gguf), tmp_path / "models", said.append) == first and len(said) == 1
    assert first.parent == tmp_path / "models" / "converted" and first.name.startswith("some-model.q8_0-")
    tiny_gguf.write(gguf, kind=Kind.Q4_0)
    assert ensure_converted(gguf, tmp_path / "models", said.append) != first and len(said) == 2


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("/a/b/Qwen2.5 0.5B.Q4_K_M.gguf", "qwen2.5-0.5b.q4_k_m"),
        ("ollama:llama3.2:1b", "llama3.2-1b"),
        ("ollama:someone/model:latest", "model"),
        ("lmstudio:pub/repo/File-Q8.gguf", "file-q8"),
        ("....gguf", "model"),
    ],
)
def test_a_name_is_made_of_the_files(text, name):
    assert suggested_name(text) == name


def test_gguf_file_is_recognised_by_its_magic(tmp_path):
    for name, data, expected in (("sha256-1", b"GGUF..", True), ("a.gguf", b"xx", True), ("a.bin", b"xx", False)):
        (tmp_path / name).write_bytes(data)
        assert is_gguf(tmp_path / name) is expected
    assert not is_gguf(tmp_path / "none") and not is_gguf(tmp_path)
