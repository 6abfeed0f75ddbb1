"""The run directory (`var/`): every file and folder in it by name. Knows layout and permissions,
nothing of contents.

The run directory is `SPECL_VAR`; without it `var/` of the checkout that this package runs from, or
of the checkout that is the current folder; without a checkout `~/.local/share/speclora`. Daemons
with different run directories share nothing.
"""

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from specl.shared.errors import ConfigError, SpecLoraError

# sockaddr_un.sun_path less its NUL: 108 on Linux, 104 on macOS
SOCKET_PATH_LIMIT = 103
DISK_REFUSES = (errno.ENOSPC, errno.EDQUOT, errno.EIO)  # may succeed later, unlike a missing permission
ROLES = ("inference", "collector", "trainer")  # each has two sockets on the bus
DAEMONS = (*ROLES, "gateway")
PRODUCERS = ("inference", "trainer")  # each has an outbox that the collector empties


@dataclass(frozen=True, slots=True)
class Paths:
    """The names in one run directory, and the folder of converted models."""

    root: Path
    models: Path

    @property
    def run(self) -> Path:
        """Sockets and locks (0700)."""
        return self.root / "run"

    @property
    def logs(self) -> Path:
        """Logs as JSON lines, one file for each daemon."""
        return self.root / "logs"

    @property
    def store(self) -> Path:
        """The SQLite file with all generations."""
        return self.root / "store.db"

    @property
    def pending_purge(self) -> Path:
        """The journal of an unfinished purge; removed when the purge is finished."""
        return self.root / "purge.pending"

    @property
    def adapters(self) -> Path:
        """Published adapters, `CURRENT` and aliases."""
        return self.root / "adapters"

    @property
    def answers(self) -> Path:
        """Past answers by client, which the n-gram drafter copies from."""
        return self.root / "answers"

    @property
    def hidden(self) -> Path:
        """Hidden states of stored generations, by id."""
        return self.root / "hidden"

    @property
    def training(self) -> Path:
        """Checkpoints of an unfinished training run."""
        return self.root / "training"

    @property
    def regression(self) -> Path:
        """Answers of the target to the shipped general prompts, by its fingerprint."""
        return self.root / "regression"

    @property
    def costs(self) -> Path:
        """Measured times of draft and target steps, by models and machine."""
        return self.root / "costs"

    @property
    def keys(self) -> Path:
        """CURVE keys of the bus, if any were made."""
        return self.root / "keys"

    def outbox(self, producer: str) -> Path:
        """The outbox of one of PRODUCERS."""
        return self.root / "outbox" / f"{producer}.db"

    def socket(self, name: str) -> str:
        """The ipc endpoint `name`. Raises ConfigError if its path is too long for a socket."""
        path = self.run / f"{name}.sock"
        if len(os.fsencode(path)) > SOCKET_PATH_LIMIT:
            raise ConfigError(
                f"the socket path {path} has {len(os.fsencode(path))} bytes; the system allows {SOCKET_PATH_LIMIT}",
                "set SPECL_VAR to a shorter folder",
            )
        return f"ipc://{path}"

    def create(self) -> "Paths":
        """Make the folders, private to this user.

        Raises ConfigError where permissions forbid it, SpecLoraError where the disk refuses: a full
        disk may have space again.
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


def default_root(environ: Mapping[str, str], package: Path, cwd: Path) -> Path:
    """The run directory by the rule at the top of this module. `package` is the `shared` folder of
    this package.
    """
    if environ.get("SPECL_VAR"):
        return Path(environ["SPECL_VAR"]).expanduser().absolute()
    for folder in (package.parent, cwd):
        if _is_checkout(folder):
            return folder / "var"
    return Path.home() / ".local" / "share" / "speclora"


def find_paths() -> Paths:
    """The run directory and the models folder of this environment. Creates nothing."""
    root = default_root(os.environ, Path(__file__).resolve().parent, Path.cwd())
    models = os.environ.get("SPECL_MODELS")
    return Paths(root, Path(models).expanduser().absolute() if models else root / "models")
