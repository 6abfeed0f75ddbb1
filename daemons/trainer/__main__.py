"""`python -m specl.daemons.trainer`: at a low priority."""

from specl.daemons.run import exit_now, run_daemon
from specl.daemons.trainer.service import Trainer
from specl.shared.messaging.bus import Server
from specl.shared.paths import Paths
from specl.shared.runtime.signals import StopFlag, lower_priority
from specl.shared.settings.schema import Settings


def main(paths: Paths, settings: Settings, server: Server, stop: StopFlag) -> None:
    """Train when it helps, until stopped."""
    Trainer(paths, settings, server).run(stop)


if __name__ == "__main__":
    lower_priority()
    exit_now(run_daemon("trainer", main))
