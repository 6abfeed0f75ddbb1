"""The tokenizer inside a GGUF file, written as tokenizer.json with its chat template. Byte-level BPE only."""

import json
from pathlib import Path

from gguf import GGUFReader
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from specl.shared.errors import ModelError

CONTROL = 3  # llama.cpp's LLAMA_TOKEN_TYPE_CONTROL


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    if name in ("default", "gpt-2"):
        return byte_level
    raise ModelError(f"GGUF pre-tokenizer {name!r} is not supported")


def write_tokenizer(reader: GGUFReader, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into `folder`. Raises ModelError for another kind of tokenizer."""

    def get(name: str, default: object = None) -> object:
        field = reader.fields.get(f"tokenizer.{name}")
        return field.contents() if field else default

    if get("ggml.model") != "gpt2":
        raise ModelError(f"GGUF tokenizer {get('ggml.model')!r} is not supported; byte-level BPE is")
    tokens, types = get("ggml.tokens"), get("ggml.token_type")
    merges = [tuple(line.split(" ")) for line in get("ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = _pre_tokenizer(get("ggml.pre", "default"))
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokens[get("ggml.eos_token_id")],
        "pad_token": tokens[get("ggml.padding_token_id", get("ggml.eos_token_id"))],
        "chat_template": get("chat_template"),
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
