"""What a failure is: a generation whose score is below a threshold. The one definition, in SQL and
in Python.

The score is the acceptance rate; where the model drafter drafted too little to have one it is the
teacher-forced agreement, and where that is not known yet either there is none, and no failure. The
threshold is `speculative.acceptance_threshold`; the collector writes it into the table `settings`,
so that views and `sqlite3` alone agree with the program.
"""

THRESHOLD = "acceptance_threshold"  # its name in the table `settings`


def score_sql(alias: str = "") -> str:
    """The score of a row of `generations`, for tables under an alias ("g.") or none."""
    return f"coalesce({alias}acceptance_rate, {alias}agreement)"


# the view `failures` has this text in its WHERE clause; counting by the view would read whole rows,
# this reads an index alone
IS_FAILURE_SQL = f"{score_sql()} < (SELECT CAST(value AS REAL) FROM settings WHERE name = '{THRESHOLD}')"


def is_failure(score: float | None, threshold: float) -> bool:
    """Whether a generation with this score is a failure. A score that is not known (None) is none
    yet.
    """
    return score is not None and score < threshold
