"""The gateway as a process: port, lock, settings errors, status, a clean stop."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict

import httpx2 as httpx
import pytest

from specl.daemons.gateway.service import listen_on_loopbacks
from specl.shared.runtime.locks import is_locked
from specl.shared.status import system_status
from tests.harness.gateway import Gateway
from tests.harness.waiting import wait_until


def status(instance):
    with instance.client() as client:
        return asdict(system_status(client))


def test_status_shows_address_and_stop(lone):
    gateway = lone()
    address = gateway.ready()
    found = status(gateway.instance)
    said = found["gateway"]
    assert (said["state"], said["pid"], said["address"]) == ("ready", gateway.process.pid, address)
    assert 0 <= said["uptime_s"] < 60 and not any("gateway" in problem for problem in found["problems"])
    gateway.stop()
    assert gateway.process.returncode == 0
    said = status(gateway.instance)["gateway"]
    assert (said["state"], said["pid"], said["address"]) == ("stopped", None, None)


def test_taken_port_is_reported_and_retried(lone, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        gateway = lone(f"gateway: {{port: {port}}}\n")
        wait_until(lambda: gateway.state().get("state") == "failed", 20, "it says that the port is taken")
        assert f"port {port} of 127.0.0.1 is taken" in gateway.state()["problem"]
        found = status(gateway.instance)
        assert any(f"port {port}" in problem for problem in found["problems"])
        text = gateway.output.read_text()
        assert "Traceback" not in text and text.count("is taken") == 1
    assert gateway.ready().endswith(str(port))


def test_public_host_without_token_is_a_settings_error(lone):
    gateway = lone("gateway: {host: 0.0.0.0}\n")
    assert gateway.process.wait(timeout=20) == 78
    text = gateway.output.read_text()
    assert "gateway: gateway.host 0.0.0.0 is beyond loopback" in text and "Traceback" not in text


def test_switched_off_it_waits_and_opens_nothing(lone):
    gateway = lone("gateway: {enabled: false}\n")
    wait_until(lambda: is_locked(gateway.instance.paths.run, "gateway"), 20, "it runs")
    found = status(gateway.instance)
    assert found["gateway"]["state"] == "stopped" and found["gateway"]["enabled"] is False
    assert gateway.process.poll() is None
    gateway.stop()
    assert gateway.process.returncode == 0


def test_a_second_gateway_is_refused(lone):
    gateway = lone()
    gateway.ready()
    second = subprocess.run(
        [sys.executable, "-m", "specl.daemons.gateway"],
        env=os.environ | gateway.instance.environment(), capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert second.returncode == 75 and f"pid {gateway.process.pid}" in second.stderr


def test_it_stops_in_time_with_streams_open(running):
    instance = running.instance
    running.stop()
    gateway = Gateway(instance)
    url = gateway.ready()
    ask = {"messages": [{"role": "user", "content": "long"}], "max_tokens": 3000, "stream": True, "temperature": 0}
    with (
        httpx.Client(base_url=url, timeout=20) as http,
        http.stream("GET", "/api/events") as events,
        http.stream("POST", "/v1/chat/completions", json=ask) as answer,
    ):
        next(events.iter_raw())
        next(answer.iter_raw())
        gateway.stop()
    wait_until(lambda: instance.status("inference")["queue"]["in_flight"] == 0, 3, "the answer is cancelled")
    assert "Traceback" not in gateway.output.read_text()


def test_page_and_state_are_complete(lone):
    gateway = lone()
    with httpx.Client(base_url=gateway.ready(), timeout=10) as http:
        assert "<title>SpecLoRA" in http.get("/").text
        state = http.get("/api/state").json()
        with http.stream("GET", "/api/events") as events:
            line = next(events.iter_lines())
    assert set(state) == {"status", "points", "answers", "costly", "marks", "history"}
    assert json.loads(line.removeprefix("data: ")).keys() == state.keys()


def test_health_asks_inference_alone_and_not_every_time(tmp_path, monkeypatch):
    import asyncio

    from specl.daemons.gateway import dashboard
    from specl.shared.messaging.client import Client, DaemonStatuses
    from specl.shared.paths import Paths
    from specl.shared.settings.schema import Settings

    asked = []
    monkeypatch.setattr(
        Client, "status", lambda self, timeout_s, roles: asked.append(roles) or DaemonStatuses(None, None, None)
    )
    monkeypatch.setattr(dashboard, "system_status", None)  # what the page costs
    looker = dashboard.Dashboard(Paths(tmp_path, tmp_path).create(), Settings(), lambda: False)

    async def monitors():
        return await asyncio.gather(*[looker.inference_state() for _ in range(20)])

    assert asyncio.run(monitors()) == ["stopped"] * 20 and asked == [("inference",)]


def test_pieces_do_not_wait_for_acknowledgements():
    from specl.daemons.gateway.service import listen

    with listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        assert accepted.proto == socket.IPPROTO_TCP  # what asyncio looks at before it sets TCP_NODELAY
        accepted.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "'::1'"])
def test_both_loopback_addresses_are_served(lone, host):
    port = lone(f"gateway: {{host: {host}, port: 0}}\n").ready().rpartition(":")[2]
    for address in ("127.0.0.1", "[::1]", "localhost"):
        assert httpx.get(f"http://{address}:{port}/").status_code == 200


def test_a_taken_second_loopback_stops_nothing():
    with socket.create_server(("127.0.0.1", 0)) as first:
        port = first.getsockname()[1]
        (only,) = listen_on_loopbacks("::1", port)
        only.close()


def test_junk_from_a_page_fills_no_log(lone):
    gateway = lone()
    host, port = gateway.ready().removeprefix("http://").split(":")
    upgrade = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    for junk in (b"\x16\x03\x01 junk\r\n\r\n", upgrade):
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(junk)
            connection.recv(4096)
    gateway.stop()
    assert "nvalid HTTP" not in gateway.output.read_text() and "pgrade" not in gateway.output.read_text()
