"""What `status` says of an adapter that live traffic is judging."""

import io
from dataclasses import replace

from rich.console import Console

from specl.cli.status import render
from specl.daemons.inference.adapter_monitor import AdapterMonitor
from specl.shared.learning.live_check import Depths
from specl.shared.messaging.client import Client
from specl.shared.messaging.daemon_status import WatchStatus
from specl.shared.paths import find_paths
from specl.shared.status import system_status


def test_canary_shows_in_status_until_it_ends(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECL_VAR", str(tmp_path))
    find_paths().create()
    lookout = AdapterMonitor()
    lookout.changed("000002", "000002", "000001", Depths.promised([0.7], 300))
    lookout.saw([20], [5])
    with Client() as client:
        status = system_status(client)
    assert status.adapter.watch is None

    def told():
        adapter = replace(status.adapter, watch=WatchStatus(**lookout.status()))
        console = Console(width=200, file=io.StringIO())
        console.print(render(replace(status, adapter=adapter)))
        return console.file.getvalue()

    assert "000002 watching: acceptance 0.250 of 20 tokens in 1 requests, before it 0.700" in told()
    while not lookout.saw([20], [5]):
        pass
    assert "000002 rolled back: acceptance 0.250" in told()
    lookout.reinstated("000002")
    assert "000002 reinstated: acceptance 0.250" in told()
