"""Records as the inference daemon makes them, one or thousands, for outboxes and stores."""

import sqlite3
import time

from specl.shared.answer_stats import AnswerStats
from specl.shared.messaging.codec import encode
from specl.shared.messaging.messages import Generation, TopK
from specl.shared.messaging.outbox import Outbox


def generation(id: str, text: str = "some words", size: int = 0, created_at: float | None = None) -> Generation:
    """A record as inference makes them; `size` output tokens carry a top-32 (about 50 KB at 200)."""
    top = TopK(32, b"\1" * (size * 128), b"\0" * (size * 64), b"\0" * (size * 2), b"\0" * (size * 2)) if size else None
    return Generation(
        id=id, conversation_id=id, created_at=created_at or time.time(), mode="detailed",
        messages=[{"role": "user", "content": text}], prompt=f"<user>{text}", prompt_tokens=b"\1\0\0\0" * 8,
        output=f"answer to {text}", output_tokens=b"\2\0\0\0" * max(size, 8), finish_reason="length",
        sampling={"temperature": 0.0}, drafted=20, accepted=10, model_drafted=20, model_accepted=5, rounds=8,
        acceptance_rate=0.25, tokens_per_second=10.0, ttft_ms=5.0, target_model="t", draft_model="d",
        target_fingerprint="fake-target", draft_fingerprint="fake-draft", adapter_id="", sources=bytes(max(size, 8)),
        stats=AnswerStats(), disagreements=[], top_k=top,
    )  # fmt: skip


def fill(outbox: Outbox, ids: list[str], size: int = 0, text: str = "some words") -> int:
    """Put records straight into an outbox in large transactions; bytes put. The accepted way costs a sync each."""
    total = 0
    db = sqlite3.connect(outbox.path)
    rows = []
    for id in ids:
        body = encode(generation(id, text, size))
        total += len(body)
        rows.append((id, "Generation", body))
    with db:
        db.executemany("INSERT INTO outbox (id, kind, body) VALUES (?, ?, ?)", rows)
    db.close()
    return total
