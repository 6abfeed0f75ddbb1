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
    """Collect until stopped."""
    Collector(paths, settings, server, lambda: Store(paths.store)).run(stop)


if __name__ == "__main__":
    sys.exit(run_daemon("collector", main))
