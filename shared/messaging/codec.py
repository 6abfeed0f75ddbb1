"""Records and messages as bytes: msgpack with a version and limits. The only file that knows the format.

A value that `decode` returns has exactly its declared fields and types, finite numbers and bounded sizes; everything
else raises WireError. Records of
version 1, which old outboxes and quarantines hold, are read as well. Knows nothing of sockets, files or models.
"""

import dataclasses
import hashlib
import math
import types
import typing
from collections.abc import Callable
from enum import StrEnum
from functools import cache, partial
from typing import Any

import msgpack  # type: ignore[import-untyped]  # it has no stubs

from specl.shared.errors import WireError
from specl.shared.messaging.messages import MESSAGES, RECORDS
from specl.shared.messaging.upgrade import upgrade_v1

VERSION = 2
MAX_FRAME = 16 * 1024 * 1024
MAX_RECORD = MAX_FRAME - 65_536  # a record must fit into the batch that carries it
MAX_ITEMS = 262_144
MAX_TOTAL_ITEMS = 1_048_576  # in all lists and maps of a frame together: a byte of it may become 60 in memory
MAX_CONTAINERS = 131_072  # lists and maps; an empty one is a byte on the wire and 64 in memory
MAX_TEXT = 4 * 1024 * 1024
MAX_DEPTH = 12
_KINDS = {cls.__name__: cls for cls in (*RECORDS, *MESSAGES)}


def kind_of(value: Any) -> str:
    """The name under which a record or message travels."""
    return type(value).__name__


def encode(value: Any) -> bytes:
    """Bytes of a record or message. Raises WireError where it breaks a limit, so that no peer has to."""
    if kind_of(value) not in _KINDS:
        raise WireError(f"{kind_of(value)} is no kind of record or message")
    try:
        data: bytes = msgpack.packb([VERSION, kind_of(value), _plain(value)], use_bin_type=True)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise WireError(f"{kind_of(value)} cannot be encoded: {error}") from error
    limit = MAX_RECORD if isinstance(value, RECORDS) else MAX_FRAME
    if len(data) > limit:
        raise WireError(f"{kind_of(value)} has {len(data)} bytes; the limit is {limit}")
    decode(data)  # an accepted record that its reader refuses would end in quarantine
    return data


def decode(data: bytes) -> Any:
    """The record or message in `data`. Raises WireError; the text never repeats what the bytes held."""
    if len(data) > MAX_FRAME:
        raise WireError(f"a frame of {len(data)} bytes; the limit is {MAX_FRAME}")
    budget = _Budget()
    try:
        outer = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            object_pairs_hook=budget.take_map,
            list_hook=budget.take_list,
            ext_hook=_no_extension,
            max_array_len=min(MAX_ITEMS, len(data)),  # msgpack allocates as many items as a list claims to have
            max_map_len=min(MAX_ITEMS, len(data)),
            max_str_len=MAX_TEXT,
            max_bin_len=MAX_FRAME,
        )
    except Exception as error:  # msgpack raises half a dozen unrelated types for hostile bytes; all mean the same
        raise WireError(f"not a message: {type(error).__name__}, {describe(data)}") from None
    if not (isinstance(outer, list) and len(outer) == 3):
        raise WireError(f"not a message: {describe(data)}")
    version, kind, body = outer
    cls = _KINDS.get(kind) if isinstance(kind, str) else None
    upgradable = version == 1 and cls in RECORDS
    if type(version) is not int or not (version == VERSION or upgradable):
        raise WireError(f"message version unknown; this program speaks {VERSION}, {describe(data)}")
    if cls is None:
        raise WireError(f"message kind unknown, {describe(data)}")
    if upgradable:
        body = upgrade_v1(cls.__name__, body)
    return _build(cls, body, cls.__name__)


def describe(data: bytes) -> str:
    """How rejected bytes are logged: by length and hash, never by content."""
    return f"{len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()[:12]}"


_SCALARS = {str, bytes, int, float, bool, type(None)}


