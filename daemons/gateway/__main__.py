"""`python -m specl.daemons.gateway`."""

import time

from specl.daemons.run import exit_now, run_exclusively
from specl.shared.paths import Paths
from specl.shared.runtime import log
from specl.shared.runtime.signals import StopFlag, supervisor_pid
from specl.shared.settings.schema import Settings

LOOK_S = 0.2


def main(paths: Paths, settings: Settings) -> None:
    """Serve until stopped; only wait where gateway.enabled is false: honcho ends all processes when one ends."""
    stop = StopFlag(parent=supervisor_pid())
    if settings.gateway.enabled:
        from specl.daemons.gateway.service import serve  # half a second of imports that one who waits can do without

        serve(paths, settings, stop)
        return
    log.get("gateway").info("gateway.disabled", setting="gateway.enabled")
    while not stop:
        time.sleep(LOOK_S)


if __name__ == "__main__":
    exit_now(run_exclusively("gateway", main))
