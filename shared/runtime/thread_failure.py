"""What ends a daemon's thread ends the daemon: its loop raises it, and the supervisor starts the daemon again."""


def raise_failure(failure: BaseException) -> None:
    """Raise what ended a thread.

    What is no Exception (SystemExit out of custom code, a panic of native code) becomes a RuntimeError: it must not choose the
    exit code of the daemon, because 78 would stop every daemon.
    """
    if isinstance(failure, Exception):
        raise failure
    raise RuntimeError(f"a thread ended with {type(failure).__name__}: {failure}") from failure
