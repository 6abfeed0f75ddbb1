"""What `status` shows of an adapter that is watched on live traffic."""

import io
from dataclasses import replace

from rich.console import Console

from specl.cli.status import render
from specl.shared.messaging.client import Client
from specl.shared.messaging.codes import CollapseCheckState
from specl.shared.messaging.daemon_status import CollapseCheckStatus
from specl.shared.paths import find_paths
from specl.shared.status import system_status

WATCH = CollapseCheckStatus("000002", CollapseCheckState.WATCHING, requests=1, drafted=20, acceptance=0.25)


def test_status_shows_a_watch_and_its_end():
    find_paths().create()
    with Client() as client:
        status = system_status(client)
    assert status.adapter.watch is None

    def rendered(watch):
        console = Console(width=200, file=io.StringIO())
        console.print(render(replace(status, adapter=replace(status.adapter, watch=watch))))
        return console.file.getvalue()

    assert "000002 watching: acceptance 0.250 of 20 first drafted tokens in 1 requests" in rendered(WATCH)
    assert "000002 rolled back: acceptance 0.250" in rendered(replace(WATCH, state="rolled_back"))
