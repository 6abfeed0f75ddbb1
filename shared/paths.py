"""Every name under the run directory (`var/`). Knows layout and permissions, nothing of contents.

The run directory is `SPECL_VAR`; else `var/` of the checkout this package runs from or that is the current folder;
else `~/.local/share/speclora`. Two instances with different run directories never meet.
"""

import errno
import os
from dataclasses import dataclass
from pathlib import Path

from specl.shared.errors import ConfigError, SpecLoraError

# sockaddr_un.sun_path less its NUL: 108 on Linux, 104 on macOS
SOCKET_PATH_LIMIT = 103
DISK_REFUSES = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
ROLES = ("inference", "collector", "trainer")  # each has two sockets on the bus
DAEMONS = (*ROLES, "gateway")


@dataclass(frozen=True, slots=True)
class Paths:
    """One run directory."""

    root: Path
    models: Path

    @property
    def run(self) -> Path:
        """Sockets and locks (0700)."""
        return self.root / "run"

    @property
    def logs(self) -> Path:
        """JSON-lines logs, one a role."""
        return self.root / "logs"

    @property
    def store(self) -> Path:
        """The failure store."""
        return self.root / "store.db"

    @property
    def pending_purge(self) -> Path:
        """What an unfinished purge set out to do; gone once it has been done."""
        return self.root / "purge.pending"

    @property
    def adapters(self) -> Path:
        """Published adapters, `CURRENT` and aliases."""
        return self.root / "adapters"

    @property
    def answers(self) -> Path:
        """What the n-gram drafter remembers of past answers."""
        return self.root / "answers"

    @property
    def hidden(self) -> Path:
        """Spooled hidden states, by generation id."""
        return self.root / "hidden"

    @property
    def training(self) -> Path:
        """Checkpoints of an unfinished training run."""
        return self.root / "training"

    @property
    def regression(self) -> Path:
        """The target's own answers to the shipped general prompts, by its fingerprint."""
        return self.root / "regression"

    @property
    def costs(self) -> Path:
        """Calibrated costs, by models and machine."""
        return self.root / "costs"

    @property
    def keys(self) -> Path:
        """CURVE keys, where they were made."""
        return self.root / "keys"

    def outbox(self, producer: str) -> Path:
        """The outbox of one producer (`inference`, `trainer`)."""
        return self.root / "outbox" / f"{producer}.db"

    def socket(self, name: str) -> str:
        """The ipc endpoint `name`. Raises ConfigError where the path is too long for a socket."""
        path = self.run / f"{name}.sock"
        if len(os.fsencode(path)) > SOCKET_PATH_LIMIT:
            raise ConfigError(
                f"the socket path {path} has {len(os.fsencode(path))} bytes; the system allows {SOCKET_PATH_LIMIT}",
                "set SPECL_VAR to a shorter folder",
            )
        return f"ipc://{path}"

    def create(self) -> "Paths":
        """Make the folders, private to this user. Raises ConfigError where that is not allowed, SpecLoraError where the
        disk refuses: a full one may have room again.
        """
        folders = (self.run, self.logs, self.adapters, self.hidden, self.training, self.costs, self.root / "outbox")
        try:
            for folder in (self.root, *folders):
                folder.mkdir(parents=True, exist_ok=True)
            for folder in folders:
                folder.chmod(0o700)
            if not os.access(self.run, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            kind = SpecLoraError if error.errno in DISK_REFUSES else ConfigError
            raise kind(
                f"the run directory {self.root} is not writable: {error.strerror}", "set SPECL_VAR to a folder of yours"
            ) from error
        return self


def _is_checkout(folder: Path) -> bool:
    return (folder / "Procfile").is_file() and (folder / "configs" / "default.yaml").is_file()


def default_root(environ: dict[str, str] | os._Environ[str], here: Path, cwd: Path) -> Path:
    """Where `var/` is; see the module's first lines. `here` is this package's `shared` folder."""
    if environ.get("SPECL_VAR"):
        return Path(environ["SPECL_VAR"]).expanduser().absolute()
    for folder in (here.parent, cwd):
        if _is_checkout(folder):
            return folder / "var"
    return Path.home() / ".local" / "share" / "speclora"


def find_paths() -> Paths:
    """The run directory that the environment names. Creates nothing."""
    root = default_root(os.environ, Path(__file__).resolve().parent, Path.cwd())
    models = os.environ.get("SPECL_MODELS")
    return Paths(root, Path(models).expanduser().absolute() if models else root / "models")
