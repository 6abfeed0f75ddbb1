"""ZeroMQ sockets as the bus needs them: size limits, CURVE keys, private ipc files. Knows addresses and keys, no messages.

An ipc path can be stolen by a second bind, so callers lock before they bind. Where there are keys, both sides must show theirs.
TCP is bound with keys only: without them libzmq takes the bytes of an HTTP request for frames (ZMTP 1.0), and any web page may
send one to a port of loopback.
"""

import errno
import fcntl
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

import zmq

from specl.shared.errors import ConfigError, SpecLoraError
from specl.shared.messaging.codec import MAX_FRAME
from specl.shared.messaging.endpoints import MAKE_KEYS, Endpoint, Keys, read_keys, write_keys
from specl.shared.paths import DISK_REFUSES

Socket = zmq.Socket[bytes]
Context = zmq.Context[Socket]

SEND_QUEUE = 1000  # frames that may wait in a socket, either way
# a TCP peer whose machine is gone counts as disconnected after 10 + 3 * 5 seconds
KEEPALIVE = {zmq.TCP_KEEPALIVE: 1, zmq.TCP_KEEPALIVE_IDLE: 10, zmq.TCP_KEEPALIVE_INTVL: 5, zmq.TCP_KEEPALIVE_CNT: 3}
LINGER_MS = 200  # for messages on their way when a socket closes


def new_socket(context: Context, kind: int) -> Socket:
    """A socket with our limits, not yet bound or connected."""
    socket: Socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME)
    socket.setsockopt(zmq.SNDHWM, SEND_QUEUE)
    socket.setsockopt(zmq.RCVHWM, SEND_QUEUE)
    return socket


def new_keys() -> Keys:
    """A fresh pair for the daemons and one for their clients."""
    (server_public, server_secret), (client_public, client_secret) = zmq.curve_keypair(), zmq.curve_keypair()
    return Keys(*(key.decode() for key in (server_public, client_public, client_secret, server_secret)))


def make_missing_keys(folder: Path) -> None:
    """Make keys in `folder` where there are none; daemons that start together make them once.

    Raises ConfigError for keys that cannot be used, SpecLoraError where they cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if read_keys(folder) is None:
                write_keys(folder, new_keys())
        finally:
            os.close(handle)
    except OSError as error:
        raise SpecLoraError(f"the keys in {folder} could not be written: {error}") from error


class ClientKeyCheck:
    """CURVE alone lets in whoever knows the server's public key; this asks for the one client key too."""

    def __init__(self, keys: Keys) -> None:
        self._allowed = keys.client_public.encode()

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether a client with this key may connect; pyzmq's authenticator calls it."""
        return key == self._allowed


def bind(socket: Socket, endpoint: Endpoint) -> None:
    """Listen at `endpoint`. Raises ConfigError where that cannot be, SpecLoraError where the disk refuses or the address is
    not there yet.
    """
    if endpoint.keys is not None:
        if not endpoint.keys.server_secret:
            raise ConfigError(
                "there is no server key here: this machine can connect, not serve", "`specl-ctl keys make`"
            )
        socket.curve_server = True
        socket.curve_publickey = endpoint.keys.server_public.encode()
        socket.curve_secretkey = endpoint.keys.server_secret.encode()
    elif endpoint.address.startswith("tcp://"):
        raise ConfigError(f"{endpoint.address} needs keys, as every TCP socket does", MAKE_KEYS)
    for option, value in KEEPALIVE.items():  # the kernel answers it for a client that is suspended
        socket.setsockopt(option, value)
    path = Path(endpoint.address.removeprefix("ipc://"))
    with suppress(FileNotFoundError):
        if endpoint.address.startswith("ipc://") and not stat.S_ISSOCK(path.lstat().st_mode):
            raise ConfigError(f"{path} is in the way of a socket", "remove it, or set SPECL_VAR to another folder")
    previous = os.umask(0o077)
    try:
        socket.bind(endpoint.address)
    except zmq.ZMQError as error:
        # an address may come with the network, after the daemons were started
        may_pass = error.errno in (*DISK_REFUSES, errno.EADDRNOTAVAIL)
        kind = SpecLoraError if may_pass else ConfigError
        raise kind(f"cannot bind {endpoint.address}: {error}") from error
    finally:
        os.umask(previous)


def connect(socket: Socket, endpoint: Endpoint) -> None:
    """Connect to `endpoint`; libzmq keeps trying in the background."""
    # a frame beyond this limit ends the connection; between the two limits `decode` refuses it and the connection stays
    socket.setsockopt(zmq.MAXMSGSIZE, 4 * MAX_FRAME)
    if endpoint.keys is not None:
        socket.curve_serverkey = endpoint.keys.server_public.encode()
        socket.curve_publickey = endpoint.keys.client_public.encode()
        socket.curve_secretkey = endpoint.keys.client_secret.encode()
    socket.connect(endpoint.address)


def shared_context() -> Context:
    """The context of all client sockets of this process."""
    context: Any = zmq.Context.instance()
    return context  # type: ignore[no-any-return]  # pyzmq types it by its own socket class
