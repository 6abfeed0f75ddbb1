"""GGUF files as models of this program: converted once into the models folder, completely or
not at all.

`import_gguf` converts under a name that the user chose; `ensure_converted` converts a file that
settings refer to by path or by another program's name, on first use.
"""

import hashlib
import re
import shutil
from pathlib import Path

from specl.shared.errors import ModelError, ModelUnavailable, model_error
from specl.shared.models import builtin
from specl.shared.models.gguf_file import convert, size_needed
from specl.shared.models.gguf_tensors import Quantize
from specl.shared.models.report import Report
from specl.shared.runtime.atomic_files import atomic_dir

NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z._+-]{0,99}")
CONVERTED = "converted"  # folder of the conversions that have no name of their own
RESERVED_NAMES = {builtin.NAME, "drafts", CONVERTED}
MAGIC = b"GGUF"


def is_gguf(path: Path) -> bool:
    """Whether `path` is a readable file that begins with GGUF's magic bytes or whose name ends in
    .gguf.
    """
    try:
        with open(path, "rb") as file:
            return file.read(4) == MAGIC or path.suffix == ".gguf"
    except OSError:
        return False


def suggested_name(text: str) -> str:
    """A name for a model, from a file's name or from Ollama's or LM Studio's name for it."""
    text = text.removeprefix("ollama:").removeprefix("lmstudio:").removesuffix(":latest")
    text = re.sub(r"[^0-9A-Za-z._+-]+", "-", text.rsplit("/", 1)[-1].removesuffix(".gguf"))
    return text.strip("-._").lower()[:100] or "model"


def import_gguf(gguf: Path, models: Path, name: str, quantize: Quantize, report: Report) -> Path:
    """Convert `gguf` into the folder of the model `name` and return it.

    Raises ModelError for a bad name or file, ModelUnavailable for too little disk.
    """
    if not NAME.fullmatch(name) or name in RESERVED_NAMES:
        raise ModelError(f"a model cannot be called {name!r}", "use letters, digits, dots and dashes: --name my-model")
    final = models / name
    if final.exists():
        raise ModelError(f"there is already a model {name} at {final}", "give another --name, or remove that folder")
    return _convert(gguf, final, models, quantize, report)


def conversion_folder(gguf: Path, models: Path) -> Path:
    """The folder that a GGUF file's conversion is in, or will be in; another one once the file has
    changed.

    Raises ModelError where the file cannot be read.
    """
    try:
        real = gguf.resolve(strict=True)
        info = real.stat()
    except OSError as error:
        raise model_error(f"{gguf} cannot be read: {error.strerror}", "", error) from error
    version = hashlib.sha256(f"{real}:{info.st_size}:{info.st_mtime_ns}".encode()).hexdigest()[:12]
    return models / CONVERTED / f"{suggested_name(gguf.name)}-{version}"


def ensure_converted(gguf: Path, models: Path, report: Report) -> Path:
    """The folder of a GGUF file's conversion, which is made on first use. Raises ModelError, and
    ModelUnavailable where the disk refuses.
    """
    final = conversion_folder(gguf, models)
    if (final / "config.json").is_file():
        return final
    return _convert(gguf, final, models, "keep", report)


def _convert(gguf: Path, final: Path, models: Path, quantize: Quantize, report: Report) -> Path:
    needed = size_needed(gguf, quantize)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with builtin.exclusive(models):
            if (final / "config.json").is_file():  # another process converted it while this one waited
                return final
            free = shutil.disk_usage(models).free
            if free < needed:
                raise ModelUnavailable(
                    f"the converted model needs {needed / 1e9:.1f} GB; {models} has {free / 1e9:.1f} GB free",
                    "free some disk, set SPECL_MODELS to another one, or take --quantize 4",
                )
            report(f"converting {gguf.name} (once, {needed / 1e9:.1f} GB)")
            with atomic_dir(final, sync=True) as folder:
                convert(gguf, folder, quantize)
    except OSError as error:
        raise ModelUnavailable(
            f"cannot write the model under {models}: {error.strerror or error}", "free some disk, or set SPECL_MODELS"
        ) from error
    return final
