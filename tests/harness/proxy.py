"""A proxy between the collector and inference that loses and doubles frames. Both speak TCP on loopback here, so that the
collector's settings can name the proxy's ports instead of inference's.
"""

import random
import socket
import threading

import zmq

from specl.shared.messaging.endpoints import Endpoint, read_keys
from specl.shared.messaging.sockets import bind, connect, make_missing_keys
from tests.harness.instance import SETTINGS, Instance


def free_ports(count: int) -> int:
    """The first of `count` free ports in a row."""
    while True:
        first = random.randrange(20_000, 60_000)
        probes = []
        try:
            for port in range(first, first + count):
                probe = socket.socket()
                probes.append(probe)
                probe.bind(("127.0.0.1", port))
            return first
        except OSError:
            continue
        finally:
            for probe in probes:
                probe.close()


class LossyProxy:
    """Forwards requests and answers with faults; publications are cut off entirely."""

    def __init__(self, instance: Instance, drop: float, double: float) -> None:
        self.instance, self.drop, self.double = instance, drop, double
        self.dropped = self.doubled = 0
        inference, self._front = free_ports(6), free_ports(6)
        instance.set(SETTINGS + f"bus: {{transport: tcp, port: {inference}}}\n")
        self._context = zmq.Context()
        self._clients, self._daemon = self._context.socket(zmq.ROUTER), self._context.socket(zmq.DEALER)
        make_missing_keys(instance.paths.keys)
        keys = read_keys(instance.paths.keys)
        bind(self._clients, Endpoint(f"tcp://127.0.0.1:{self._front}", keys))
        connect(self._daemon, Endpoint(f"tcp://127.0.0.1:{inference}", keys))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def start_collector(self) -> None:
        """A collector whose settings name the proxy; instance.settle() then finds it running."""
        file = self.instance.folder / "proxied.yaml"
        file.write_text(SETTINGS + f"bus: {{transport: tcp, port: {self._front}}}\n")
        self.instance.start("collector", SPECL_CONFIG=str(file))

    def _copies(self) -> int:
        chance = random.random()
        if chance < self.drop:
            self.dropped += 1
            return 0
        if chance < self.drop + self.double:
            self.doubled += 1
            return 2
        return 1

    def _run(self) -> None:
        peer = b""
        while not self._stop.is_set():
            if self._clients.poll(10):
                peer, data = self._clients.recv_multipart()
                for _ in range(self._copies()):
                    self._daemon.send(data)
            while self._daemon.poll(0):
                data = self._daemon.recv()
                for _ in range(self._copies()):
                    self._clients.send_multipart([peer, data])

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=2)
        self._context.destroy(linger=0)
