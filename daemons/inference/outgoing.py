"""What the daemon's threads send: the loop thread owns the sockets, so they hand their messages to
it through `Emit`.
"""

from collections.abc import Callable

from specl.shared.messaging.messages import (
    Delta,
    Done,
    Failed,
    PrefillProgress,
    Queued,
    RecordBatch,
    RecordReady,
    Reply,
)

Outgoing = Queued | PrefillProgress | Delta | Done | Failed | Reply | RecordBatch | RecordReady
# sends to a peer, or to every subscriber where the peer is None; may be called from any thread
Emit = Callable[[bytes | None, Outgoing], None]
