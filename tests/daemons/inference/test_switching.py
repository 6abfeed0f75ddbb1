"""Switches of the adapter between rounds: in pieces, also under load, and tried again when there is a reason."""

import pytest

from tests.harness.fake_models import publish_adapter

LONG = "x" * 600  # more than one part of a prefill


@pytest.fixture
def in_pieces(decoding, monkeypatch):
    """An adapter that nobody announced; a switch at once fails the test."""
    publish_adapter(decoding.paths.adapters, "000001")
    monkeypatch.setattr(decoding.swap, "finish", lambda: pytest.fail("a switch was made at once"))
    return decoding


def test_adapter_with_a_lost_announcement_loads_under_load(in_pieces):
    turns = 0
    while not in_pieces.engine.adapter_id:
        if not in_pieces.thread.busy:
            in_pieces.ask(f"r{turns}", LONG)
        in_pieces.turn()
        turns += 1
        assert turns < 200
    assert turns > 2


def test_idle_thread_switches_in_pieces_too(in_pieces):
    in_pieces.turn(3)
    assert in_pieces.swap.under_way
    in_pieces.ask("a", "hello")
    in_pieces.turn(2)
    assert in_pieces.scheduler.running or in_pieces.sent


def test_refused_adapter_is_tried_again_after_a_change(decoding, monkeypatch):
    folder = publish_adapter(decoding.paths.adapters, "000001")
    weights = folder / "adapters.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + b"\x00\x01")
    verified, verify = [], decoding.swap.adapters.verify
    monkeypatch.setattr(decoding.swap.adapters, "verify", lambda *given: verified.append(given) or verify(*given))
    for _ in range(3):
        decoding.swap.follow_current()
    assert "000001" in decoding.swap.rejected and len(verified) == 1
    weights.write_bytes(good)
    decoding.swap.follow_current()
    assert decoding.engine.adapter_id == "000001" and not decoding.swap.rejected


def test_disk_that_failed_once_bars_no_adapter(decoding, monkeypatch):
    publish_adapter(decoding.paths.adapters, "000001")

    def fails(*arguments):
        raise OSError("Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(decoding.swap.adapters, "verify", fails)
        decoding.swap.follow_current()
        assert "Input/output error" in decoding.swap.rejected["000001"]
    decoding.swap.follow_current()
    assert decoding.engine.adapter_id == "000001" and not decoding.swap.rejected
