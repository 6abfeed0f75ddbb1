"""Base URLs and probes as people write them."""

import asyncio

import httpx2 as httpx
import pytest

from specl.daemons.gateway.app import make_app
from specl.daemons.gateway.url_paths import canonical_path
from specl.shared.paths import Paths
from specl.shared.settings.schema import Gateway, Settings

TOKEN = "sixteen-letters-x"


def status(tmp_path, method, path, token=TOKEN):
    """What the whole application answers where nothing else runs."""
    app = make_app(Paths(tmp_path, tmp_path).create(), Settings(gateway=Gateway()), TOKEN, lambda: False)

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as http:
            body = {"json": {"messages": [{"role": "user", "content": "hi"}]}} if method == "POST" else {}
            return (await http.request(method, path, headers={"Authorization": f"Bearer {token}"}, **body)).status_code

    return asyncio.run(ask())


@pytest.mark.parametrize("base", ["/v1", "", "/v1/", "//v1", "/v1/v1"])
def test_every_spelling_of_the_base_url_works(tmp_path, base):
    assert status(tmp_path, "GET", f"{base}/models") == 200
    assert status(tmp_path, "GET", f"{base}/models/speclora") == 200
    assert status(tmp_path, "POST", f"{base}/chat/completions/") == 503  # inference does not run: it was found
    assert status(tmp_path, "GET", f"{base}/models", token="wrong") == 401


@pytest.mark.parametrize("path", ["/health", "/healthz", "/v1/health", "/health/", "/readyz", "/livez", "/ping"])
def test_probes_of_health_need_no_token(tmp_path, path):
    assert status(tmp_path, "GET", path, token="wrong") == status(tmp_path, "HEAD", path, token="wrong") == 503


@pytest.mark.parametrize(
    "path", ["/", "/api/train", "/v1", "/v1/", "/v1/api/train", "/metrics", "/x/v1/models", "/style.css"]
)
def test_other_paths_stay_as_they_are(path):
    assert canonical_path(path) == path
    assert canonical_path("/v1/models//home/me/model") == "/v1/models//home/me/model"
