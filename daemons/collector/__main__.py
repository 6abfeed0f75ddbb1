"""`python -m specl.daemons.collector`."""

import sys

from specl.daemons.collector.service import Collector
from specl.daemons.run import run_daemon
from specl.shared.messaging.bus import Server
from specl.shared.paths import Paths
from specl.shared.runtime.signals import StopFlag
from specl.shared.settings.schema import Settings
from specl.shared.store import Store


def main(paths: Paths, settings: Settings, server: Server, stop: StopFlag) -> None:
    """Collect until stopped."""
    Collector(paths, settings, server, lambda: Store(paths.store)).run(stop)


if __name__ == "__main__":
    sys.exit(run_daemon("collector", main))
