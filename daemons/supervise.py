"""`python -m specl.daemons.supervise ROLE`: the respawner on each Procfile line (honcho ends all when one ends)."""

import sys

from specl.shared.paths import DAEMONS, find_paths
from specl.shared.runtime import log
from specl.shared.runtime.signals import lower_priority
from specl.shared.runtime.supervisor import EX_CONFIG, supervise


def main() -> int:
    """Keep one daemon running."""
    if len(sys.argv) != 2 or sys.argv[1] not in DAEMONS:
        print(f"usage: python -m specl.daemons.supervise {'|'.join(DAEMONS)}", file=sys.stderr)
        return EX_CONFIG
    log.set_up(f"keep-{sys.argv[1]}", None)
    if sys.argv[1] == "trainer":
        lower_priority()
    return supervise(sys.argv[1], find_paths().run)


if __name__ == "__main__":
    sys.exit(main())
