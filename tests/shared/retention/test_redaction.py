"""Redaction ends in bounded time, lets other threads run, and keeps only statistics of what it could not search."""

import threading
from dataclasses import replace

import pytest

from specl.shared.retention import redaction
from specl.shared.retention.redaction import Redactor
from specl.shared.settings.schema import Records
from tests.fakes import make_generation

MAIL = r"[\w.+-]+@[\w-]+\.[\w.]+"
LONG = "_" * 256_000 + "@"  # the mail pattern starts anew at each of them
SLOW = [(MAIL, LONG), (r"(\w+\s?)+@", "@" + LONG[:-1]), (r"\w+\d+\w+=\s*\S", "1" * 256_000 + "=")]


@pytest.fixture
def short_limit(monkeypatch):
    monkeypatch.setattr(redaction, "SEARCH_S", 0.3, raising=False)


def record_of(text):
    return make_generation("g1", messages=[{"role": "user", "content": text}], prompt=text)


@pytest.mark.usefixtures("short_limit")
@pytest.mark.parametrize("pattern, text", SLOW)
def test_slow_patterns_leave_statistics_only(pattern, text):
    result = Redactor(Records(redact=[pattern])).apply(record_of(text))
    stored = result.record
    assert result.timed_out and not result.whole
    assert (stored.prompt, stored.output, stored.messages, stored.top_k) == ("", "", [], None)
    assert stored.prompt_tokens == stored.output_tokens == b"" and stored.rounds == record_of(text).rounds


@pytest.mark.usefixtures("short_limit")
def test_slow_replacement_leaves_statistics_only():
    text = "me@example.org " + LONG
    result = Redactor(Records(redact=[MAIL])).apply(replace(record_of(text), prompt="me@example.org"))
    assert result.timed_out and result.record.messages == []


def test_other_threads_run_during_a_search():
    ticks, over = [], threading.Event()

    def tick():
        while not over.wait(0.001):
            ticks.append(1)

    other = threading.Thread(target=tick)
    other.start()
    Redactor(Records(redact=[MAIL])).apply(record_of(LONG[-12_000:]))
    over.set()
    other.join()
    assert len(ticks) > 10


def test_ordinary_patterns_redact_long_texts():
    text = "a line of a log file, number 12\n" * 800 + "write to me@example.org"
    result = Redactor(Records(redact=[MAIL])).apply(record_of(text))
    assert not result.timed_out and result.record.prompt.endswith("write to [redacted]")
