"""A stratified sample of generations: rows of every period, and no conversation above
its fair share.

Pure: summaries in, a choice of them out. The same rows give the same choice, and a few new ones
change little of it, so that a run that was killed finds most of its work again.
"""

import hashlib
from collections.abc import Iterable, Sequence
from itertools import pairwise

from specl.shared.store import GenerationSummary

STRATA = 10  # of the rows that are older than the newest half


def stratified_sample(rows: Sequence[GenerationSummary], most: int) -> list[GenerationSummary]:
    """`most` of `rows` (newest first), in their order; all of them where they are no more than
    that. Guaranteed are:

    - a fair share: no choice of `most` rows has a smaller largest conversation. One that is over it is first cut down to it,
      the newest half of the share from its newest rows, the rest from all of its time;
    - the newest half of the places goes to the newest rows, all of them but for what is over a conversation's share;
    - older rows are thinned evenly: each tenth of them (a stretch of time each) keeps the same part, give or take one row.
    """
    if len(rows) <= most:
        return list(rows)
    groups: dict[str, list[GenerationSummary]] = {}
    for row in rows:
        groups.setdefault(row.conversation_id, []).append(row)
    share = fair_share([len(group) for group in groups.values()], most)
    sampled = {row.id for group in groups.values() for row in _thinned(group, share)}
    return _thinned([row for row in rows if row.id in sampled], most)


def fair_share(counts: Iterable[int], most: int) -> int:
    """The least cap on every count with which `most` places are filled; the largest count where
    they are not filled.
    """
    ordered = sorted(counts)
    left = most
    for index, count in enumerate(ordered):
        remaining = len(ordered) - index
        if count * remaining >= left:
            return -(-left // remaining)
        left -= count
    return ordered[-1] if ordered else 0


def _thinned(rows: Sequence[GenerationSummary], most: int) -> list[GenerationSummary]:
    """The newest half of `most` as they are, the other half from all that is older."""
    if len(rows) <= most:
        return list(rows)
    newest = most - most // 2
    older, places = rows[newest:], most // 2
    bounds = [len(older) * i // STRATA for i in range(STRATA + 1)]
    sampled = {row.id for row in rows[:newest]}
    for start, end in pairwise(bounds):
        quota = end * places // len(older) - start * places // len(older)
        sampled.update(row.id for row in sorted(older[start:end], key=_hash_order)[:quota])
    return [row for row in rows if row.id in sampled]


def _hash_order(row: GenerationSummary) -> bytes:
    """A pseudo-random order that is always the same. Taking every second row would change the whole
    choice with one new row.
    """
    return hashlib.blake2b(row.id.encode(), digest_size=8).digest()
