"""`python -m specl.daemons.keep ROLE`: the supervisor by its former name, for service units written then.

It goes with the next version; `specl-ctl service` writes units with the new name.
"""

import sys

from specl.daemons.supervise import main

if __name__ == "__main__":
    advice = "write the service units again with `specl-ctl service systemd --write` (macOS: launchd)"
    print(f"specl.daemons.keep is now specl.daemons.supervise; {advice}", file=sys.stderr, flush=True)
    sys.exit(main())
