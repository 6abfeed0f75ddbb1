"""What an adapter's manifest and weights file must look like, parsed strictly: a wrong type is a reason, never a crash.

Knows bytes and their meaning, no folders, no modules. `adapters.py` decides which files; the engine looks at tensors.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from specl.shared.errors import AdapterRejected

MAX_HEADER = 16 * 1024 * 1024  # of a safetensors file
MOST_REASONS = 8  # told of one file; a header may have thousands of wrong entries
_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8}  # an adapter holds real numbers only


def _no_odd_generations(training: dict[str, Any]) -> dict[str, Any]:
    """`generations` decides what a purge takes along, so it must be what it seems."""
    named = training.get("generations", [])
    if not isinstance(named, list) or not all(isinstance(id, str) for id in named):
        raise ValueError("generations is not a list of ids")
    return training


@dataclass(frozen=True, slots=True)
class Manifest:
    """What manifest.json holds. `files` maps each other file to its sha256; `metrics` has held-out figures before and
    after; `base_fingerprint` names the pristine draft, `tokenizer_fingerprint` its vocabulary.
    """

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    id: str
    kind: str
    created_at: float
    base_model: str
    base_fingerprint: str
    target_fingerprint: str
    tokenizer_fingerprint: str
    parent_id: str
    training_run_id: str
    rank: int
    alpha: float
    modules: list[str]
    change_norm: float
    metrics: dict[str, Any]
    training: Annotated[dict[str, Any], AfterValidator(_no_odd_generations)]
    files: dict[str, str] = field(default_factory=dict)

    @property
    def score(self) -> float | None:
        """Held-out agreement, or None where it is not a finite number."""
        value = self.metrics.get("heldout_after")
        usable = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        return float(value) if usable else None

    @property
    def generations(self) -> list[str]:
        """Ids of the generations that it learned from."""
        return self.training.get("generations", [])


def reasons(error: ValidationError) -> str:
    """Every problem that pydantic found, in one sentence: `rank: Input should be a valid integer; ...`."""
    found = []
    for item in error.errors(include_url=False, include_context=False, include_input=False):
        where = ".".join(str(part) for part in item["loc"])
        found.append(f"{where}: {item['msg']}" if where else item["msg"])
    found = list(dict.fromkeys(found))
    more = f"; and {len(found) - MOST_REASONS} more" if len(found) > MOST_REASONS else ""
    return "; ".join(found[:MOST_REASONS]) + more


def parse_manifest(document: bytes) -> Manifest:
    """A manifest from its JSON. Raises AdapterRejected that names every field of a wrong type."""
    try:
        return _MANIFEST.validate_json(document)
    except ValidationError as error:
        raise AdapterRejected(f"its manifest is malformed: {reasons(error)}") from error


_MANIFEST = TypeAdapter(Manifest)


class _Tensor(BaseModel):
    """One entry of a safetensors header."""

    model_config = ConfigDict(strict=True, extra="forbid")

    dtype: Literal["F32", "F16", "BF16", "F64"]
    shape: list[Annotated[int, Field(ge=0)]]
    data_offsets: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)]

    @property
    def size(self) -> int:
        """Bytes that its shape and type need."""
        return _BYTES[self.dtype] * math.prod(self.shape)


_HEADER = TypeAdapter(dict[str, Any], config=ConfigDict(strict=True))
_TENSORS = TypeAdapter(dict[str, _Tensor], config=ConfigDict(strict=True))


def header_problem(path: Path) -> str:
    """Why `path` is not a whole safetensors file of real numbers, or empty. Raises OSError.

    The header must be as long as it says and no longer than the limit; the tensors must fill the file from end to end.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            return f"{path.name} is not a whole safetensors file"
        text = file.read(length)
    try:
        entries = _HEADER.validate_json(text)
        entries.pop("__metadata__", None)
        tensors = _TENSORS.validate_python(entries)
    except ValidationError as error:
        return f"{path.name} is not a safetensors file of real numbers: {reasons(error)}"
    return _layout_problem(path.name, tensors, size - 8 - length)


def _layout_problem(name: str, tensors: dict[str, _Tensor], size: int) -> str:
    """The tensors must lie one after the other, each as long as its shape says, up to the file's end."""
    place = 0
    for key, tensor in sorted(tensors.items(), key=lambda item: item[1].data_offsets):
        start, end = tensor.data_offsets
        if start != place or end - start != tensor.size:
            return f"{name}: {key} has data_offsets [{start}, {end}], not [{place}, {place + tensor.size}]"
        place = end
    if not tensors:
        return f"{name} is truncated: it holds no tensor"
    return f"{name} is truncated: it has {size} bytes of data, not {place}" if place != size else ""
