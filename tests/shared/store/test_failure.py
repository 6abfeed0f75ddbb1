"""One definition of a failure: the SQL of the view, the SQL of the counts and the Python predicate agree on every row."""

import itertools

import pytest

from specl.shared.store import Store
from specl.shared.store.failure import IS_FAILURE_SQL, is_failure, score_sql
from specl.shared.store.migrations import MIGRATIONS
from tests.fakes import make_evaluation, make_generation, to_row

SCORES = (None, 0.0, 0.1, 0.25, 0.3, 0.5, 1.0)


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.3, 0.5, 1.0])
def test_view_count_and_predicate_agree(threshold, tmp_path):
    pairs = list(itertools.product(SCORES, SCORES))
    store = Store(tmp_path / "store.db")
    store.set_threshold(threshold)
    for number, (acceptance, agreement) in enumerate(pairs):
        record = make_generation(f"{number:02}", acceptance_rate=acceptance)
        store.add_rows([to_row(record)])
        if agreement is not None:
            scored = make_evaluation(f"e{number}", subject="generation", generation_id=record.id, agreement=agreement)
            store.add_rows([to_row(scored)])
    expected = {
        f"{number:02}"
        for number, (acceptance, agreement) in enumerate(pairs)
        if is_failure(agreement if acceptance is None else acceptance, threshold)
    }
    assert {row["id"] for row in store.sql("SELECT id FROM failures")} == expected
    assert store.summary().failures == store.pending_failures() == len(expected)
    assert {row.id for row in store.generation_summaries(100) if is_failure(row.score, threshold)} == expected
    store.close()


def test_the_frozen_view_has_the_definition():
    (view,) = [sql for step in MIGRATIONS for sql in step if sql.startswith("CREATE VIEW failures")]
    assert f"WHERE {IS_FAILURE_SQL}\n" in view


def test_the_score_reads_a_joined_table():
    assert score_sql("g.") == "coalesce(g.acceptance_rate, g.agreement)"
