"""`python -m specl.daemons.collector`."""

import sys

from specl.daemons.collector.service import Collector
from specl.daemons.run import run_daemon
from specl.shared.bus import Server
from specl.shared.config import Settings
from specl.shared.paths import Paths
from specl.shared.process import StopFlag
from specl.shared.store import Store


def main(paths: Paths, settings: Settings, server: Server, stop: StopFlag) -> None:
    """Open the store and collect until stopped."""
    store = Store(paths.store)
    try:
        Collector(paths, settings, server, store).run(stop)
    finally:
        store.close()


if __name__ == "__main__":
    sys.exit(run_daemon("collector", main))