def _plain(value: Any) -> Any:
    """A record or message as the scalars, lists and maps that msgpack knows."""
    cls = type(value)
    if cls in _SCALARS:
        return value
    if dataclasses.is_dataclass(cls):
        return {name: _plain(getattr(value, name)) for name in _hints(cls)}
    if isinstance(value, (list, tuple)):
        return [item if type(item) in _SCALARS else _plain(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return value


class _Budget:
    """Bounds what a frame becomes in memory while it is read. Raises ValueError for too much, and for a key that comes twice."""

    __slots__ = ("containers", "items")

    def __init__(self) -> None:
        self.containers = self.items = 0

    def take_map(self, pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            raise ValueError("duplicate key")
        self._count(2 * len(pairs))
        return fields

    def take_list(self, items: Any) -> Any:
        self._count(len(items))
        return items

    def _count(self, items: int) -> None:
        self.containers += 1
        self.items += items
        if self.containers > MAX_CONTAINERS or self.items > MAX_TOTAL_ITEMS:
            raise ValueError("too many items")


def _no_extension(code: int, data: bytes) -> Any:
    raise ValueError("extension type")


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _build(cls: type, body: Any, where: str) -> Any:
    checks = _checks(cls, where)
    if not isinstance(body, dict) or body.keys() != checks.keys():
        raise WireError(f"{where}: wrong fields")
    return cls(**{name: check(body[name], path) for name, (check, path) in checks.items()})


@cache
def _checks(cls: type, where: str) -> dict[str, tuple[Callable[[Any, str], Any], str]]:
    """By field: its checker, and its name in errors. The name is never taken from what came in."""
    return {name: (_checker(hint), f"{where}.{name}") for name, hint in _hints(cls).items()}


@cache
def _checker(hint: Any) -> Callable[[Any, str], Any]:
    """A function that returns a value of the type `hint`, and raises WireError for any other. An integer may stand for a float."""
    if isinstance(hint, types.UnionType):
        check = _checker(next(arm for arm in hint.__args__ if arm is not type(None)))
        may_lack = type(None) in hint.__args__
        return lambda value, where: None if value is None and may_lack else check(value, where)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return partial(_check_record, hint)
    if typing.get_origin(hint) is list:
        return partial(_check_list, *typing.get_args(hint))
    if typing.get_origin(hint) is dict:
        value_type = typing.get_args(hint)[1]
        return _check_json if value_type is Any else partial(_check_map, value_type)
    if issubclass(hint, StrEnum):
        return partial(_check_code, hint)
    return partial(_check_scalar, hint)


def _check_record(cls: type, value: Any, where: str) -> Any:
    return _build(cls, value, where)


def _check_list(item: Any, value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise WireError(f"{where}: not a list")
    check = _checker(item)
    return [check(v, where) for v in value]


def _check_code(hint: type[StrEnum], value: Any, where: str) -> StrEnum:
    if not isinstance(value, str):
        raise WireError(f"{where}: not text")
    try:
        return hint(value)
    except ValueError:
        raise WireError(f"{where}: a code that this program does not know") from None


def _check_map(item: Any, value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise WireError(f"{where}: not a map")
    if not all(isinstance(key, str) for key in value):
        raise WireError(f"{where}: a key that is not text")
    check = _checker(item)
    return {key: check(v, where) for key, v in value.items()}


def _check_json(value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise WireError(f"{where}: not a map")
    return _json(value, where, 0)


def _check_scalar(hint: type, value: Any, where: str) -> Any:
    if hint is float and type(value) is int:
        value = float(value)
    if type(value) is not hint:
        raise WireError(f"{where}: not {hint.__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise WireError(f"{where}: not finite")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:  # msgpack knows larger ones, SQLite does not
        raise WireError(f"{where}: out of range")
    return value


def _json(value: Any, where: str, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise WireError(f"{where}: nested too deep")
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise WireError(f"{where}: a key that is not text")
        return {key: _json(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_json(item, where, depth + 1) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise WireError(f"{where}: not finite")
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise WireError(f"{where}: {type(value).__name__} is not plain data")
