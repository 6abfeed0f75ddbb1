"""GGUF files as models of this program: converted once into the models folder, whole or not at all.

`import_gguf` gives a model a name; `in_place` converts what a path or another program's name stands for, when first used.
"""

import hashlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from specl.shared.errors import ModelError
from specl.shared.models import builtin
from specl.shared.models.gguf_file import convert, size_needed
from specl.shared.models.gguf_tensors import Quantize
from specl.shared.runtime.atomic_files import atomic_dir

NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z._+-]{0,99}")
IN_PLACE = "converted"  # folder of what nobody named
TAKEN = {builtin.NAME, "drafts", IN_PLACE}
MAGIC = b"GGUF"

Say = Callable[[str], None]


def is_gguf(path: Path) -> bool:
    """Whether `path` is a file that begins as GGUF does, whatever it is called, or is called .gguf."""
    try:
        with open(path, "rb") as file:
            return file.read(4) == MAGIC or path.suffix == ".gguf"
    except OSError:
        return False


def suggested_name(text: str) -> str:
    """A model's name out of a file's, or out of Ollama's or LM Studio's name for it."""
    text = text.removeprefix("ollama:").removeprefix("lmstudio:").removesuffix(":latest")
    text = re.sub(r"[^0-9A-Za-z._+-]+", "-", text.rsplit("/", 1)[-1].removesuffix(".gguf"))
    return text.strip("-._").lower()[:100] or "model"


def import_gguf(gguf: Path, models: Path, name: str, quantize: Quantize, say: Say) -> Path:
    """Convert `gguf` to the model `name`; its folder. Raises ModelError for a bad name or file, or too little disk."""
    if not NAME.fullmatch(name) or name in TAKEN:
        raise ModelError(f"a model cannot be called {name!r}", "use letters, digits, dots and dashes: --name my-model")
    final = models / name
    if final.exists():
        raise ModelError(f"there is already a model {name} at {final}", "give another --name, or remove that folder")
    return _converted(gguf, final, models, quantize, say)


def place_of(gguf: Path, models: Path) -> Path:
    """Where the conversion of a GGUF file that lies elsewhere is, or will be; another place once the file has changed.

    Raises ModelError where the file cannot be read.
    """
    try:
        real = gguf.resolve(strict=True)
        info = real.stat()
    except OSError as error:
        raise ModelError(f"{gguf} cannot be read: {error.strerror}") from error
    seen = hashlib.sha256(f"{real}:{info.st_size}:{info.st_mtime_ns}".encode()).hexdigest()[:12]
    return models / IN_PLACE / f"{suggested_name(gguf.name)}-{seen}"


def in_place(gguf: Path, models: Path, say: Say) -> Path:
    """The converted folder of a GGUF file that lies elsewhere, made on first use. Raises ModelError."""
    final = place_of(gguf, models)
    if (final / "config.json").is_file():
        return final
    return _converted(gguf, final, models, "keep", say)


def _converted(gguf: Path, final: Path, models: Path, quantize: Quantize, say: Say) -> Path:
    needed = size_needed(gguf, quantize)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with builtin.alone(models):
            if (final / "config.json").is_file():  # another process made it while this one waited
                return final
            free = shutil.disk_usage(models).free
            if free < needed:
                raise ModelError(
                    f"the converted model needs {needed / 1e9:.1f} GB; {models} has {free / 1e9:.1f} GB free",
                    "free some disk, set SPECL_MODELS to another one, or take --quantize 4",
                )
            say(f"converting {gguf.name} (once, {needed / 1e9:.1f} GB)")
            with atomic_dir(final, sync=True) as folder:
                convert(gguf, folder, quantize)
    except OSError as error:
        raise ModelError(
            f"cannot write the model under {models}: {error.strerror or error}", "free some disk, or set SPECL_MODELS"
        ) from error
    return final
