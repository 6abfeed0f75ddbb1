"""Writes tiny random GGUF files of the Llama and Qwen2 families with llama.cpp's own writer package, and their truth.

The truth is a dict of dense fp32 weights under the hub's names, as the file's blocks say them; nothing of the code under test
is used to make it.
"""

import importlib
import io

import mlx.core as mx
import numpy as np
import sentencepiece
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter, dequantize, quantize
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

WIDTH, INNER, LAYERS, HEADS, KV_HEADS = 256, 512, 2, 4, 2
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{{ eos_token }}"
CORPUS = [
    "The quick brown fox jumps over the lazy dog, again and again.", "Ein schöner Tag; déjà vu! naïve café — 12345 67",
    "def f(x):\n    return x + 1  # it's what they'll do\n\n\n", "we're I'VE don't\t\ttabs\r\nand  spaces   ", "数学と言葉 привет мир 🙂🙂",
] * 4  # fmt: skip
TEXTS = [
    *CORPUS[:5],
    "",
    " ",
    "  lead",
    "trail  ",
    "1234567890",
    "unseen ŵörds & ‰ signs 🚀",
    "a\n\nb\n \nc",
    "<|im_start|>user\nhi<|im_end|>",
]
NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

# the published pre-tokenizers, from the models' own tokenizer.json
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_bpe(kind):
    """A trained reference tokenizer of that pre-tokenizer."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama-bpe"))
    split = pre_tokenizers.Split(Regex({"qwen2": QWEN2, "llama-bpe": LLAMA3}[kind]), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=[], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


def sentence_piece():
    """A trained reference SentencePiece model as Llama 2's: BPE, byte fallback, a space before the text."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=out, vocab_size=340, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        allow_whitespace_only_pieces=True, minloglevel=2,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())


def add_tokenizer(writer, kind):
    """Write the tokenizer of `kind`; how many tokens it has."""
    if kind == "spm":
        reference = sentence_piece()
        count = reference.get_piece_size()
        tokens = [reference.id_to_piece(i) for i in range(count)]
        kinds = [
            UNKNOWN if reference.is_unknown(i) else CONTROL if reference.is_control(i) else BYTE if reference.is_byte(i) else NORMAL
            for i in range(count)
        ]  # fmt: skip
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([reference.get_score(i) for i in range(count)])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
    else:
        reference = byte_bpe(kind)
        import json

        vocabulary = reference.get_vocab(with_added_tokens=True)
        tokens = sorted(vocabulary, key=vocabulary.get)
        kinds = [CONTROL if token in SPECIALS else NORMAL for token in tokens]
        merges = json.loads(reference.to_str())["model"]["merges"]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(kind)
        writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
        writer.add_eos_token_id(vocabulary["<|im_end|>"])
        writer.add_bos_token_id(vocabulary["<|endoftext|>"])
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    return len(tokens)


