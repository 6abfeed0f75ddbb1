"""What a stream says of learning, on rows made by hand."""

from dataclasses import replace

import numpy as np
import pytest

from specl.shared.bench import stream
from specl.shared.bench.learning_report import (
    StreamFigures,
    adapters,
    compare,
    curve,
    estimate,
    gain,
    plain_beside,
    report,
    windows,
)
from specl.shared.bench.stream import StreamPass, StreamRow
from specl.shared.learning.examples import is_held_out
from specl.shared.prompts import reserved
from specl.shared.settings.schema import Settings


def row(n, speed=20.0, tokens=40, plain=None, hits=None, adapter="", prompt=None, drafted=20, accepted=10):
    positions = None if hits is None else tokens
    return StreamRow(
        n=n, kind="k", prompt=prompt or f"prompt {n}", at_s=2.0 * n, output=list(range(tokens)), adapter_id=adapter,
        tokens_per_second=speed, ttft_ms=5.0, rounds=20, drafted=drafted, accepted=accepted, acceptance_by_depth=[],
        tokens_by_source={}, k_histogram={}, parked_reason="", plain=plain, hits=hits, positions=positions,
    )  # fmt: skip


def rows(count=16, **same):
    return [row(n, **same) for n in range(count)]


# ------------------------------------------------------------------------------------------------ figures
def test_speed_is_all_tokens_over_all_seconds():
    side = StreamFigures([row(0, speed=10, tokens=10), row(1, speed=30, tokens=90)])
    assert side.figures()["tokens_per_second"] == pytest.approx(100 / 4)


def test_a_constant_ratio_has_no_spread():
    found = compare(StreamFigures(rows(speed=30)), StreamFigures(rows(speed=20)))["speed"]
    assert (found.value, found.low, found.high, found.n) == pytest.approx((1.5, 1.5, 1.5, 16))


def test_plain_speed_plain_beside_it_removes_machine_load():
    # the machine was half as fast while learning was on, and learning made it twice as fast
    on, off = StreamFigures(rows(speed=20, plain=10)), StreamFigures(rows(speed=20, plain=20))
    found = compare(on, off)
    assert found["speed"].value == pytest.approx(1.0)
    assert found["speed_to_plain"].value == pytest.approx(2.0)
    assert on.figures()["speed_to_plain"] == pytest.approx(2.0)


def test_plain_speed_is_the_median_of_five_neighbours():
    plain = {0: 10, 4: 11, 8: 12, 12: 13, 16: 100, 20: 14}
    found = plain_beside([row(n, plain=plain.get(n)) for n in range(24)])
    assert found[0] == 12  # of 0 to 16: one outlier does not matter
    assert found[23] == 13  # of 4 to 20
    assert np.isnan(plain_beside(rows(3))).all()


def test_agreement_covers_only_rows_that_have_it():
    side = StreamFigures([row(0, hits=10), row(1, hits=30), row(2)])
    assert side.figures()["agreement"] == pytest.approx(40 / 80)
    assert StreamFigures([row(0)]).figures()["agreement"] is None


def test_one_sided_agreement_counts_on_neither_side():
    on = [row(n, hits=None if n == 0 else 20) for n in range(8)]
    off = [row(n, hits=40 if n == 0 else 10) for n in range(8)]
    found = compare(StreamFigures(on), StreamFigures(off))["agreement"]
    assert (found.value, found.n) == (pytest.approx(0.25), 7)


def test_agreement_gain_lies_within_its_interval():
    rng = np.random.default_rng(1)
    before = [row(n, hits=int(h)) for n, h in enumerate(rng.binomial(40, 0.2, 40))]
    after = [row(n, hits=int(h)) for n, h in enumerate(rng.binomial(40, 0.6, 40))]
    found = compare(StreamFigures(after), StreamFigures(before))["agreement"]
    assert 0.3 < found.low < found.value < found.high < 0.5


def test_noise_alone_is_no_gain():
    rng = np.random.default_rng(2)
    sides = [StreamFigures([row(n, hits=int(h)) for n, h in enumerate(rng.binomial(40, 0.4, 60))]) for _ in range(2)]
    found = compare(*sides)["agreement"]
    assert found.low < 0 < found.high


def test_the_interval_widens_with_fewer_requests():
    rng = np.random.default_rng(3)
    speeds = rng.normal(30, 8, 64).clip(5)
    wide, narrow = (
        compare(StreamFigures([row(n, speed=s) for n, s in enumerate(speeds[:count])]), StreamFigures(rows(count)))[
            "speed"
        ]
        for count in (8, 64)
    )
    assert wide.high - wide.low > narrow.high - narrow.low


def test_a_single_pair_says_nothing():
    found = estimate(lambda picks: 1.0, 1)
    assert (found.value, found.low, found.high, found.n) == (None, None, None, 1)


def test_sides_of_other_prompts_are_not_compared():
    with pytest.raises(ValueError, match="same prompts"):
        compare(StreamFigures(rows(4)), StreamFigures([row(n, prompt="another") for n in range(4)]))


# ------------------------------------------------------------------------------------------------ reports
def test_the_windows_are_halves_and_the_last_quarter():
    found = windows(40)
    assert (found["second half"], found["last quarter"]) == (range(20, 40), range(30, 40))
    assert len(windows(7)["last quarter"]) == 1
    assert windows(30, shift_at=20)["second half"] == range(20, 30)
    assert len(windows(10, shift_at=20)["second half"]) == 0


