"""The process around the app: where it may listen, one socket, uvicorn, a clean end. Knows nothing of requests."""

import asyncio
import errno
import json
import os
import socket
import time
from contextlib import AbstractContextManager, nullcontext, suppress

import uvicorn

from specl.daemons.gateway.app import make_app
from specl.daemons.gateway.connection_timeouts import with_timeouts
from specl.shared.errors import ConfigError, SpecLoraError
from specl.shared.messaging.codes import DaemonState
from specl.shared.messaging.endpoints import check_exposure, gateway_token
from specl.shared.paths import Paths
from specl.shared.runtime import log
from specl.shared.runtime.atomic_files import write_file
from specl.shared.runtime.signals import StopFlag
from specl.shared.settings.schema import Gateway, Settings
from specl.shared.status import gateway_file

OTHER_LOOPBACK = {"127.0.0.1": "::1", "localhost": "::1", "0.0.0.0": "::1", "::1": "127.0.0.1"}
RETRY_S = 5.0  # between tries for a port that another program has
POLL_S = 0.1
SHUTDOWN_S = 1  # for answers on their way when stopped; honcho allows five in all
_log = log.get("gateway")


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises SpecLoraError where the port is taken or the address is not there yet, ConfigError where the
    address is unusable.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only where the protocol is named; with it a token would wait for the last one's ACK
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if host == "::":  # IPv4, too
        listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    try:
        listening.bind((host, port))
        listening.listen(128)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise SpecLoraError(
                f"port {port} of {host} is taken by another program",
                "set gateway.port, or gateway.enabled to false; until then it is tried again",
            ) from error
        if error.errno == errno.EADDRNOTAVAIL:  # it may come with the network
            raise SpecLoraError(
                f"this machine has no address {host}", "set gateway.host; until then it is tried again"
            ) from error
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}", "set gateway.host and port") from error
    listening.set_inheritable(False)
    return listening


def listen_on_loopbacks(host: str, port: int) -> list[socket.socket]:
    """The listening socket of `host`, and that of the other loopback address where `host` is one of both: `localhost` may
    mean either. Raises what `listen` raises for `host`; the other may be missing.
    """
    sockets = [listen(host, port)]
    if (other := OTHER_LOOPBACK.get(host)) is not None:
        try:
            sockets.append(listen(other, sockets[0].getsockname()[1]))
        except SpecLoraError as error:  # a machine without IPv6, or another program's port
            _log.info("gateway.loopback_missing", host=other, problem=str(error))
    return sockets


def address_of(listening: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class StateFile:
    """run/gateway.json, from which `specl-ctl status` reads how the gateway is."""

    def __init__(self, paths: Paths) -> None:
        self._file, self._started = gateway_file(paths), time.time()

    def write(self, state: DaemonState, address: str | None = None, problem: str | None = None) -> None:
        """Write the state, whole or not at all."""
        body = {"pid": os.getpid(), "started": self._started, "state": state, "address": address, "problem": problem}
        with suppress(OSError):  # on a full disk the gateway serves on
            write_file(self._file, json.dumps(body), sync=False)


def _wait_for_port(settings: Gateway, state_file: StateFile, stop: StopFlag) -> list[socket.socket]:
    """The sockets, tried for until stopped; empty then: a taken port is no reason to take the other daemons down."""
    logged = False
    while not stop:
        try:
            return listen_on_loopbacks(settings.host, settings.port)
        except ConfigError:
            raise
        except SpecLoraError as error:
            state_file.write(DaemonState.FAILED, problem=f"{error}; {error.hint}")
            if not logged:
                _log.error("gateway.cannot_listen", problem=str(error), remedy=error.hint)
            logged = True
        end = time.monotonic() + RETRY_S
        while time.monotonic() < end and not stop:
            time.sleep(POLL_S)
    return []


class _Server(uvicorn.Server):
    """uvicorn that leaves signals to StopFlag."""

    def __init__(self, config: uvicorn.Config, stop: StopFlag) -> None:
        super().__init__(config)
        self._stop = stop

    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]  # a null context will do
        """Leave every signal alone."""
        return nullcontext()

    async def stop_with_flag(self) -> None:
        """Ask uvicorn to end once the flag is set."""
        while not self._stop:
            await asyncio.sleep(POLL_S)
        self.should_exit = True


def serve(paths: Paths, settings: Settings, stop: StopFlag) -> None:
    """Listen and answer until stopped. Raises ConfigError for settings that would expose the models unguarded."""
    token = gateway_token(settings.gateway)
    check_exposure(settings.gateway, token)
    state_file = StateFile(paths)
    listening = _wait_for_port(settings.gateway, state_file, stop)
    if not listening:
        return
    app = make_app(paths, settings, token, lambda: bool(stop))
    # log_level: any local page could fill the log with uvicorn's warnings about malformed requests
    server = _Server(
        uvicorn.Config(
            app, log_config=None, log_level="error", access_log=False, lifespan="off", server_header=False, proxy_headers=False,
            timeout_graceful_shutdown=SHUTDOWN_S, timeout_keep_alive=30, ws="none",
            http=with_timeouts(settings.gateway.request_timeout_s, settings.gateway.send_timeout_s),
        ),
        stop,
    )  # fmt: skip
    address = address_of(listening[0])
    state_file.write(DaemonState.READY, address)
    _log.info("gateway.ready", address=address, token=token is not None)

    async def serve_until_stopped() -> None:
        watcher = asyncio.create_task(server.stop_with_flag())
        await server.serve(sockets=listening)
        watcher.cancel()

    asyncio.run(serve_until_stopped())
