"""The tables of the store as today's code reads and writes them.

A file gets them from the steps in `migrations`, never from here: a test compares the two.
"""

from typing import Any

import sqlalchemy as sa

from specl.shared.messaging.messages import Activation, Adapter, Evaluation, Generation, TrainingRun

metadata = sa.MetaData()
_Text, _Int, _Real, _Blob = sa.Text, sa.Integer, sa.Float, sa.LargeBinary


def _column(name: str, kind: Any, nullable: bool = False, **options: Any) -> sa.Column[Any]:
    return sa.Column(name, kind, nullable=nullable, **options)


generations = sa.Table(
    "generations",
    metadata,
    sa.Column("n", _Int, primary_key=True),
    _column("id", _Text, unique=True),
    _column("conversation_id", _Text, index=True),
    _column("created_at", _Real, index=True),
    _column("created", _Text),
    _column("mode", _Text),
    _column("prompt", _Text),
    _column("output", _Text),
    _column("messages", _Text),
    _column("acceptance_rate", _Real, nullable=True),
    _column("agreement", _Real, nullable=True),
    _column("drafted", _Int),
    _column("accepted", _Int),
    _column("model_drafted", _Int),
    _column("model_accepted", _Int),
    _column("rounds", _Int),
    _column("output_count", _Int),
    _column("tokens_per_second", _Real),
    _column("ttft_ms", _Real),
    _column("finish_reason", _Text),
    _column("adapter_id", _Text),
    _column("target_model", _Text),
    _column("draft_model", _Text),
    _column("target_fingerprint", _Text),
    _column("draft_fingerprint", _Text),
    _column("sampling", _Text),
    _column("temperature", _Real),
    _column("stats", _Text),
    _column("prompt_tokens", _Blob),
    _column("output_tokens", _Blob),
    _column("sources", _Blob),
    _column("top_k", _Int, nullable=True),
    _column("top_ids", _Blob, nullable=True),
    _column("top_logprobs", _Blob, nullable=True),
    _column("tail", _Blob, nullable=True),
    _column("entropy", _Blob, nullable=True),
)
sa.Index(
    "ix_generations_drafting",
    generations.c.adapter_id,
    generations.c.model_drafted,
    generations.c.model_accepted,
)
sa.Index("ix_generations_score", generations.c.acceptance_rate, generations.c.agreement)
disagreements = sa.Table(
    "disagreements",
    metadata,
    sa.Column("n", _Int, primary_key=True),
    _column("generation_id", _Text, index=True),
    _column("position", _Int),
    _column("draft_token", _Int),
    _column("target_token", _Int),
    _column("draft_text", _Text),
    _column("target_text", _Text),
    _column("draft_confidence", _Real),
    _column("target_confidence", _Real),
    _column("drafter", _Text),
    _column("depth", _Int),
    _column("context_tokens", _Text),
)
adapters = sa.Table(
    "adapters",
    metadata,
    sa.Column("n", _Int, primary_key=True),
    _column("id", _Text, unique=True),
    _column("created_at", _Real),
    _column("created", _Text),
    _column("kind", _Text),
    _column("parent_id", _Text),
    _column("training_run_id", _Text),
    _column("path", _Text),
    _column("sha256", _Text),
    _column("base_fingerprint", _Text),
    _column("manifest", _Text),
)
training_runs = sa.Table(
    "training_runs",
    metadata,
    sa.Column("n", _Int, primary_key=True),
    _column("id", _Text, unique=True),
    _column("created_at", _Real),
    _column("created", _Text),
    _column("finished_at", _Real),
    _column("cause", _Text),
    _column("verdict", _Text),
    _column("reason", _Text),
    _column("parent_id", _Text),
    _column("adapter_id", _Text),
    _column("examples", _Int),
    _column("steps", _Int),
    _column("tokens", _Int),
    _column("loss_first", _Real, nullable=True),
    _column("loss_last", _Real, nullable=True),
    _column("last_generation", _Text),
    _column("settings", _Text),
    _column("trigger", _Text, server_default="other"),
)
evaluations = sa.Table(
    "evaluations",
    metadata,
    sa.Column("n", _Int, primary_key=True),
    _column("id", _Text, unique=True),
    _column("created_at", _Real),
    _column("created", _Text),
    _column("subject", _Text),
    _column("generation_id", _Text),
    _column("training_run_id", _Text),
    _column("adapter_id", _Text),
    _column("generations", _Int),
    _column("positions", _Int),
    _column("agreement", _Real),
    _column("by_depth", _Text),
    _column("details", _Text),
)
activations = sa.Table(
    "activations",
    metadata,
    sa.Column("n", _Int, primary_key=True),
    _column("id", _Text, unique=True),
    _column("created_at", _Real),
    _column("created", _Text),
    _column("event", _Text),
    _column("adapter_id", _Text),
    _column("previous_id", _Text),
    _column("note", _Text),
    _column("details", _Text),
    _column("reason", _Text, server_default="other"),
)
quarantine = sa.Table(
    "quarantine",
    metadata,
    sa.Column("n", _Int, primary_key=True),
    _column("id", _Text, unique=True),
    _column("kind", _Text),
    _column("created", _Text),
    _column("reason", _Text),
    _column("raw", _Blob),
)
settings = sa.Table("settings", metadata, sa.Column("name", _Text, primary_key=True), _column("value", _Text))
TABLES: dict[type, sa.Table] = {
    Generation: generations,
    Activation: activations,
    TrainingRun: training_runs,
    Evaluation: evaluations,
    Adapter: adapters,
}
