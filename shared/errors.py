"""The one error tree. The command line prints these in one line with their hint; anything else is a bug and shows its traceback."""

import errno

_WRONG_PATH = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EINVAL)


class SpecLoraError(Exception):
    """Root of every error that a user is meant to read. `hint` says what to do; `exit_code` is the command's."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def disk_failed(error: BaseException) -> bool:
    """Whether an OSError is behind it: that may pass though no file changes."""
    cause = error.__cause__
    return cause is not None and (isinstance(cause, OSError) or disk_failed(cause))


class ConfigError(SpecLoraError):
    """A setting, argument or path is unusable; retrying without a change cannot help."""

    exit_code = 2


START_HINT = "start it with `honcho start`"


class DaemonUnreachable(SpecLoraError):
    """No answer from a daemon."""

    exit_code = 3


class AlreadyRunning(ConfigError):
    """Another process holds the lock of this role on this run directory."""


class WireError(SpecLoraError):
    """Bytes that are not a record or message of a known version."""


class ModelError(ConfigError):
    """A model, tokenizer or pair of them cannot be used."""


class ModelUnavailable(ModelError):
    """A model cannot be had now, because a network or a disk failed. Unlike other ConfigErrors it may pass: daemons retry."""

    exit_code = 1


def model_error(message: str, hint: str, cause: Exception) -> ModelError:
    """ModelUnavailable where the disk or the network refused, ModelError where a file is missing or is no model."""
    refused = isinstance(cause, OSError) and cause.errno is not None and cause.errno not in _WRONG_PATH
    return (ModelUnavailable if refused else ModelError)(message, hint)


class AdapterRejected(SpecLoraError):
    """An adapter directory failed verification; the message lists every reason found."""


class OutboxFull(SpecLoraError):
    """The outbox could not take a record (size cap or disk); accepted records are untouched."""


class StoreError(SpecLoraError):
    """The store cannot be opened, upgraded or written."""


class StoreTooNew(StoreError, ConfigError):
    """The store was written by a newer program; retrying cannot help."""


class RequestRejected(SpecLoraError):
    """A request that the server will not run: empty, too long, bad sampling."""

    exit_code = 2


class ContextExceeded(RequestRejected):
    """The prompt does not fit; the message names its size and the limit. A shorter one may be served."""


class ServerBusy(RequestRejected):
    """The queue is full; asking again later may help."""

    exit_code = 1


class Interrupted(SpecLoraError):
    """Work stopped because it was asked to stop."""
