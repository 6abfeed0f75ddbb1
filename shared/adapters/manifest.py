"""The format of an adapter's manifest and of its weights file's header, parsed strictly: a wrong
type is a problem that is reported, never a crash.

Knows bytes and their meaning, no folders, no modules. registry.py decides which files; tensors.py
checks the tensors.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from specl.shared.errors import AdapterRejected

MAX_HEADER = 16 * 1024 * 1024  # of a safetensors file
MAX_PROBLEMS = 8  # reported of one file; a header may have thousands of wrong entries
_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8}  # an adapter holds real numbers only


def _check_generations(training: dict[str, Any]) -> dict[str, Any]:
    """A purge removes adapters by their `generations`, so these must be ids."""
    ids = training.get("generations", [])
    if not isinstance(ids, list) or not all(isinstance(id, str) for id in ids):
        raise ValueError("generations is not a list of ids")
    return training


@dataclass(frozen=True, slots=True)
class Manifest:
    """What manifest.json holds. `files` maps each other file to its sha256; `metrics` has held-out
    figures before and after; `base_fingerprint` names the pristine draft, `tokenizer_fingerprint`
    its vocabulary.
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
    training: Annotated[dict[str, Any], AfterValidator(_check_generations)]
    files: dict[str, str] = field(default_factory=dict)

    @property
    def score(self) -> float | None:
        """Held-out agreement, or None where it is not a finite number."""
        value = self.metrics.get("heldout_after")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return None
        return float(value) if math.isfinite(value) else None

    @property
    def generations(self) -> list[str]:
        """Ids of the generations that the adapter learned from."""
        ids: list[str] = self.training.get("generations", [])
        return ids


def reasons(error: ValidationError) -> str:
    """pydantic's problems in one sentence: `rank: Input should be a valid integer; ...`; the first
    MAX_PROBLEMS of them.
    """
    problems = []
    for item in error.errors(include_url=False, include_context=False, include_input=False):
        where = ".".join(str(part) for part in item["loc"])
        problems.append(f"{where}: {item['msg']}" if where else item["msg"])
    problems = list(dict.fromkeys(problems))
    more = f"; and {len(problems) - MAX_PROBLEMS} more" if len(problems) > MAX_PROBLEMS else ""
    return "; ".join(problems[:MAX_PROBLEMS]) + more


def parse_manifest(document: bytes) -> Manifest:
    """A manifest from its JSON. Raises AdapterRejected with every field of a wrong type."""
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
    """Why `path` is not a complete safetensors file of real numbers; empty where it is one. Raises
    OSError.

    The header must have the length that it states, at most MAX_HEADER, and the tensors must fill
    the rest of the file.
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
    """The tensors must follow one another without gaps, each with the bytes of its shape, up to the
    end of the file.
    """
    position = 0
    for key, tensor in sorted(tensors.items(), key=lambda item: item[1].data_offsets):
        start, end = tensor.data_offsets
        if start != position or end - start != tensor.size:
            return f"{name}: {key} has data_offsets [{start}, {end}], not [{position}, {position + tensor.size}]"
        position = end
    if not tensors:
        return f"{name} is truncated: it holds no tensor"
    return f"{name} is truncated: it has {size} bytes of data, not {position}" if position != size else ""
