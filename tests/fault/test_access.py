"""Who may connect: private folders and files, keys wherever TCP leaves this machine, and nobody with another key."""

import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import zmq

from specl.shared.errors import ConfigError, DaemonUnreachable
from specl.shared.messaging.bus import Server
from specl.shared.messaging.client import Client
from specl.shared.messaging.codec import encode
from specl.shared.messaging.endpoints import Addresses, is_loopback, read_keys, write_keys
from specl.shared.messaging.messages import GetStatus, Purge
from specl.shared.messaging.sockets import new_keys
from specl.shared.paths import ROLES, Paths
from specl.shared.settings.schema import Bus
from tests.fakes import ROOT
from tests.harness.instance import SETTINGS
from tests.harness.proxy import free_ports
from tests.harness.waiting import wait_until


def test_everything_a_daemon_makes_is_private(instance):
    for role in ROLES:
        instance.start(role)
    for role in ROLES:
        instance.ready(role)
    instance.ask("hello")
    instance.settle()
    exposed = [
        str(path.relative_to(instance.folder))
        for path in instance.folder.rglob("*")
        if path.stat().st_mode & 0o077 and path != instance.file
    ]
    assert exposed == []
    made = {path.name for path in instance.folder.rglob("*")}
    assert {"store.db-wal", "inference.db", "inference.sock", "inference.log"} <= made


@pytest.mark.parametrize("host, inside", [("127.0.0.1", True), ("::1", True), ("localhost", True), ("127.9.9.9", True),
                                          ("0.0.0.0", False), ("192.168.1.5", False), ("::", False), ("*", False), ("example.org", False)])  # fmt: skip
def test_tcp_beyond_loopback_needs_keys(instance, host, inside):
    assert is_loopback(host) == inside
    bus = Bus(transport="tcp", host=host)
    if inside:
        Addresses(instance.paths, bus)
        return
    with pytest.raises(ConfigError, match="beyond loopback"):
        Addresses(instance.paths, bus)
    write_keys(instance.paths.keys, new_keys())
    assert Addresses(instance.paths, bus).answer("inference").keys is not None


def test_listening_beyond_loopback_without_keys_is_refused(instance):
    instance.set(SETTINGS + "bus: {transport: tcp, host: 0.0.0.0}\n")
    daemon = instance.start("collector")
    wait_until(lambda: daemon.code is not None, 10, "it ends")
    assert daemon.code == 78 and "specl-ctl keys make" in instance.output("collector")


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_with_keys_only_their_holders_are_answered(instance, transport):
    if transport == "tcp":
        instance.set(SETTINGS + f"bus: {{transport: tcp, host: 0.0.0.0, port: {free_ports(6)}}}\n")
    made = subprocess.run(
        [sys.executable, "-c", "from specl.cli.main import main; main()", "keys", "make"],
        env=instance.environment() | {"PATH": "/usr/bin:/bin"}, capture_output=True, text=True,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert all(path.stat().st_mode & 0o077 == 0 for path in (instance.paths.keys, *instance.paths.keys.iterdir()))
    for role in ROLES:
        instance.start(role)
    for role in ROLES:
        instance.ready(role)
    assert instance.ask("hello").recorded
    instance.settle()
    instance.check()
    right = Addresses(instance.paths, instance.settings.bus).answer("inference")
    address = right.address.replace("0.0.0.0", "127.0.0.1")
    other = new_keys()
    strangers = {
        "no key": {},
        "a client key of its own": {
            "server": right.keys.server_public,
            "own": (other.client_public, other.client_secret),
        },
        "another server's key": {
            "server": other.server_public,
            "own": (right.keys.client_public, right.keys.client_secret),
        },
        "the right keys": {
            "server": right.keys.server_public,
            "own": (right.keys.client_public, right.keys.client_secret),
        },
    }
    answered = {name: _answered(address, **keys) for name, keys in strangers.items()}
    assert [name for name, yes in answered.items() if yes] == ["the right keys"]
    write_keys(instance.paths.keys, new_keys())
    with pytest.raises(DaemonUnreachable), instance.client() as client:
        client.ask("with the wrong key")


def test_remote_client_needs_only_the_client_key(instance, tmp_path):
    instance.set(SETTINGS + f"bus: {{transport: tcp, host: 127.0.0.1, port: {free_ports(6)}}}\n")
    write_keys(instance.paths.keys, new_keys())
    instance.start("inference")
    instance.ready("inference")
    elsewhere = Paths(tmp_path / "var", tmp_path / "models").create()
    with pytest.raises(DaemonUnreachable), Client(elsewhere, instance.settings) as client:
        client.ask("without any key", max_tokens=2)
    elsewhere.keys.mkdir(exist_ok=True)
    shutil.copy(instance.paths.keys / "client.json", elsewhere.keys)
    with Client(elsewhere, instance.settings) as client:
        assert client.ask("from elsewhere", max_tokens=2).tokens == 2
    with pytest.raises(ConfigError, match="can connect, not serve"):
        addresses = Addresses(elsewhere, Bus(transport="tcp", port=free_ports(2)))
        Server(addresses.answer("inference"), addresses.publish("inference"))


def test_web_page_cannot_command_a_daemon(instance):
    """libzmq takes a peer that sends `POST` for one of ZMTP 1.0; the body of a request is the page's free choice."""
    port = free_ports(6)
    instance.set(SETTINGS + f"bus: {{transport: tcp, host: 127.0.0.1, port: {port}}}\n")
    collector = instance.start("collector")
    instance.start("inference")
    instance.ready("inference")
    instance.ask("a record to keep")
    instance.settle()
    kept = instance.stored()
    command = encode(Purge(kept, None, ""))
    frames = b"\x01\x00" + b"\xff" + (len(command) + 1).to_bytes(8, "big") + b"\x00" + command
    for empty_frames in (300, 301):  # wherever in the headers frames are cut, one of the two has `frames` in step
        body = b"\x01" * empty_frames + frames
        head = f"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
        for role in (0, 2, 4):
            with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port + role)) as page:
                page.sendall(head.encode() + body)
                page.settimeout(0.5)
                with suppress(OSError):
                    while page.recv(4096):
                        pass
    status = instance.ready("collector")
    assert kept and instance.stored() == kept and status["malformed"] == 0 and collector.code is None


