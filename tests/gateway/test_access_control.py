"""Who may come in, and what every answer says to browsers."""

import asyncio
import socket
import time

import httpx2 as httpx
import pytest

from specl.daemons.gateway.access_control import RateLimit, host_name
from specl.daemons.gateway.app import make_app
from specl.shared.errors import ConfigError
from specl.shared.messaging.endpoints import check_exposure, gateway_token
from specl.shared.paths import Paths
from specl.shared.settings.schema import Gateway as Settings
from specl.shared.settings.schema import Settings as Everything
from tests.harness.waiting import wait_until

ASK = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
STATE_CHANGING = ("/api/train", "/api/rollback", "/v1/chat/completions", "/v1/completions")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8080", "", "localhost.evil.example", "[", "a b"])
def test_a_foreign_host_name_is_refused(http, host):
    for path in ("/", "/api/state", "/v1/models", "/health"):
        answer = http.get(path, headers={"Host": host})
        assert answer.status_code in (400, 403), host


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8080", "127.0.0.1:9", "[::1]:8080", "localhost."])
def test_our_own_names_are_fine(http, host):
    assert http.get("/", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("path", STATE_CHANGING)
@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:1", "http://localhost", "http://["]
)
def test_a_post_from_another_site_is_refused(http, path, origin):
    answer = http.post(path, json=ASK, headers={"Origin": origin})
    assert answer.status_code == 403 and answer.json()["error"]["code"] == "origin"


@pytest.mark.parametrize("path", STATE_CHANGING)
def test_a_form_or_plain_text_post_is_refused(http, path):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        assert http.post(path, content=b"{}", headers={"Content-Type": kind}).status_code == 415
    assert http.post(path, json=ASK, headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403


def test_post_from_our_page_is_allowed(http, running):
    answer = http.post("/api/train", json={}, headers={"Origin": running.url, "Sec-Fetch-Site": "same-origin"})
    assert answer.status_code == 503 and "trainer" in answer.json()["error"]["message"]  # it does not run here


def test_cors_stays_closed(http):
    preflight = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    answer = http.options("/v1/chat/completions", headers=preflight)
    assert answer.status_code in (403, 405)
    for reply in (answer, http.get("/v1/models", headers={"Origin": "http://evil.example"})):
        assert not [name for name in reply.headers if name.startswith("access-control")]


APP = "app://obsidian.md"


def test_only_a_listed_origin_may_ask(lone):
    gateway = lone(f"gateway: {{port: 0, token: sixteen-letters-x, origins: ['{APP}']}}\n")
    preflight = {
        "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
    }  # fmt: skip
    with httpx.Client(base_url=gateway.ready(), timeout=10) as http:
        answer = http.options(
            "/v1/chat/completions", headers={"Origin": APP, **preflight}
        )  # browsers show no token here
        assert answer.status_code == 204 and answer.headers["access-control-allow-origin"] == APP
        assert answer.headers["access-control-allow-headers"] == preflight["Access-Control-Request-Headers"]
        assert "POST" in answer.headers["access-control-allow-methods"] and answer.headers["vary"] == "Origin"
        theirs = {"Origin": APP, "Sec-Fetch-Site": "cross-site"}
        asked = http.post(
            "/v1/chat/completions", json=ASK, headers={**theirs, "Authorization": "Bearer sixteen-letters-x"}
        )
        assert asked.status_code == 503  # inference does not run here: it was let in
        tokenless = http.get("/v1/models", headers=theirs)
        assert tokenless.status_code == 401  # an origin is no password
        for reply in (asked, tokenless):
            assert (reply.headers["access-control-allow-origin"], reply.headers["vary"]) == (APP, "Origin")
        assert (
            http.options("/v1/models", headers={"Origin": APP, "Host": "evil.example", **preflight}).status_code == 403
        )
        for origin in ("app://obsidian.md.evil.example", "APP://obsidian.md", "http://evil.example", "null"):
            for reply in (
                http.options("/v1/chat/completions", headers={"Origin": origin, **preflight}),
                http.post("/v1/chat/completions", json=ASK, headers={"Origin": origin}),
            ):
                assert reply.status_code == 403 and "access-control-allow-origin" not in reply.headers, origin
                assert "gateway.origins" in reply.json()["error"]["message"]


@pytest.mark.parametrize("origin", ["*", "null", "http://*", "http://a.example/", "a.example", "HTTP://a.example"])
def test_inexact_origin_is_a_settings_error(origin):
    with pytest.raises(ValueError, match="is no origin"):
        Settings(origins=[origin])


def test_every_answer_carries_a_strict_policy(http):
    for path in ("/", "/app.js", "/api/state", "/nothing"):
        headers = http.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


def test_token_leaves_only_page_and_health_open(lone):
    gateway = lone("gateway: {port: 0, token: sixteen-letters-x}\n")
    with httpx.Client(base_url=gateway.ready(), timeout=10) as http:
        for path in ("/v1/models", "/metrics", "/api/state", "/api/events", "/nothing"):
            answer = http.get(path)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key", path
        assert http.get("/v1/models", headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert http.get("/v1/models", headers={"Authorization": "Bearer sixteen-letters-x"}).status_code == 200
        assert http.get("/").status_code == 200 and http.get("/health").status_code == 503


@pytest.mark.parametrize(
    "settings, token, names",
    [
        (Settings(host="0.0.0.0"), None, ("allow_remote", "token")),
        (Settings(host="::", allow_remote=True), None, ("token",)),
        (Settings(host="my.name"), "a" * 16, ("allow_remote",)),
    ],
)
def test_beyond_loopback_needs_a_setting_and_a_token(settings, token, names):
    with pytest.raises(ConfigError) as error:
        check_exposure(settings, token)
    assert all(name in str(error.value) for name in names)


@pytest.mark.parametrize("ending", ["\n", "\r\n", " ", "\t"])
def test_white_space_around_the_token_is_stripped(monkeypatch, ending):
    monkeypatch.setenv("SPECL_GATEWAY_TOKEN", "sixteen-letters-x" + ending)
    assert gateway_token(Settings()) == "sixteen-letters-x"
    monkeypatch.delenv("SPECL_GATEWAY_TOKEN")
    assert gateway_token(Settings(token=" sixteen-letters-x" + ending)) == "sixteen-letters-x"


@pytest.mark.parametrize(
    "token", ["sixteen-lettérs-x", "sixteen letters x", "sixteen-\x01letters", "   \n", "short\n" + " " * 20]
)
def test_an_unsendable_token_is_refused(monkeypatch, token):
    monkeypatch.setenv("SPECL_GATEWAY_TOKEN", token)
    with pytest.raises(ConfigError, match="SPECL_GATEWAY_TOKEN"):
        gateway_token(Settings())
    monkeypatch.delenv("SPECL_GATEWAY_TOKEN")
    with pytest.raises(ConfigError, match="gateway.token"):
        gateway_token(Settings(token=token + " " * 16))


def test_loopback_or_all_of_it_is_fine():
    for host in ("127.0.0.1", "::1", "localhost"):
        check_exposure(Settings(host=host), None)
    check_exposure(Settings(host="0.0.0.0", allow_remote=True), "a" * 16)


def test_rate_limit_is_per_address_and_recovers():
    rate = RateLimit(60)
    assert all(rate.allows("a", 0.0) for _ in range(60))
    assert not rate.allows("a", 0.0) and rate.allows("b", 0.0)
    assert rate.allows("a", 1.0) and not rate.allows("a", 1.0)
    assert RateLimit(0).allows("a", 0.0)
    for number in range(5000):
        rate.allows(str(number), 2.0)
    assert len(rate) <= 4096


def posts(tmp_path, trusted, *forwarded):
    """The statuses of posts that a proxy on this machine passes on, with a limit of one a minute."""
    settings = Everything(gateway=Settings(requests_per_minute=1, trusted_proxies=trusted))
    app = make_app(Paths(tmp_path, tmp_path).create(), settings, None, lambda: False)
    transport = httpx.ASGITransport(app, client=("127.0.0.1", 1))

    async def ask():
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
            return [
                (await http.post("/api/train", json={}, headers={"X-Forwarded-For": names})).status_code
                for names in forwarded
            ]

    return asyncio.run(ask())


def test_clients_behind_a_trusted_proxy_are_kept_apart(tmp_path):
    assert posts(tmp_path, ["127.0.0.1"], "10.0.0.1", "10.0.0.2", "10.0.0.1") == [503, 503, 429]
    assert posts(tmp_path, ["127.0.0.0/8"], "10.0.0.1", "faked, 10.0.0.1") == [503, 429]
    assert posts(tmp_path, [], "10.0.0.1", "10.0.0.2") == [503, 429]


@pytest.mark.parametrize("proxy", ["*", "proxy.example", "10.0.0.1/8", ""])
def test_inexact_proxy_is_a_settings_error(proxy):
    with pytest.raises(ValueError, match="is no address"):
        Settings(trusted_proxies=[proxy])


def test_too_many_requests_are_a_429(lone):
    gateway = lone("gateway: {port: 0, requests_per_minute: 2}\n")
    with httpx.Client(base_url=gateway.ready(), timeout=10) as http:
        codes = [http.post("/v1/chat/completions", json=ASK).status_code for _ in range(4)]
    assert codes == [503, 503, 429, 429]


def test_host_names_are_read_as_browsers_write_them():
    assert host_name("Localhost:80") == "localhost" and host_name("[::1]:80") == "::1" and host_name("[") == ""


def raw(url, *parts, pause_s=0.2, most_s=15.0):
    """Send parts with pauses over a bare socket: what came back, and whether the server closed it."""
    host, port = url.removeprefix("http://").split(":")
    start, said, waiting = time.monotonic(), b"", list(parts)
    with socket.create_connection((host, int(port)), timeout=pause_s) as connection:
        while time.monotonic() - start < most_s:
            try:
                if waiting:
                    connection.sendall(waiting.pop(0))
                if not (piece := connection.recv(65536)):
                    return said, True
                said += piece
            except TimeoutError:
                pass
            except (BrokenPipeError, ConnectionResetError):
                return said, True
    return said, False


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 500\r\n"


def test_probes_without_a_host_are_answered(running):
    for path in (b"/health", b"/v1/models"):
        said, _ = raw(running.url, b"GET " + path + b" HTTP/1.0\r\n\r\n", most_s=3)
        assert said.startswith(b"HTTP/1.1 200"), said
    said, _ = raw(running.url, b"GET /health HTTP/1.0\r\nHost: evil.example\r\n\r\n", most_s=3)
    assert said.startswith(b"HTTP/1.1 403")
    post = b"POST /api/train HTTP/1.0\r\nOrigin: http://evil.example\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
    assert raw(running.url, post, most_s=3)[0].startswith(b"HTTP/1.1 403")


def test_trickling_headers_and_bodies_are_cut_off(lone):
    url = lone("gateway: {port: 0, request_timeout_s: 1}\n").ready()
    for parts in ([], [b"GET"], [b"GET / HT"] + [b"x"] * 30):
        assert raw(url, *parts) == (b"", True), parts
    said, closed = raw(url, HEAD + b"\r\n", *[b"{"] * 30)
    assert said.startswith(b"HTTP/1.1 408") and b"request_timeout_s" in said and closed
    with httpx.Client(base_url=url, timeout=10) as http:
        assert http.get("/").status_code == 200  # others are served all the while


def test_an_answer_may_take_longer_than_its_question(lone):
    url = lone("gateway: {port: 0, request_timeout_s: 1}\n").ready()
    said, closed = raw(url, b"GET /api/events HTTP/1.1\r\nHost: localhost\r\n\r\n", most_s=6)
    assert said.startswith(b"HTTP/1.1 200") and b"data: " in said and not closed


def test_open_pages_are_limited_per_address(lone):
    url = lone("gateway: {port: 0, max_event_streams: 3, max_event_streams_per_address: 2}\n").ready()

    def open_page():
        http = httpx.Client(base_url=url, timeout=10)
        answer = http.send(http.build_request("GET", "/api/events"), stream=True)
        if answer.status_code == 200:
            answer.pieces = answer.iter_bytes()  # held: a dropped iterator closes the answer
            next(answer.pieces)
        return http, answer

    pages = [open_page() for _ in range(3)]
    assert [answer.status_code for _, answer in pages] == [200, 200, 429]
    assert "per_address" in pages[2][1].read().decode()
    pages[0][0].close()
    wait_until(lambda: _opens(open_page), 20, "a closed page makes room for another")
    for http, _ in pages:
        http.close()


def _opens(open_page):
    http, answer = open_page()
    http.close()
    return answer.status_code == 200
