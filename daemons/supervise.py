"""`python -m specl.daemons.supervise ROLE`: the supervisor on each Procfile line and in each
service unit.
"""

import sys

from specl.shared.paths import DAEMONS, find_paths
from specl.shared.runtime import log
from specl.shared.runtime.signals import lower_priority
from specl.shared.runtime.supervisor import EX_CONFIG, supervise


def main() -> int:
    """Supervise one daemon; the exit code is for honcho."""
    if len(sys.argv) != 2 or sys.argv[1] not in DAEMONS:
        print(f"usage: python -m specl.daemons.supervise {'|'.join(DAEMONS)}", file=sys.stderr)
        return EX_CONFIG
    role = sys.argv[1]
    log.set_up(f"supervisor-{role}", None)
    if role == "trainer":
        lower_priority()
    return supervise(role, find_paths().run)


if __name__ == "__main__":
    sys.exit(main())
