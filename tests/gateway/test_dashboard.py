"""What the page shows is not older than a purge, and is not kept where nobody looks."""

import asyncio

import pytest

from specl.daemons.gateway import dashboard
from specl.shared.paths import find_paths
from specl.shared.settings.schema import Settings
from specl.shared.store import Store
from tests.fakes import make_disagreement, make_generation, to_row


@pytest.fixture
def store():
    opened = Store(find_paths().create().store)
    opened.set_threshold(0.5)
    yield opened
    opened.close()


def add(store, *ids):
    lines = [make_disagreement(draft_text=f"draft of {id}", draft_token=ord(id)) for id in ids]
    store.add_rows([to_row(make_generation(id, disagreements=[line])) for id, line in zip(ids, lines, strict=True)])


async def shown(board):
    return (await board.state(None)).body.decode()


@pytest.mark.parametrize("purged, added", [("b", ()), ("c", ()), ("c", ("d",)), ("a", ("d", "e")), ("c", ("d", "e"))])
def test_purged_text_is_not_shown_again(store, purged, added):
    board = dashboard.Dashboard(find_paths(), Settings(), lambda: False)
    for id in "abc":
        add(store, id)

    async def look():
        before = await shown(board)
        store.purge([purged])
        for id in added:
            add(store, id)
        return before, await shown(board)

    before, after = asyncio.run(look())
    for text in (f"answer {purged}", f"draft of {purged}"):
        assert text in before and text not in after


def test_nothing_is_kept_where_nobody_looks(store, monkeypatch):
    monkeypatch.setattr(dashboard, "FORGET_S", 0.0)
    board = dashboard.Dashboard(find_paths(), Settings(), lambda: False)
    add(store, "a")

    async def look():
        await shown(board)
        await asyncio.sleep(0.01)
        return str(vars(board))

    assert "answer a" not in asyncio.run(look())
