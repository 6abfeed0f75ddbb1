"""The SQLite failure store: tables, views, migrations, queries. The only folder
that imports sqlalchemy.

One file, WAL, readable with `sqlite3` alone: token arrays are blobs with their text beside them.
The collector is the only writer; everyone else opens it read-only with short transactions. Storing
a record twice is storing it once.

`schema` describes its tables, `migrations` makes them, `file` opens it, `rows` turns records into
rows, `writing` adds them, `forgetting` removes them, `questions` reads.
"""

from specl.shared.store.forgetting import EARLIEST, LATEST, PURGE_MOST, Forgetting
from specl.shared.store.migrations import SCHEMA_VERSION
from specl.shared.store.questions import Questions
from specl.shared.store.rows import GenerationSummary, StoredGeneration
from specl.shared.store.writing import Writing

__all__ = ["EARLIEST", "LATEST", "PURGE_MOST", "SCHEMA_VERSION", "GenerationSummary", "Store", "StoredGeneration"]


class Store(Writing, Forgetting, Questions):
    """Open `path`. `read_only` needs an existing store and takes no lock that could delay the
    writer.

    Raises StoreError for a missing, foreign, damaged or newer store.
    """
