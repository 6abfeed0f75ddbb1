"""Bytes in and out: every value comes back, every other thing is a WireError that tells nothing of what it held."""

import contextlib
import dataclasses
import enum
import types
import typing

import msgpack
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from specl.shared.errors import WireError
from specl.shared.messaging import codec
from specl.shared.messaging.codec import MAX_DEPTH, MAX_FRAME, VERSION, decode, encode
from specl.shared.messaging.messages import MESSAGES, RECORDS
from tests.fakes import make_activation, make_generation

plain = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**63), 2**64 - 1),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(max_size=8),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)
SCALARS = {
    str: st.text(max_size=12),
    int: st.integers(-(2**63), 2**63 - 1),
    float: st.floats(allow_nan=False, allow_infinity=False),
    bool: st.booleans(),
    bytes: st.binary(max_size=12),
}


def values_of(hint):
    if isinstance(hint, types.UnionType):
        return st.one_of([st.none() if arm is type(None) else values_of(arm) for arm in hint.__args__])
    if dataclasses.is_dataclass(hint):
        return st.builds(hint, **{name: values_of(part) for name, part in typing.get_type_hints(hint).items()})
    if typing.get_origin(hint) is list:
        return st.lists(values_of(typing.get_args(hint)[0]), max_size=3)
    if typing.get_origin(hint) is dict:
        value_type = typing.get_args(hint)[1]
        return st.dictionaries(
            st.text(max_size=5), plain if value_type is typing.Any else values_of(value_type), max_size=3
        )
    if issubclass(hint, enum.StrEnum):
        return st.sampled_from(hint)
    return SCALARS[hint]


quick = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@pytest.mark.parametrize("kind", [*RECORDS, *MESSAGES], ids=lambda kind: kind.__name__)
def test_every_kind_comes_back_as_it_went(kind):
    @quick
    @given(values_of(kind))
    def check(value):
        assert decode(encode(value)) == value

    check()


def test_every_kind_is_frozen_and_documented():
    for kind in (*RECORDS, *MESSAGES):
        assert kind.__dataclass_params__.frozen, kind
        assert kind.__doc__ and not kind.__doc__.startswith(f"{kind.__name__}("), kind


def refused(data):
    with pytest.raises(WireError) as caught:
        decode(data)
    return str(caught.value)


def framed(body, kind="Activation", version=VERSION):
    return msgpack.packb([version, kind, body])


def activation(**changes):
    return {name: getattr(make_activation("a"), name) for name in make_activation("a").__slots__} | changes


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
@example(b"")
@example(b"\xc1")
@example(b"\x93\x02\xaaGeneration\xc0")
def test_random_bytes_raise_nothing_but_wire_errors(data):
    with contextlib.suppress(WireError):
        decode(data)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_records_raise_nothing_but_wire_errors(data):
    good = bytearray(encode(make_generation("g")))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(WireError):
        decode(bytes(good))


def test_every_truncation_is_refused():
    good = encode(make_generation("g"))
    for length in range(len(good)):
        refused(good[:length])
    refused(good + b"\x00")


def test_a_key_twice_is_refused():
    pairs = list(activation().items())
    packer = msgpack.Packer()
    body = packer.pack_map_pairs([*pairs, ("reason", "another")])
    refused(packer.pack_array_header(3) + packer.pack(VERSION) + packer.pack("Activation") + body)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused(number):
    refused(framed(activation(created_at=number)))
    refused(framed(activation(details={"deep": [{"er": number}]})))


@pytest.mark.parametrize("depth", [MAX_DEPTH + 2, 500, 5000, 200_000])
def test_deep_nesting_is_refused(depth):
    nested = b"\x91" * depth + b"\x01"
    refused(nested)
    packer = msgpack.Packer()
    body = packer.pack(activation(details={"x": None}))
    refused(packer.pack_array_header(3) + packer.pack(VERSION) + packer.pack("Activation") + body[:-1] + nested)


@pytest.mark.parametrize("version", [0, 3, -1, True, "1", 1.0, None, [1]])
def test_other_versions_are_refused(version):
    assert "version" in refused(framed(activation(), version=version))


@pytest.mark.parametrize(
    "kind", ["", "activation", "Envelope", "Disagreement", "TopK", "Sampling", "int", None, 7, [], {}]
)
def test_other_kinds_are_refused(kind):
    refused(framed(activation(), kind=kind))


