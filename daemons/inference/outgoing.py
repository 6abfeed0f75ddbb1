"""What the daemon's threads send: the loop thread owns the sockets, so they hand their messages to
it through `Emit`.
"""

from collections.abc import Callable

from specl.shared.messaging.messages import Delta, Done, Failed, Queued, RecordBatch, RecordReady, Reply

Outgoing = Queued | Delta | Done | Failed | Reply | RecordBatch | RecordReady
Emit = Callable[
    [bytes | None, Outgoing], None
]  # to a peer, or to every subscriber where there is none; from any thread
