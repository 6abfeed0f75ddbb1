"""What `status` says of an adapter that live traffic is judging."""

import io

from rich.console import Console

from specl.cli.status import render
from specl.daemons.inference.adapter_monitor import AdapterMonitor
from specl.shared.learning.live_check import Depths
from specl.shared.messaging.client import Client
from specl.shared.paths import find_paths
from specl.shared.settings.load import load_settings
from specl.shared.status import collect


def test_a_watch_is_told_of_while_it_is_on_and_how_it_ended(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECL_VAR", str(tmp_path))
    find_paths().create()
    lookout = AdapterMonitor()
    lookout.changed("000002", "000002", "000001", Depths.promised([0.7], 300))
    lookout.saw([20], [5])
    with Client() as client:
        found = collect(client)
    assert found["adapter"]["watch"] == {}
    settings = load_settings()

    def told():
        found["adapter"]["watch"] = lookout.status()
        console = Console(width=200, file=io.StringIO())
        console.print(render(found, settings))
        return console.file.getvalue()

    assert "000002 watching: acceptance 0.250 of 20 tokens in 1 requests, before it 0.700" in told()
    while not lookout.saw([20], [5]):
        pass
    assert "000002 rolled back: acceptance 0.250" in told()
    lookout.reinstated("000002")
    assert "000002 reinstated: acceptance 0.250" in told()