@pytest.mark.parametrize("field", list(activation()))
def test_a_missing_field_is_refused(field):
    body = activation()
    del body[field]
    assert refused(framed(body)) == "Activation: wrong fields"


def test_a_field_too_many_is_refused():
    refused(framed(activation() | {"extra": 1}))


@pytest.mark.parametrize("kind", [*RECORDS, *MESSAGES], ids=lambda kind: kind.__name__)
def test_no_field_takes_another_type(kind):
    @settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
    @given(values_of(kind))
    def check(value):
        body = msgpack.unpackb(encode(value))[2]
        for name in body:
            refused(framed(body | {name: msgpack.Timestamp(1, 1)}, kind.__name__))
            hint = typing.get_type_hints(kind)[name]
            wrong = {"a": 1} if typing.get_origin(hint) is not dict else [1]
            if not (dataclasses.is_dataclass(hint) or isinstance(hint, types.UnionType)):
                refused(framed(body | {name: wrong}, kind.__name__))

    check()


@pytest.mark.parametrize("body", [None, [], 3, "text", [1, 2], {"id": 1}])
def test_a_body_that_is_no_record_is_refused(body):
    refused(framed(body))


def test_booleans_are_no_numbers_and_numbers_no_booleans():
    refused(framed({"request_id": "r", "place": True}, "Queued"))
    refused(framed({"busy": 1}, "Activity"))


def test_a_frame_above_the_limit_is_refused_unread():
    assert "limit" in refused(bytes(17 * 1024 * 1024))


def test_a_length_that_lies_costs_no_memory():
    refused(b"\xdd\xff\xff\xff\xff")
    refused(b"\xdf\xff\xff\xff\xff")
    refused(b"\xc6\xff\xff\xff\xff")


def test_no_error_repeats_what_the_bytes_held():
    secret = "S3CR3T"
    bodies = [
        activation(note=[secret]),
        activation(event=secret),
        activation(details={secret: float("nan")}),
        activation(details=[secret]),
        activation() | {secret: secret},
        activation(created_at=secret),
        secret,
        activation(details={"a": secret.encode()}),
    ]
    frames = [framed(body) for body in bodies]
    frames += [framed(activation(), kind=secret), framed(activation(), version=secret), msgpack.packb({secret: secret})]
    frames += [framed(activation(note=secret))[:-3], secret.encode(), b"\xa6" + secret.encode()]
    for frame in frames:
        assert secret not in refused(frame)


def test_value_a_peer_would_refuse_is_not_sent():
    nested = {}
    for _ in range(MAX_DEPTH + 2):
        nested = {"x": nested}
    bad = [
        make_activation("a", created_at=float("nan")),
        make_activation("a", details={"x": float("inf")}),
        make_activation("a", details=nested),
        make_activation("a", details={"x": {1, 2}}),
        make_activation("a", details={1: 2}),
        make_activation("a", details={"x": b"bytes"}),
        make_activation("a", note=7),
        make_activation("a", note="x" * (codec.MAX_TEXT + 1)),
        make_activation("a", note="\ud800"),
        make_activation("a", details={"x": 2**70}),
        make_generation("g", prompt_tokens=bytes(MAX_FRAME)),
        {"not": "a record"},
        None,
    ]
    for value in bad:
        with pytest.raises(WireError):
            encode(value)


def test_binary_keys_are_refused_not_renamed():
    refused(framed(activation(details={b"x": 1})))


@pytest.mark.parametrize(
    "item, count",
    [(b"\x90", 1 << 20), (b"\x80", 1 << 20), (b"\xa2ab", 2 << 20), (b"\xdd\x00\x03\xff\xff", 0)],
    ids=["empty lists", "empty maps", "short texts", "headers alone"],
)
def test_a_frame_costs_no_multiple_of_its_size(item, count):
    import tracemalloc

    parts = [b"\xdd" + (1 << 18).to_bytes(4, "big") + item * (1 << 18) for _ in range(count >> 18)] or [item * 400]
    data = b"\x93\x02\xa6Status\x9f" + b"".join(parts)
    tracemalloc.start()
    try:
        with pytest.raises(WireError):
            codec.decode(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20 or peak < 16 * len(data)
