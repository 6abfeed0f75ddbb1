"""Records of version 1 in today's shape. Outboxes and quarantines may hold them for as long as a collector was away.

Works on the plain values that msgpack gave, before the codec checks them: what it does not understand it leaves as it is, and
the check refuses it.
"""

from dataclasses import asdict
from typing import Any

from specl.shared.answer_stats import AnswerStats

_STATS = asdict(AnswerStats())


def upgrade_v1(kind: str, body: Any) -> Any:
    """The fields of a record of version 1 as version 2 has them."""
    if not isinstance(body, dict):
        return body
    if kind == "Generation" and isinstance(stats := body.get("stats"), dict):
        # version 1 had no schema for `stats`: absent fields get their defaults; an imported record has none at all
        return body | {"stats": {name: stats.get(name, default) for name, default in _STATS.items()} if stats else None}
    return body
