"""The tokenizer inside a GGUF file, written as tokenizer.json with its chat template: byte-level
BPE (`gpt2`) and SentencePiece BPE (`llama`), as the original tokenizers of these families do it.

Sources: llama.cpp's llama-vocab.cpp (the pre-tokenizers by name), the tokenizer.json of
the models themselves.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from specl.shared.errors import ModelError
from specl.shared.models.gguf_config import BYTE, CONTROL, UNKNOWN, USER, Header, token_kinds

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{DIGITS}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2, LLAMA3 = _WORDS.replace("{DIGITS}", ""), _WORDS.replace("{DIGITS}", "{1,3}")
_SPLITS = {
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), QWEN2),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), LLAMA3),
}


def _byte_level(header: Header, tokens: Sequence[str]) -> Tokenizer:
    name = header.key("tokenizer.ggml.pre", "default")
    merges = [tuple(line.split(" ")) for line in header.key("tokenizer.ggml.merges")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    # Llama 3 keeps a word that is itself a token, whatever its merges are
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=_SPLITS.get(name) == LLAMA3))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name not in _SPLITS)
    if name in _SPLITS:
        split = pre_tokenizers.Split(Regex(_SPLITS[name]), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        if _SPLITS[name] == QWEN2:
            tokenizer.normalizer = normalizers.NFC()
    elif name == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    elif name in ("default", "gpt-2"):
        tokenizer.pre_tokenizer = byte_level
    else:
        raise ModelError(f"{header.path.name}: GGUF pre-tokenizer {name!r} is not supported")
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(header: Header, tokens: Sequence[str], kinds: Sequence[int]) -> Tokenizer:
    vocabulary = {token: i for i, token in enumerate(tokens)}
    unmergeable = {token for token, kind in zip(tokens, kinds, strict=True) if kind in (UNKNOWN, CONTROL, USER, BYTE)}
    unknown = next((token for token, kind in zip(tokens, kinds, strict=True) if kind == UNKNOWN), None)
    scores = header.key("tokenizer.ggml.scores")
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(tokens, scores, unmergeable),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = bool(header.key("tokenizer.ggml.add_space_prefix", True))
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    return tokenizer


def _merges(tokens: Sequence[str], scores: Sequence[float], unmergeable: set[str]) -> list[tuple[str, str]]:
    """BPE's merges from SentencePiece's scores: every pair of pieces that joins to a third one,
    best result first.
    """
    ids = {token: id for id, token in enumerate(tokens) if token not in unmergeable}
    merges = []
    for piece, id in ids.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                merges.append((-scores[id], ids[left], ids[right], (left, right)))
    return [pair for *_, pair in sorted(merges)]


def _leading(header: Header) -> int | None:
    """The token (BOS) before every text that no chat template wrote, or None. `add_eos_token` would
    end a prompt: not used.
    """
    llama = header.key("tokenizer.ggml.model") == "llama"
    # llama.cpp's default, where the file has no value
    default = llama or _SPLITS.get(header.key("tokenizer.ggml.pre", "default")) == LLAMA3
    if not header.key("tokenizer.ggml.add_bos_token", default):
        return None
    bos: int | None = header.key("tokenizer.ggml.bos_token_id", None)
    return bos


def _chat_template(header: Header) -> str | None:
    template = header.key("tokenizer.chat_template", None)
    if template is not None and not isinstance(template, str):
        raise ModelError(f"{header.path.name}: its chat template is no text")
    return template


def write_tokenizer(header: Header, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into `folder`. Raises ModelError for another
    kind of tokenizer.
    """
    model, tokens = header.key("tokenizer.ggml.model"), header.key("tokenizer.ggml.tokens")
    kinds = token_kinds(header)
    if model == "gpt2":
        tokenizer = _byte_level(header, tokens)
    elif model == "llama":
        tokenizer = _sentence_piece(header, tokens, kinds)
    else:
        raise ModelError(f"{header.path.name}: GGUF tokenizer {model!r} is not supported; `gpt2` and `llama` are")
    for kind, special in ((CONTROL, True), (USER, False)):
        added = [token for token, token_kind in zip(tokens, kinds, strict=True) if token_kind == kind]
        tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token in added])
    if (bos := _leading(header)) is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[tokens[bos], "$A"], pair=[tokens[bos], "$A", "$B"], special_tokens=[(tokens[bos], bos)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    eos = header.key("tokenizer.ggml.eos_token_id")
    bos = header.key("tokenizer.ggml.bos_token_id", None)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokens[eos],
        "pad_token": tokens[header.key("tokenizer.ggml.padding_token_id", eos)],
        **({"bos_token": tokens[bos]} if bos is not None else {}),
        "chat_template": _chat_template(header),
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
