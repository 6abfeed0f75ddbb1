"""What is asked of the store: figures for `status`, rows for the trainer, stories of adapters, everything for an export."""

from collections.abc import Iterator, Sequence
from typing import Any

import sqlalchemy as sa

from specl.shared.messaging.codes import RunTrigger, RunVerdict
from specl.shared.messaging.daemon_status import LastRun, StoreSummary
from specl.shared.store.file import StoreFile
from specl.shared.store.rows import Outline, StoredGeneration, exported
from specl.shared.store.schema import disagreements, generations, training_runs

# what the view `failures` says; counting the view reads whole rows, this an index alone
_IS_FAILURE = "coalesce(acceptance_rate, agreement) < (SELECT CAST(value AS REAL) FROM settings WHERE name = 'acceptance_threshold')"


class Questions(StoreFile):
    """The readers' part of the store."""

    def summary(self, rolling: int = 50) -> StoreSummary:
        """Everything `status` shows of the store."""
        g = generations.c
        (totals,) = self._all(
            sa.select(
                sa.func.count().label("n"),
                sa.func.sum(g.model_drafted).label("d"),
                sa.func.sum(g.model_accepted).label("a"),
            )
        )
        recent = self._all(
            sa.select(g.model_drafted, g.model_accepted, g.tokens_per_second).order_by(g.n.desc()).limit(rolling)
        )
        by_adapter = self._all(
            sa.select(
                g.adapter_id, sa.func.sum(g.model_drafted).label("d"), sa.func.sum(g.model_accepted).label("a")
            ).group_by(g.adapter_id)
        )
        t = training_runs.c  # the adapter monitor has figures of its own for re-evaluations
        judged = sa.select(training_runs).where(t.trigger != RunTrigger.REEVALUATION)
        runs = self._all(judged.order_by(t.n.desc()).limit(1))
        drafted = sum(row["model_drafted"] for row in recent)
        speeds = [row["tokens_per_second"] for row in recent if row["tokens_per_second"] > 0]  # imported ones have none
        return StoreSummary(
            generations=totals["n"],
            disagreements=self._count("disagreements"),
            failures=self.sql(f"SELECT count(*) AS n FROM generations WHERE {_IS_FAILURE}")[0]["n"],
            pending_failures=self.pending_failures(),
            quarantined=self._count("quarantine"),
            lifetime_acceptance=_rate(totals["a"], totals["d"]),
            rolling_acceptance=_rate(sum(row["model_accepted"] for row in recent), drafted),
            rolling_tokens_per_second=sum(speeds) / len(speeds) if speeds else None,
            by_adapter={row["adapter_id"] or "none": _rate(row["a"], row["d"]) for row in by_adapter},
            last_verdict=_verdict(runs[0]) if runs else None,
        )

    def _count(self, name: str) -> int:
        return self._all(sa.select(sa.func.count().label("n")).select_from(sa.text(name)))[0]["n"]

    def adapter_runs(self) -> list[dict[str, Any]]:
        """What `adapter_history` has, newest first."""
        return self.sql("SELECT * FROM adapter_history")

    def pending_failures(self) -> int:
        """Failures stored since the last training run that used any. `+n`: by the index of scores, not row after row."""
        (row,) = self.sql(
            f"SELECT count(*) AS n FROM generations WHERE {_IS_FAILURE} AND +n > coalesce((SELECT max(+n) "
            "FROM generations WHERE id IN (SELECT last_generation FROM training_runs)), 0)"
        )
        return row["n"]

    def generation(self, id: str) -> StoredGeneration | None:
        """One generation, by its id or, where none has just that, an unambiguous beginning of it."""
        rows = self._all(sa.select(generations).where(generations.c.id == id))
        if not rows:
            rows = self._all(sa.select(generations).where(generations.c.id.startswith(id, autoescape=True)).limit(2))
        if len(rows) != 1:
            return None
        return StoredGeneration(rows[0], self._disagreements_of([rows[0]["id"]]).get(rows[0]["id"], []))

    def missing(self, ids: Sequence[str]) -> list[str]:
        """Those of `ids` that are no generation here (any more)."""
        found: set[str] = set()
        for start in range(0, len(ids), 500):
            query = sa.select(generations.c.id).where(generations.c.id.in_(ids[start : start + 500]))
            found.update(row["id"] for row in self._all(query))
        return [id for id in ids if id not in found]

    def _disagreements_of(self, ids: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = {}
        for start in range(0, len(ids), 500):
            query = sa.select(disagreements).where(disagreements.c.generation_id.in_(ids[start : start + 500]))
            for row in self._all(query.order_by(disagreements.c.n)):
                found.setdefault(row["generation_id"], []).append(row)
        return found

    def outlines(self, most: int) -> list[Outline]:
        """The newest `most` generations that have the target's top-k, newest first, without texts, tokens and laws."""
        g = generations.c
        query = (
            sa.select(
                g.id,
                g.conversation_id,
                g.created_at,
                sa.func.coalesce(g.acceptance_rate, g.agreement).label("figure"),
                g.output_count,
                g.target_fingerprint,
            )
            .where(g.top_k.is_not(None))  # not the blob beside it, which would be read for it
            .order_by(g.n.desc())
            .limit(most)
        )
        return [Outline(**row) for row in self._all(query)]

    def whole(self, ids: Sequence[str]) -> list[StoredGeneration]:
        """These generations with all they have, in the order of `ids`; those that are gone meanwhile are left out."""
        found: dict[str, StoredGeneration] = {}
        for start in range(0, len(ids), 500):
            part = ids[start : start + 500]
            rows = self._all(sa.select(generations).where(generations.c.id.in_(part)))
            lines = self._disagreements_of(part)
            found |= {row["id"]: StoredGeneration(row, lines.get(row["id"], [])) for row in rows}
        return [found[id] for id in ids if id in found]

    def tokens(self, ids: Sequence[str]) -> Iterator[bytes]:
        """Prompt and answer of each of these as one array, u32 little-endian; in no order."""
        g = generations.c
        for start in range(0, len(ids), 500):
            query = sa.select(g.prompt_tokens, g.output_tokens).where(g.id.in_(ids[start : start + 500]))
            yield from (row["prompt_tokens"] + row["output_tokens"] for row in self._all(query))

    def unscored(self, limit: int, target: str = "") -> list[StoredGeneration]:
        """Generations with neither figure yet: parked, so that only teacher-forced agreement can tell. `target`: of this one only."""
        query = (
            sa.select(generations)
            .where(
                generations.c.acceptance_rate.is_(None),
                generations.c.agreement.is_(None),
                generations.c.top_ids.is_not(None),
                *([generations.c.target_fingerprint == target] if target else []),
            )
            .order_by(generations.c.n.desc())
            .limit(limit)
        )
        return [StoredGeneration(row, []) for row in self._all(query)]

    def each(self) -> Iterator[StoredGeneration]:
        """Every generation, oldest first, read in small pieces."""
        last = 0
        while rows := self._all(
            sa.select(generations).where(generations.c.n > last).order_by(generations.c.n).limit(200)
        ):
            lines = self._disagreements_of([row["id"] for row in rows])
            for row in rows:
                yield StoredGeneration(row, lines.get(row["id"], []))
            last = rows[-1]["n"]

    def export(self) -> Iterator[dict[str, Any]]:
        """Every generation in the sources' JSONL shape, oldest first."""
        for row in self.each():
            yield exported(row.values, row.disagreements)


def _verdict(run: dict[str, Any]) -> LastRun:
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


def _rate(part: float | None, whole: float | None) -> float | None:
    return round(part / whole, 4) if whole else None
