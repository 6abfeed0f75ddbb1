"""Records and messages survive the trip; anything else is one WireError that repeats nothing of what it was."""

import dataclasses
import types
import typing

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specl.shared import wire
from specl.shared.errors import WireError

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
SCALARS = {
    str: st.text(max_size=20), bytes: st.binary(max_size=20), bool: st.booleans(), int: st.integers(-(2**40), 2**40),
    float: st.floats(allow_nan=False, allow_infinity=False),
}  # fmt: skip


def values_of(hint):
    if isinstance(hint, types.UnionType):
        return st.one_of(*(st.none() if arm is type(None) else values_of(arm) for arm in hint.__args__))
    if dataclasses.is_dataclass(hint):
        return st.builds(hint, **{name: values_of(h) for name, h in typing.get_type_hints(hint).items()})
    if typing.get_origin(hint) is list:
        return st.lists(values_of(typing.get_args(hint)[0]), max_size=3)
    if typing.get_origin(hint) is dict:
        return st.dictionaries(st.text(max_size=5), plain, max_size=3)
    return SCALARS[hint]


@pytest.mark.parametrize("kind", [*wire.RECORDS, *wire.MESSAGES], ids=lambda kind: kind.__name__)
def test_everything_survives_the_trip(kind):
    @given(values_of(kind))
    def trip(value):
        assert wire.decode(wire.encode(value)) == value

    trip()


@given(st.binary(max_size=200))
def test_random_bytes_are_one_kind_of_error(data):
    with pytest.raises(WireError):
        wire.decode(data)


@given(st.integers(0, 60))
def test_truncated_bytes_are_refused(cut):
    data = wire.encode(wire.Cancel("0123456789" * 6))
    with pytest.raises(WireError):
        wire.decode(data[: -1 - cut])


def nested(depth):
    return b"\x91" * depth + b"\xc0"


@pytest.mark.parametrize(
    "data",
    [
        msgpack.packb([2, "Cancel", {"request_id": "a"}]),
        msgpack.packb([True, "Cancel", {"request_id": "a"}]),
        msgpack.packb([1, "Nothing", {}]),
        msgpack.packb([1, "Cancel", {}]),
        msgpack.packb([1, "Cancel", {"request_id": "a", "more": 1}]),
        msgpack.packb([1, "Cancel", {"request_id": 7}]),
        msgpack.packb([1, "Activity", {"busy": 1}]),
        msgpack.packb([1, "Progress", {"state": "x", "step": 1, "loss": float("nan")}]),
        b"\x93\x01\xa6Cancel\x82\xaarequest_id\xa1a\xaarequest_id\xa1b",
        msgpack.packb([1, "Status", {"role": "x", "body": {"a": msgpack.ExtType(4, b"zz")}}]),
        nested(1000),
        nested(100_000),
        b"\xdd\xff\xff\xff\xff",
        b"\0" * (wire.MAX_FRAME + 1),
    ],
    ids=range(14),
)
def test_hostile_bytes_are_refused(data):
    with pytest.raises(WireError):
        wire.decode(data)


def test_deep_plain_data_is_refused_and_an_error_repeats_no_content():
    deep: typing.Any = "Quixotherm"
    for _ in range(40):
        deep = [deep]
    with pytest.raises(WireError) as caught:
        wire.decode(msgpack.packb([1, "Status", {"role": "x", "body": {"a": deep}}]))
    assert "Quixotherm" not in str(caught.value)
    with pytest.raises(WireError) as caught:
        wire.decode(b"Quixotherm" * 10)
    assert "Quixotherm" not in str(caught.value) and "sha256" in str(caught.value)
