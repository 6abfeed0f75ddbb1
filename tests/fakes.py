"""Small real things that tests are made of: a byte-level tokenizer, records of every kind, a fresh interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from specl.shared.answer_stats import AnswerStats
from specl.shared.messaging.codec import encode
from specl.shared.messaging.messages import (
    Activation,
    Adapter,
    Disagreement,
    Envelope,
    Evaluation,
    Generation,
    TopK,
    TrainingRun,
)

ROOT = Path(__file__).parent.parent
CHAT_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
END = 298
MERGES = ("th", "he", "in", "er", "an", "re", "on", "at", "en", "es", "or", "te", "st", "nd", "ng", "is", "it", "ou", "ar", "le")  # fmt: skip


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter, for what must not happen in this process: dying, importing."""
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer of 299 tokens with a chat template, as transformers loads it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *MERGES]
    pieces += [f"<|unused-{i}|>" for i in range(END - 1 - len(pieces))] + ["<|start|>", "<|end|>"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[(m[0], m[1]) for m in MERGES]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [piece for piece in pieces if piece.startswith("<|")]
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in specials])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "pad_token": "<|end|>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def tokens_blob(tokens) -> bytes:
    return np.array(tokens, "<u4").tobytes()


def make_disagreement(position: int = 3, **changes) -> Disagreement:
    values = {
        "position": position,
        "draft_token": 11,
        "target_token": 12,
        "draft_text": " cat",
        "target_text": " dog",
        "draft_confidence": 0.75,
        "target_confidence": 0.5,
        "drafter": "model",
        "depth": 2,
        "context_tokens": [7, 8, 9],
    }
    return Disagreement(**(values | changes))


def make_top_k(rows: int, k: int = 4) -> TopK:
    ids = np.tile(np.arange(k, dtype="<u4"), (rows, 1))
    logprobs = np.log(np.full((rows, k), 0.2, "<f4")).astype("<f2")
    return TopK(
        k, ids.tobytes(), logprobs.tobytes(), np.full(rows, 0.2, "<f2").tobytes(), np.full(rows, 1.0, "<f2").tobytes()
    )


def make_generation(id: str, **changes) -> Generation:
    output = changes.pop("output_ids", [1, 2, 3, 4, 5])
    values = {
        "id": id,
        "conversation_id": f"talk-{id}",
        "created_at": 1_790_000_000.0,
        "mode": "detailed",
        "messages": [{"role": "user", "content": f"question {id}"}],
        "prompt": f"<user>question {id}",
        "prompt_tokens": tokens_blob([5, 6, 7]),
        "output": f"answer {id}",
        "output_tokens": tokens_blob(output),
        "finish_reason": "stop",
        "sampling": {"temperature": 0.0, "top_p": 1.0},
        "drafted": 20,
        "accepted": 8,
        "model_drafted": 20,
        "model_accepted": 8,
        "rounds": 5,
        "acceptance_rate": 0.4,
        "tokens_per_second": 12.5,
        "ttft_ms": 80.0,
        "target_model": "target",
        "draft_model": "draft",
        "target_fingerprint": "t0",
        "draft_fingerprint": "d0",
        "adapter_id": "",
        "sources": bytes(len(output)),
        "stats": AnswerStats(rounds=5),
        "disagreements": [make_disagreement()],
        "top_k": make_top_k(len(output)),
    }
    return Generation(**(values | changes))


def make_activation(id: str, **changes) -> Activation:
    values = {
        "id": id,
        "created_at": 1_790_000_100.0,
        "event": "activated",
        "adapter_id": "000001",
        "previous_id": "",
        "reason": "announced",
        "note": "announced",
        "details": {"form": "fused"},
    }
    return Activation(**(values | changes))


def make_training_run(id: str, **changes) -> TrainingRun:
    values = {
        "id": id,
        "created_at": 1_790_000_200.0,
        "finished_at": 1_790_000_300.0,
        "trigger": "failures",
        "cause": "50 failures",
        "verdict": "promoted",
        "reason": "it rose",
        "parent_id": "",
        "adapter_id": "000001",
        "examples": 40,
        "steps": 60,
        "tokens": 9000,
        "loss_first": 2.5,
        "loss_last": 1.25,
        "last_generation": "",
        "settings": {"rank": 8},
    }
    return TrainingRun(**(values | changes))


def make_evaluation(id: str, **changes) -> Evaluation:
    values = {
        "id": id,
        "created_at": 1_790_000_250.0,
        "subject": "heldout",
        "generation_id": "",
        "training_run_id": "run",
        "adapter_id": "000001",
        "generations": 10,
        "positions": 400,
        "agreement": 0.625,
        "by_depth": [0.6, 0.5],
        "details": {},
    }
    return Evaluation(**(values | changes))


def make_adapter_record(id: str, **changes) -> Adapter:
    values = {
        "id": id,
        "created_at": 1_790_000_260.0,
        "kind": "lora",
        "parent_id": "",
        "training_run_id": "run",
        "path": f"adapters/{id}",
        "sha256": "00",
        "base_fingerprint": "d0",
        "manifest": {"rank": 8},
    }
    return Adapter(**(values | changes))


def to_row(record) -> Envelope:
    return Envelope(record.id, type(record).__name__, encode(record))
