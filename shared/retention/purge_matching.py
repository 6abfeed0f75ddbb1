"""Which undelivered records a purge removes, and the texts in them. `store/forgetting.py` does this
for stored records.

Knows encoded records, nothing of files.
"""

from collections.abc import Sequence

from specl.shared.conversations import folded, typed_in
from specl.shared.errors import WireError
from specl.shared.messaging.codec import decode
from specl.shared.messaging.messages import Envelope, Evaluation, Generation, Purge
from specl.shared.retention.redaction import texts_of


def purge_matches(purge: Purge, row: Envelope) -> bool:
    """Whether `purge` removes this record: a generation that it matches by id, age or text, or the
    evaluation of a generation whose id it names.

    The case of letters does not matter, as in the store. Where a record cannot be decoded, the
    pattern is searched in its bytes.
    """
    if row.id in purge.ids:
        return True
    try:
        record = decode(row.body)
    except WireError:
        return bool(purge.pattern) and folded(purge.pattern) in folded(row.body.decode("utf-8", "replace"))
    if isinstance(record, Evaluation):
        return record.generation_id in purge.ids
    if not isinstance(record, Generation):
        return False
    if purge.before is not None and record.created_at < purge.before:
        return True
    pattern = folded(purge.pattern)
    if not pattern:
        return False
    return record.conversation_id == pattern or any(pattern in folded(text) for text in texts_of(record))


def texts_in(row: Envelope) -> tuple[Sequence[str], Sequence[str]]:
    """All texts of an undelivered generation, and those among them that a user typed. Both are empty
    for other records.
    """
    try:
        record = decode(row.body)
    except WireError:
        return [], []
    return (texts_of(record), typed_in(record.messages)) if isinstance(record, Generation) else ([], [])