def test_learning_shows_only_in_its_second_half():
    on = StreamPass([row(n, speed=20 if n < 10 else 30, hits=4 if n < 10 else 24) for n in range(20)])
    off = StreamPass(rows(20, speed=20, hits=4))
    found = report(on, off)["windows"]
    assert found["first half"]["on_against_off"]["speed"]["value"] == pytest.approx(1.0)
    assert found["second half"]["on_against_off"]["speed"]["value"] == pytest.approx(1.5)
    assert found["last quarter"]["on_against_off"]["agreement"]["value"] == pytest.approx(0.5)
    assert found["last quarter"]["on"]["agreement"] == pytest.approx(0.6)


def test_truncated_pass_is_compared_where_both_answered():
    found = report(StreamPass(rows(20, speed=30)), StreamPass(rows(12)))["windows"]
    assert found["second half"]["pairs"] == 2 and found["last quarter"]["pairs"] == 0
    assert found["last quarter"]["on_against_off"]["speed"]["value"] is None
    assert found["second half"]["on_against_off"]["speed"]["value"] == pytest.approx(1.5)


def test_texts_that_part_are_counted():
    off = rows(6)
    off[3] = replace(off[3], output=[1, 2])
    assert report(StreamPass(rows(6)), StreamPass(off))["words"] == {"compared": 6, "different": 1}


def test_adapters_are_listed_in_order_with_a_rollback():
    names = ["", "", "000001", "000001", "000001", ""]
    found = adapters(StreamPass([row(n, adapter=name) for n, name in enumerate(names)]))
    assert [(item["adapter"], item["from_request"], item["requests"]) for item in found] == [
        ("", 0, 2), ("000001", 2, 3), ("", 5, 1),
    ]  # fmt: skip


def test_gain_uses_fixed_k_and_auto_k():
    fixed = rows(8, hits=4, speed=1), rows(8, hits=28, speed=1, accepted=16)
    auto = rows(8, speed=20, plain=20), rows(8, speed=33, plain=22)
    found = gain(fixed, auto)
    assert found["agreement_gain"]["value"] == pytest.approx(0.6)
    assert found["acceptance_gain"]["value"] == pytest.approx(0.3)
    assert found["speed_ratio"]["value"] == pytest.approx(1.65)
    assert found["speed_ratio_to_plain"]["value"] == pytest.approx(1.5)


def test_a_curve_pools_the_last_dozen():
    made = [row(n, speed=10 if n < 12 else 40) for n in range(24)]
    minutes, values = curve(made, StreamFigures.speed)
    assert values[11] == pytest.approx(10) and values[23] == pytest.approx(40) and 10 < values[15] < 40
    assert minutes[3] == pytest.approx(0.1)


# ------------------------------------------------------------------------------------------------ the stream itself
def test_kinds_alternate_and_shift_half_way():
    kinds = reserved.KINDS
    assert [item.kind for item in stream.stream_items(kinds, 4)] == [kinds[0], kinds[1], kinds[2], kinds[0]]
    shifted = stream.stream_items(kinds, 8, shift=True)
    assert [item.kind for item in shifted] == [kinds[0]] * 4 + [kinds[1], kinds[2]] * 2
    assert len({item.prompt for item in shifted}) == 8
    assert [item.n for item in shifted] == list(range(8))


@pytest.mark.parametrize("share", [0.2, 0.3, 0.5])
def test_held_out_conversations_are_spread_evenly(share):
    held = [is_held_out(stream.conversation(n, share), share) for n in range(60)]
    for length in (10, 20, 60):
        assert sum(held[:length]) == int(length * share)
    assert stream.conversation(7, share) == stream.conversation(7, share)


def test_settings_shrink_only_what_a_short_stream_needs():
    given = Settings()
    found = stream.scaled_settings(given, 20, 0.3, 1.5, 1.0, True, False)
    names = type(given.training).model_fields
    changed = {name for name in names if getattr(found.training, name) != getattr(given.training, name)}
    small = {"min_failure_cases", "heldout_share", "min_heldout_generations", "max_minutes", "idle_seconds"}
    assert changed == small | {"on_battery", "when_hot"}
    assert found.training.min_failure_cases == 20
    assert found.training.min_heldout_generations == 4
    assert found.speculative.ngram is False
    assert stream.scaled_settings(given, 1000, 0.3, 1.5, 1.0, True, False).training.min_heldout_generations == 30


def test_the_picture_marks_where_an_adapter_came_in(tmp_path):
    pytest.importorskip("matplotlib")
    from specl.shared.bench.curves import draw_stream

    names = [""] * 8 + ["000001"] * 8
    pictures = []
    for name, adapters_of in (("with", names), ("without", [""] * 16)):
        on = StreamPass([row(n, hits=8, plain=20, adapter=adapter) for n, adapter in enumerate(adapters_of)])
        draw_stream(
            {"n-gram off": {"on": on, "off": StreamPass(rows(16))}, "n-gram on": {}}, 8, tmp_path / f"{name}.png"
        )
        pictures.append((tmp_path / f"{name}.png").read_bytes())
    assert pictures[0] != pictures[1] and all(picture.startswith(b"\x89PNG") for picture in pictures)