def permuted(rows, heads):
    """llama.cpp's LlamaModel.permute, as convert_hf_to_gguf.py has it."""
    shape = rows.shape
    return rows.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def unpermuted(rows, heads):
    """The rows back where the hub has them: row 2*i+j of a head goes to j*half+i."""
    head = rows.shape[0] // heads
    out = np.empty_like(rows)
    for h in range(heads):
        for i in range(head // 2):
            for j in range(2):
                out[h * head + j * (head // 2) + i] = rows[h * head + 2 * i + j]
    return out


def k_blocks(rows, columns, kind, rng):
    """Random superblocks: the gguf package has no quantiser for these kinds."""
    size = {Kind.Q4_K: 144, Kind.Q5_K: 176, Kind.Q6_K: 210}[kind]
    blocks = rng.integers(0, 256, (rows, columns // 256, size), dtype=np.uint8)
    scales = rng.uniform(0.0005, 0.002, (rows, columns // 256, 2)).astype(np.float16).view(np.uint8)
    if kind == Kind.Q6_K:
        blocks[..., 192:208] = rng.integers(0, 30, blocks[..., 192:208].shape)
        blocks[..., 208:210] = scales[..., :2]
    else:
        blocks[..., 0:4] = scales
    return blocks.reshape(rows, -1)


def write(
    path,
    family="llama",
    kind=Kind.F16,
    tokenizer=None,
    tied=False,
    seed=0,
    change=lambda name, value: value,
    keys=None,
    head_kind=None,
):
    """Write the file; the truth. `change(name, value)` may alter a tensor or drop it (None); `keys(writer)` adds keys;
    `head_kind` is the embedding's and head's quantisation where it is another one.
    """
    rng = np.random.default_rng(seed)
    writer = GGUFWriter(str(path), family)
    count = add_tokenizer(writer, tokenizer or {"llama": "llama-bpe", "qwen2": "qwen2"}[family])
    writer.add_chat_template(TEMPLATE)
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    if keys:
        keys(writer)
    truth = {}

    def add(name, hub, shape, quantised=None):
        raw = rng.normal(0, 0.05, shape).astype(np.float32)
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name.split(".")[-2]) if family == "llama" else None
        if len(shape) == 1:
            stored, as_kind, dense = (raw := raw + 1), Kind.F32, raw
        else:
            as_kind = quantised or kind
            if heads:
                raw = permuted(raw, heads)
            stored = k_blocks(*shape, as_kind, rng) if as_kind.name.endswith("_K") else quantize(raw, as_kind)
            dense = dequantize(stored, as_kind)
            dense = unpermuted(dense, heads) if heads else dense
        stored = change(name, stored)
        if stored is not None:
            writer.add_tensor(name, stored, raw_dtype=as_kind)
            truth[hub] = np.asarray(dense, np.float32)

    add("token_embd.weight", "model.embed_tokens.weight", (count, WIDTH), head_kind)
    head = WIDTH // HEADS
    for layer in range(LAYERS):
        here, there = f"blk.{layer}.", f"model.layers.{layer}."
        for name, hub, out in (
            ("q", "q_proj", WIDTH),
            ("k", "k_proj", KV_HEADS * head),
            ("v", "v_proj", KV_HEADS * head),
        ):
            add(f"{here}attn_{name}.weight", f"{there}self_attn.{hub}.weight", (out, WIDTH))
            if family == "qwen2":
                add(f"{here}attn_{name}.bias", f"{there}self_attn.{hub}.bias", (out,))
        add(f"{here}attn_output.weight", f"{there}self_attn.o_proj.weight", (WIDTH, WIDTH))
        add(f"{here}ffn_gate.weight", f"{there}mlp.gate_proj.weight", (INNER, WIDTH))
        add(f"{here}ffn_up.weight", f"{there}mlp.up_proj.weight", (INNER, WIDTH))
        add(f"{here}ffn_down.weight", f"{there}mlp.down_proj.weight", (WIDTH, INNER))
        add(f"{here}attn_norm.weight", f"{there}input_layernorm.weight", (WIDTH,))
        add(f"{here}ffn_norm.weight", f"{there}post_attention_layernorm.weight", (WIDTH,))
    add("output_norm.weight", "model.norm.weight", (WIDTH,))
    if not tied:
        add("output.weight", "lm_head.weight", (count, WIDTH), head_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return truth


def reference_model(family, truth, **more):
    """mlx-lm's model of the family around the truth, made without any file."""
    module = importlib.import_module(f"mlx_lm.models.{family}")
    config = {
        "model_type": family, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "intermediate_size": INNER,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "vocab_size": len(truth["model.embed_tokens.weight"]), "max_position_embeddings": 256,
        "tie_word_embeddings": "lm_head.weight" not in truth,
    }  # fmt: skip
    model = module.Model(module.ModelArgs.from_dict(config | more))
    model.load_weights([(name, mx.array(value)) for name, value in truth.items()])
    return model
