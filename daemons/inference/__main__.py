"""`python -m specl.daemons.inference`."""

from specl.daemons.inference.service import Inference
from specl.daemons.run import exit_now, run_daemon
from specl.shared.messaging.bus import Server
from specl.shared.paths import Paths
from specl.shared.runtime.signals import StopFlag
from specl.shared.settings.schema import Settings


def main(paths: Paths, settings: Settings, server: Server, stop: StopFlag) -> None:
    """Serve until stopped."""
    Inference(paths, settings, server).run(stop)


if __name__ == "__main__":
    exit_now(run_daemon("inference", main))