def test_daemons_that_start_together_make_keys_once(tmp_path):
    code = "import sys, pathlib; from specl.shared.messaging import sockets as s; s.make_missing_keys(pathlib.Path(sys.argv[1]));" \
        "from specl.shared.messaging.endpoints import read_keys; print(read_keys(pathlib.Path(sys.argv[1])))"  # fmt: skip
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "keys")], stdout=subprocess.PIPE) for _ in range(4)
    ]
    seen = {process.communicate(timeout=30)[0] for process in processes}
    assert len(seen) == 1 and b"server_secret=''" not in seen.pop()


def _answered(address, server=None, own=None):
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    if server:
        dealer.curve_serverkey = server.encode()
        dealer.curve_publickey, dealer.curve_secretkey = (key.encode() for key in own)
    dealer.connect(address)
    dealer.send(encode(GetStatus()), zmq.NOBLOCK)
    found = bool(dealer.poll(800))
    context.destroy(linger=0)
    return found


def test_readable_keys_are_refused_and_never_overwritten(instance):
    write_keys(instance.paths.keys, new_keys())
    before = read_keys(instance.paths.keys)
    again = subprocess.run(
        [sys.executable, "-c", "from specl.cli.main import main; main()", "keys", "make"],
        env=instance.environment() | {"PATH": "/usr/bin:/bin"}, capture_output=True, text=True,
    )  # fmt: skip
    assert again.returncode == 1 and "--force" in again.stderr
    assert read_keys(instance.paths.keys) == before
    (instance.paths.keys / "server.json").chmod(0o644)
    with pytest.raises(ConfigError, match="others may read"):
        read_keys(instance.paths.keys)


def test_product_has_no_pickle_eval_or_shell():
    """Names of what turns data into code; `mx.load` and `np.load` read only what their formats hold."""
    words = re.compile(
        r"\b(import (?:pickle|marshal|shelve)\b|(?<!\.)eval\(|exec\(|os\.system|shell=True|allow_pickle=True|yaml\.load\()"
    )
    found = []
    for part in ("shared", "daemons", "cli"):
        for path in (ROOT / part).rglob("*.py"):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                code = line.split("#")[0].replace("allow_pickle=False", "")
                if words.search(code):
                    found.append(f"{path.name}:{number}: {line.strip()}")
    assert found == []


def test_link_in_place_of_a_socket_is_refused(instance):
    (instance.paths.run / "collector.sock").write_text("not a socket")
    daemon = instance.start("collector")
    wait_until(lambda: daemon.code is not None, 10, "it ends")
    assert daemon.code == 78 and "in the way of a socket" in instance.output("collector")
    time.sleep(0.1)
