"""The queries of readers of the store: figures for `status`, rows for the trainer, runs and adapters,
everything for an export.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import sqlalchemy as sa

from specl.shared.messaging.codes import RunTrigger, RunVerdict
from specl.shared.messaging.daemon_status import LastRun, StoreSummary
from specl.shared.messaging.messages import Disagreement
from specl.shared.store.failure import IS_FAILURE_SQL, score_sql
from specl.shared.store.file import StoreFile, parts
from specl.shared.store.rows import (
    GenerationSummary,
    Row,
    StoredGeneration,
    exported,
    stored_disagreement,
    stored_generation,
)
from specl.shared.store.schema import disagreements, generations, quarantine, training_runs

ROLLING = 50  # newest generations that the rolling figures of `status` are made of
PAGE = 200  # generations read at once by `each`

g = generations.c


class Questions(StoreFile):
    """The readers' part of the store."""

    # ------------------------------------------------------------------------------------------------ figures
    def summary(self, rolling: int = ROLLING) -> StoreSummary:
        """Everything `status` shows of the store; rolling figures are of the newest `rolling`
        generations.
        """
        drafted, accepted = (
            sa.func.sum(g.model_drafted).label("drafted"),
            sa.func.sum(g.model_accepted).label("accepted"),
        )
        (totals,) = self._all(sa.select(sa.func.count().label("n"), drafted, accepted))
        by_adapter = self._all(sa.select(g.adapter_id, drafted, accepted).group_by(g.adapter_id))
        recent = self._all(
            sa.select(g.model_drafted, g.model_accepted, g.tokens_per_second).order_by(g.n.desc()).limit(rolling)
        )
        speeds = [row["tokens_per_second"] for row in recent if row["tokens_per_second"] > 0]  # imports have none
        return StoreSummary(
            generations=totals["n"],
            disagreements=self._count(disagreements),
            failures=self._number(f"SELECT count(*) FROM generations WHERE {IS_FAILURE_SQL}"),
            pending_failures=self.pending_failures(),
            quarantined=self._count(quarantine),
            lifetime_acceptance=_rate(totals["accepted"], totals["drafted"]),
            rolling_acceptance=_rate(
                sum(row["model_accepted"] for row in recent), sum(row["model_drafted"] for row in recent)
            ),
            rolling_tokens_per_second=sum(speeds) / len(speeds) if speeds else None,
            by_adapter={row["adapter_id"] or "none": _rate(row["accepted"], row["drafted"]) for row in by_adapter},
            last_verdict=self._last_run(),
        )

    def _last_run(self) -> LastRun | None:
        """The newest run that is not a re-evaluation: those are shown with the collapse check."""
        t = training_runs.c
        judged = sa.select(training_runs).where(t.trigger != RunTrigger.REEVALUATION)
        for run in self._all(judged.order_by(t.n.desc()).limit(1)):
            return LastRun(
                created=run["created"],
                verdict=RunVerdict(run["verdict"]),
                reason=run["reason"],
                adapter_id=run["adapter_id"],
                parent_id=run["parent_id"],
                examples=run["examples"],
                steps=run["steps"],
                loss_last=run["loss_last"],
            )
        return None

    def pending_failures(self) -> int:
        """The number of failures stored since the last training run that used any."""
        # the + keeps SQLite from using the index of n: it then finds failures by the index of scores
        return self._number(
            f"SELECT count(*) FROM generations WHERE {IS_FAILURE_SQL} AND +n > coalesce((SELECT max(+n) "
            "FROM generations WHERE id IN (SELECT last_generation FROM training_runs)), 0)"
        )

    def adapter_runs(self) -> list[Row]:
        """The rows of the view `adapter_history`, newest first."""
        return self.sql("SELECT * FROM adapter_history")

    def _count(self, table: sa.Table) -> int:
        return self._number(f"SELECT count(*) FROM {table.name}")

    def _number(self, query: str) -> int:
        (row,) = self.sql(query)
        return int(next(iter(row.values())))

    # ------------------------------------------------------------------------------------------------ generations
    def generation(self, id: str) -> StoredGeneration | None:
        """One generation, by its id or, where none has just that, an unambiguous prefix of it."""
        rows = self._all(sa.select(generations).where(g.id == id))
        if not rows:
            rows = self._all(sa.select(generations).where(g.id.startswith(id, autoescape=True)).limit(2))
        return self._with_disagreements(rows)[0] if len(rows) == 1 else None

    def generations(self, ids: Sequence[str]) -> list[StoredGeneration]:
        """These generations with all they have, in the order of `ids`; those that are gone
        meanwhile are left out.
        """
        by_id: dict[str, StoredGeneration] = {}
        for part in parts(ids):
            rows = self._all(sa.select(generations).where(g.id.in_(part)))
            by_id |= {generation.id: generation for generation in self._with_disagreements(rows)}
        return [by_id[id] for id in ids if id in by_id]

    def each(self) -> Iterator[StoredGeneration]:
        """Every generation, oldest first, read in pages."""
        last = 0
        while rows := self._all(sa.select(generations).where(g.n > last).order_by(g.n).limit(PAGE)):
            yield from self._with_disagreements(rows)
            last = rows[-1]["n"]

    def export(self) -> Iterator[dict[str, Any]]:
        """Every generation in the documented JSONL shape, oldest first."""
        return map(exported, self.each())

    def _with_disagreements(self, rows: list[Row]) -> list[StoredGeneration]:
        by_generation: dict[str, list[Disagreement]] = {row["id"]: [] for row in rows}
        for part in parts(list(by_generation)):
            query = sa.select(disagreements).where(disagreements.c.generation_id.in_(part))
            for row in self._all(query.order_by(disagreements.c.n)):
                by_generation[row["generation_id"]].append(stored_disagreement(row))
        return [stored_generation(row, by_generation[row["id"]]) for row in rows]

    def missing(self, ids: Sequence[str]) -> list[str]:
        """The `ids` of which no generation is stored (any more)."""
        stored: set[str] = set()
        for part in parts(ids):
            stored.update(row["id"] for row in self._all(sa.select(g.id).where(g.id.in_(part))))
        return [id for id in ids if id not in stored]

    # ------------------------------------------------------------------------------------------------ for the trainer
    def generation_summaries(self, limit: int) -> list[GenerationSummary]:
        """The newest `limit` generations that have the target's top-k, newest first, without texts,
        tokens and top-k.
        """
        score: sa.Label[float | None] = sa.literal_column(score_sql()).label("score")
        query = (
            sa.select(g.id, g.conversation_id, g.created_at, score, g.output_count, g.target_fingerprint)
            .where(g.top_k.is_not(None))  # a small column: top_ids is a blob, and SQLite would read it whole
            .order_by(g.n.desc())
            .limit(limit)
        )
        return [GenerationSummary(**row) for row in self._all(query)]

    def tokens(self, ids: Sequence[str]) -> Iterator[bytes]:
        """Prompt and answer of each of these as one array, u32 little-endian; in no order."""
        for part in parts(ids):
            for row in self._all(sa.select(g.prompt_tokens, g.output_tokens).where(g.id.in_(part))):
                yield row["prompt_tokens"] + row["output_tokens"]

    def unscored(self, limit: int, target: str = "") -> list[StoredGeneration]:
        """The newest generations without a score: parked, so that only teacher-forced agreement can
        tell.

        They come without their disagreements. `target` is the fingerprint of the only target whose
        generations count.
        """
        query = sa.select(generations).where(g.acceptance_rate.is_(None), g.agreement.is_(None), g.top_ids.is_not(None))
        if target:
            query = query.where(g.target_fingerprint == target)
        return [stored_generation(row, []) for row in self._all(query.order_by(g.n.desc()).limit(limit))]


def _rate(part: float | None, whole: float | None) -> float | None:
    return round(part / whole, 4) if part is not None and whole else None
