"""One spelling for each path of the API: base URLs are given with and without `/v1`, with it twice, and with slashes too many;
load balancers ask for health under several names. Knows paths, no route.
"""

import re

_PARTS = re.compile(r"/*((?:v1/+)*)(.*?)/*", re.DOTALL)
_API = {"chat/completions", "completions", "models"}
_HEALTH = {"health", "healthz", "livez", "readyz", "ping"}


def canonical_path(path: str) -> str:
    """The path under which a route is found; a path of no API route stays as it is."""
    match = _PARTS.fullmatch(path)
    assert match is not None  # it matches every text
    rest = re.sub("^chat/+", "chat/", match[2])
    if rest in _HEALTH:
        return "/health"
    return f"/v1/{rest}" if rest in _API or rest.startswith("models/") else path
