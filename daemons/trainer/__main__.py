"""`python -m specl.daemons.trainer`: at a low priority."""

from specl.daemons.run import leave, run_daemon
from specl.daemons.trainer.service import Trainer
from specl.shared.bus import Server
from specl.shared.config import Settings
from specl.shared.paths import Paths
from specl.shared.process import StopFlag, step_back


def main(paths: Paths, settings: Settings, server: Server, stop: StopFlag) -> None:
    """Train when it helps, until stopped."""
    Trainer(paths, settings, server).run(stop)


if __name__ == "__main__":
    step_back()
    leave(run_daemon("trainer", main))
