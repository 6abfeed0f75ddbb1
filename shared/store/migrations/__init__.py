"""How the file of an older store becomes today's: one step a schema version, all
in one transaction.

A step is the literal SQL of its day. A released step never changes and computes nothing from
today's tables: what a later version needs is a new step. `schema` describes the tables that all
steps together make.
"""

from specl.shared.store.migrations import step_1, step_2, step_3, step_4, step_5

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    step_1.STATEMENTS,
    step_2.STATEMENTS,
    step_3.STATEMENTS,
    step_4.STATEMENTS,
    step_5.STATEMENTS,
)
SCHEMA_VERSION = len(MIGRATIONS)
