"""Where daemons listen, and who may connect: addresses from the settings, CURVE keys from var/keys, the gateway's token.
Knows no socket.

ipc in a private folder is the default: whoever is this user may talk to the daemons, nobody else. TCP reaches further (a web
page reaches a port of loopback, too), so it needs keys. Once keys are made, every socket uses them, ipc too. `server.json`
stays with the daemons; `client.json` is all that a client on another machine needs.
"""

import ipaddress
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from specl.shared.errors import ConfigError
from specl.shared.paths import ROLES, Paths
from specl.shared.runtime.atomic_files import write_file

if TYPE_CHECKING:
    from specl.shared.settings.schema import Bus, Gateway

TOKEN_LENGTH = 16
MAKE_TOKEN = "`openssl rand -hex 16` makes one"
MAKE_KEYS = "make them with `specl-ctl keys make`, or set bus.host to 127.0.0.1"


@dataclass(frozen=True, slots=True)
class Keys:
    """Z85 text as libzmq takes it. `server_secret` is empty on a machine that only connects."""

    server_public: str
    client_public: str
    client_secret: str
    server_secret: str = ""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One socket's address, and the keys it must show; None for a private ipc socket without keys."""

    address: str
    keys: Keys | None = None


def is_loopback(host: str) -> bool:
    """Whether nothing outside this machine reaches `host`. Names other than localhost are taken to be reachable."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_elsewhere(keys: Keys | None) -> bool:
    """Whether these are the keys of a machine that only connects: the daemons and their files are on another one."""
    return keys is not None and not keys.server_secret


def read_keys(folder: Path) -> Keys | None:
    """The keys in `folder`, or None where there are none. Raises ConfigError for unreadable, exposed or broken ones."""
    fields: dict[str, str] = {}
    for name in ("client.json", "server.json"):
        path = folder / name
        try:
            if path.stat().st_mode & 0o077:
                raise ConfigError(f"others may read the key file {path}", f"chmod 600 {path}")
            fields |= {key: str(value) for key, value in json.loads(path.read_text()).items()}
        except FileNotFoundError:
            continue
        except (OSError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"the key file {path} cannot be used: {error}", "make new ones: `specl-ctl keys make --force`"
            ) from error
    if not fields:
        return None
    try:
        return Keys(**fields)
    except TypeError as error:
        raise ConfigError(
            f"the keys in {folder} are incomplete", "make new ones: `specl-ctl keys make --force`"
        ) from error


def write_keys(folder: Path, keys: Keys) -> None:
    """Write new keys, the folder as 0700 and the files as 0600. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    client = {
        "server_public": keys.server_public,
        "client_public": keys.client_public,
        "client_secret": keys.client_secret,
    }
    for name, content in (("client.json", client), ("server.json", {"server_secret": keys.server_secret})):
        write_file(folder / name, json.dumps(content), sync=True)


def gateway_token(settings: "Gateway") -> str | None:
    """The bearer token, without white space around it. Raises ConfigError where it is too short, or cannot be sent."""
    variable = os.environ.get("SPECL_GATEWAY_TOKEN")
    source, token = ("SPECL_GATEWAY_TOKEN", variable) if variable else ("gateway.token", settings.token)
    if token is None:
        return None
    token = token.strip()  # a file that holds a secret often ends in a line break
    if len(token) < TOKEN_LENGTH:
        raise ConfigError(f"{source} has less than {TOKEN_LENGTH} characters", MAKE_TOKEN)
    if not all("!" <= character <= "~" for character in token):
        raise ConfigError(f"{source} holds a space, or a character beyond ASCII: no client can send it", MAKE_TOKEN)
    return token


def check_exposure(settings: "Gateway", token: str | None) -> None:
    """Raises ConfigError where other machines could connect without the settings allowing it and a token guarding it."""
    if is_loopback(settings.host):
        return
    missing = []
    if not settings.allow_remote:
        missing.append("gateway.allow_remote: true")
    if token is None:
        missing.append("a gateway.token (or SPECL_GATEWAY_TOKEN)")
    if missing:
        raise ConfigError(
            f"gateway.host {settings.host} is beyond loopback, which needs {' and '.join(missing)}",
            "set that, or gateway.host to 127.0.0.1",
        )


class Addresses:
    """Both endpoints of every role on one run directory.

    Without keys nothing is answered over TCP: on loopback the daemons make keys at their first start, beyond loopback a user
    makes them. Raises ConfigError for TCP beyond loopback without keys, and for a run directory whose name is too long for a
    socket.
    """

    def __init__(self, paths: Paths, bus: "Bus") -> None:
        self._paths, self._bus = paths, bus
        self.keys = read_keys(paths.keys)
        if bus.transport == "tcp" and not is_loopback(bus.host) and self.keys is None:
            raise ConfigError(
                f"bus.host {bus.host} is beyond loopback and there are no keys in {paths.keys}", MAKE_KEYS
            )

    def answer(self, role: str) -> Endpoint:
        """Where `role` answers requests."""
        return self._endpoint(role, 0)

    def publish(self, role: str) -> Endpoint:
        """Where `role` publishes hints."""
        return self._endpoint(role, 1)

    def _endpoint(self, role: str, offset: int) -> Endpoint:
        if self._bus.transport == "ipc":
            return Endpoint(self._paths.socket(role + ("-pub" if offset else "")), self.keys)
        host = f"[{self._bus.host}]" if ":" in self._bus.host else self._bus.host
        return Endpoint(f"tcp://{host}:{self._bus.port + 2 * ROLES.index(role) + offset}", self.keys)
