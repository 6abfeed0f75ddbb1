"""Hostile and damaged GGUF files: each is one sentence, soon, whatever their numbers say."""

import struct

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter

from specl.shared.errors import ModelError
from specl.shared.models import gguf_config, gguf_header
from specl.shared.models.gguf_file import convert, size_needed
from specl.shared.models.gguf_header import check_header
from tests.shared.models import tiny_gguf

ARRAY, TEXT, BYTE = 9, 8, 0


def text(value):
    return struct.pack("<Q", len(value)) + value


def array(kind, count):
    return struct.pack("<IIQ", ARRAY, kind, count)


def header(*values, tensors=0):
    """A file of nothing but keys with these values."""
    keys = b"".join(text(b"k%d" % number) + value for number, value in enumerate(values))
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, len(values)) + keys


HOSTILE = {
    "array of 2^60 bytes": header(array(BYTE, 1 << 60)),
    "array of 2^60 texts": header(array(TEXT, 1 << 60)),
    "text of 2^63 bytes": header(struct.pack("<IQ", TEXT, 1 << 63)),
    "nested arrays": header(array(ARRAY, 1) + struct.pack("<IQ", ARRAY, 1) * 3000),
    "2^60 keys": b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60),
    "2^60 tensors": header(tensors=1 << 60),
    "tensor of 2^31 dimensions": header(tensors=1) + text(b"t") + struct.pack("<I", 1 << 31) + bytes(100),
    "tensor of 2^63 rows": header(tensors=1) + text(b"t") + struct.pack("<IQQIQ", 2, 1 << 63, 4, 0, 0) + bytes(100),
    "tensor without columns": header(tensors=1) + text(b"t") + struct.pack("<IQQIQ", 2, 0, 4, 0, 0) + bytes(100),
    "token of 400,000 letters": header(array(TEXT, 1) + text(b"a" * 400_000)),
    "unknown type": header(struct.pack("<I", 77)),
    "empty file": b"",
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_hostile_header_reaches_no_other_reader(tmp_path, monkeypatch, data):
    monkeypatch.setattr(gguf_config, "GGUFReader", None)  # it would believe each number
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(ModelError, match="is not a whole GGUF file"):
        convert(tmp_path / "m.gguf", tmp_path / "model")


def test_lists_have_a_bound_together(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_header, "MAX_MEMBERS", 9)
    for count, fits in ((4, True), (5, False)):
        (tmp_path / "m.gguf").write_bytes(header(*[array(BYTE, count) + bytes(count)] * 2))
        if fits:
            check_header(tmp_path / "m.gguf")
        else:
            with pytest.raises(ModelError):
                check_header(tmp_path / "m.gguf")


def test_other_byte_order_is_walked(tmp_path):
    data = b"GGUF" + struct.pack(">IQQ", 3, 0, 1) + struct.pack(">Q", 1) + b"k" + struct.pack(">II", 4, 7)
    (tmp_path / "m.gguf").write_bytes(data)
    check_header(tmp_path / "m.gguf")


LLAMA = "llama."
WRONG = {
    "no heads": ("add_head_count", lambda self, value: self.add_uint32(LLAMA + "attention.head_count", 0)),
    "a list of heads": ("add_head_count", lambda self, value: self.add_array(LLAMA + "attention.head_count", [4, 4])),
    "too many layers": ("add_block_count", lambda self, value: self.add_uint32(LLAMA + "block_count", 1 << 31)),
    "text as epsilon": (
        "add_layer_norm_rms_eps",
        lambda self, value: self.add_string(LLAMA + "attention.layer_norm_rms_epsilon", "x"),
    ),
    "text as theta": ("add_rope_freq_base", lambda self, value: self.add_string(LLAMA + "rope.freq_base", "x")),
    "end beyond the tokens": (
        "add_eos_token_id",
        lambda self, id: self.add_uint32("tokenizer.ggml.eos_token_id", 10**6),
    ),
    "end as a text": ("add_eos_token_id", lambda self, id: self.add_string("tokenizer.ggml.eos_token_id", "x")),
    "beginning beyond the tokens": (
        "add_bos_token_id",
        lambda self, id: self.add_uint32("tokenizer.ggml.bos_token_id", 10**6),
    ),
    "too few token types": (
        "add_token_types",
        lambda self, kinds: self.add_array("tokenizer.ggml.token_type", list(kinds)[:5]),
    ),
    "merges of one part": ("add_token_merges", lambda self, merges: self.add_array("tokenizer.ggml.merges", ["ab"])),
    "merges of unknown tokens": (
        "add_token_merges",
        lambda self, merges: self.add_array("tokenizer.ggml.merges", ["ab cdefgh"]),
    ),
    "a number as template": ("add_chat_template", lambda self, value: self.add_uint32("tokenizer.chat_template", 3)),
    "a list as architecture": (
        "add_architecture",
        lambda self: self.add_array("general.architecture", ["llama"]),
    ),
    "split into text": ("add_context_length", lambda self, value: self.add_string("split.count", "many")),
    "alignment 3": ("add_context_length", lambda self, value: self.add_uint32("general.alignment", 3)),
}


@pytest.mark.parametrize(("method", "wrong"), WRONG.values(), ids=WRONG)
def test_wrong_values_are_one_sentence(tmp_path, monkeypatch, method, wrong):
    monkeypatch.setattr(GGUFWriter, method, wrong)
    tiny_gguf.write(tmp_path / "m.gguf", "llama", Kind.Q8_0)
    with pytest.raises(ModelError, match=r"m\.gguf") as caught:
        size_needed(tmp_path / "m.gguf")
        convert(tmp_path / "m.gguf", tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_flipped_bytes_of_a_header_never_escape(tmp_path):
    gguf = tmp_path / "m.gguf"
    tiny_gguf.write(gguf, "llama", Kind.Q8_0)
    whole = gguf.read_bytes()
    rng = np.random.default_rng(7)
    for _ in range(60):
        data = bytearray(whole)
        for position in rng.integers(4, 9000, rng.integers(1, 9)):
            data[position] = rng.choice([0, 1, 8, 9, 255, rng.integers(256)])
        gguf.write_bytes(data)
        try:
            size_needed(gguf)
            convert(gguf, tmp_path / "model")
        except ModelError as error:
            assert "\n" not in str(error)
