"""Past answers draft for their client only, survive a restart, stay bounded, and can be forgotten."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specl.shared.engine.answer_history import MATCH, AnswerHistory, ClientAnswers
from specl.shared.engine.core import EngineCore
from specl.shared.engine.drafters import DraftSampler, NgramDrafter
from specl.shared.engine.request_options import RequestOptions
from specl.shared.retention.answer_files import AnswerFiles
from specl.shared.sampling_params import SamplingParams

PROMPT = [5, 17, 40, 8, 22]


@given(st.lists(st.lists(st.integers(0, 3), max_size=20), max_size=6), st.lists(st.integers(0, 3), max_size=12))
def test_a_match_is_the_longest_there_is(texts, running):
    answers = ClientAnswers(10_000)
    for text in texts:
        answers.add(text, 0)
    match, position, length = answers.match(running, 9)
    longest = 0
    for text in answers.texts:
        for end in range(MATCH, len(text)):
            same = 0
            while same < min(end, len(running), 9) and text[end - same - 1] == running[-same - 1]:
                same += 1
            longest = max(longest, same)
    assert length == (longest if longest >= MATCH else 0)
    if length:
        assert match[position - length : position] == running[-length:] and position < len(match)


def test_history_stays_within_its_limit():
    answers = ClientAnswers(100)
    for i in range(50):
        answers.add([i] * 5 + list(range(i, i + 12)), i)
        assert answers.tokens <= 100
    assert answers.match([49] * 5, 9)[2] == 5
    assert answers.match([0] * 5, 9)[2] == 0
    answers.add(range(10_000), 60)
    assert answers.tokens <= 100


def test_one_owners_text_is_never_anothers(tmp_path):
    files = AnswerFiles(tmp_path)
    past = AnswerHistory(files.read)
    past.add("a", [1, 2, 3, 4, 5])
    assert past.of("a").match([1, 2, 3], 9)[2] == 3
    assert past.of("b").match([1, 2, 3], 9)[2] == 0
    assert past.of("") is None
    files.write("a", past.answers("a"))
    again = AnswerHistory(AnswerFiles(tmp_path).read)
    assert again.of("b").texts == [] and again.of("a").texts == [[1, 2, 3, 4, 5]]
    assert AnswerFiles(tmp_path, tokenizer="another").read("a") == []


@pytest.mark.parametrize("damage", [b"", b"\x01", b"\xff" * 64, (3).to_bytes(4, "little") * 3])
def test_a_damaged_file_is_an_empty_memory(tmp_path, damage):
    files = AnswerFiles(tmp_path)
    files.write("a", [(5.0, [1, 2, 3, 4])])
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage)
    assert files.read("a") == []


def test_forgetting_leaves_nothing_in_memory_or_on_disk(tmp_path):
    files = AnswerFiles(tmp_path, clients=3)
    past = AnswerHistory(files.read)
    for client_id in "abcdef":
        past.add(client_id, [1, 2, 3, 4])
        files.write(client_id, past.answers(client_id))
    assert len(list(tmp_path.iterdir())) == 3
    past.forget()
    files.purge()
    assert not list(tmp_path.iterdir()) and past.of("a").texts == []


def test_longer_of_context_and_history_match_is_drafted():
    answers = ClientAnswers(1000)
    answers.add([9, 1, 2, 3, 4, 50, 51, 52], 0)
    drafter = NgramDrafter(answers)
    drafter.extend([3, 4, 60, 61, 1, 2, 3, 4], None)
    assert drafter.propose(3, DraftSampler(SamplingParams(), lambda: 0.5, None)).tokens == [50, 51, 52]
    drafter.extend([60], None)
    assert drafter.propose(1, DraftSampler(SamplingParams(), lambda: 0.5, None)).tokens == [61]


def test_repeated_question_drafts_the_last_answer(tiny):
    engine = EngineCore(tiny(), None)
    engine.answer_history = AnswerHistory()

    def answer(client_id):
        engine.prefixes.purge()
        session = engine.session(PROMPT, RequestOptions(max_tokens=40, client_id=client_id))
        while not session.prefill():
            pass
        while session.finish_reason is None:
            session.round()
            session.check_in_step()
        engine.answer_history.add(client_id, session.output)
        return session

    first, again, stranger = answer("a"), answer("a"), answer("b")
    assert first.output == again.output == stranger.output
    assert again.stats.rounds < first.stats.rounds
    assert stranger.stats.rounds == first.stats.rounds


def test_retention_reaches_answers_in_memory_and_disk(tmp_path):
    files = AnswerFiles(tmp_path, tokenizer="one")
    past = AnswerHistory(files.read)
    past.add("a", [1, 2, 3, 4], created_at=1000)
    past.add("a", [5, 6, 7, 8], created_at=3000)
    past.add("b", [9, 9, 9, 9], created_at=1000)
    for client_id in "ab":
        files.write(client_id, past.answers(client_id))
    past.expire(2000)
    assert past.of("a").texts == [[5, 6, 7, 8]] and past.of("b").texts == []
    assert past.of("a").match([1, 2, 3], 9)[2] == 0 and past.of("a").match([5, 6, 7], 9)[2] == 3
    AnswerFiles(tmp_path).expire(2000)
    assert len(list(tmp_path.iterdir())) == 1
    assert files.read("a") == [(3000.0, [5, 6, 7, 8])] and files.read("b") == []
