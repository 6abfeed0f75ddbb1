"""What a run works with, from a real store: nothing that is held out is trained on, and all of a long history has its share."""

from collections import Counter
from types import SimpleNamespace

import pytest

from specl.daemons.trainer.data_loader import LONGEST, DataLoader
from specl.shared.conversations import conversation_of
from specl.shared.learning.examples import is_held_out
from specl.shared.settings.load import load_settings
from specl.shared.store import Store
from tests.fakes import make_generation, make_top_k, to_row, tokens_blob

SHARE = 0.2
NOW = 1_790_100_000.0


@pytest.fixture
def material(tmp_path):
    """`material(records, **training)`: what a data_loader finds in a store that holds them."""

    def gather(records, **training):
        store = Store(tmp_path / "store.db")
        store.add_rows([to_row(record) for record in records])
        settings = load_settings()
        changed = settings.training.model_copy(update={"heldout_share": SHARE} | training)
        engine = SimpleNamespace(target=SimpleNamespace(fingerprint="t0"), reads_states=False)
        data_loader = DataLoader(store, engine, settings.model_copy(update={"training": changed}), None, lambda: None)
        try:
            return data_loader.material(data_loader.sorted(lambda: NOW))
        finally:
            store.close()

    return gather


def ids(examples):
    return {example.id for example in examples}


def said(id, *, talk, prompt, created_at=NOW - 3600, **changes):
    return make_generation(
        id, conversation_id=talk, prompt_tokens=tokens_blob(prompt), created_at=created_at, **changes
    )


def held_talk(wanted, name="talk"):
    return next(f"{name}-{n}" for n in range(100) if is_held_out(f"{name}-{n}", SHARE) == wanted)


def test_turns_of_an_unnamed_chat_share_a_split(material):
    """As a client in OpenAI's style sends them: the whole history each time, and no id."""
    records = []
    for chat in range(40):
        messages = [{"role": "system", "content": "Be brief."}]
        for turn in range(5):
            messages += [{"role": "user", "content": f"question {turn} of chat {chat}"}]
            talk = conversation_of(messages)
            records.append(said(f"{chat}.{turn}", talk=talk, prompt=[chat, turn], messages=list(messages)))
            messages += [{"role": "assistant", "content": f"answer {turn}"}]
    found = material(records)
    sides = [{id.split(".")[0] for id in ids(part)} for part in (found.held_out, found.failures)]
    assert not sides[0] & sides[1] and len(sides[0]) + len(sides[1]) == 40
    assert Counter(id.split(".")[0] for id in ids(found.held_out)).keys() == sides[0]
    assert len(found.held_out) == 5 * len(sides[0]) and len(found.failures) == 5 * len(sides[1])


def test_heldout_text_is_not_trained_on_elsewhere(material):
    held, free = held_talk(True), held_talk(False)
    found = material(
        [
            said("judge", talk=held, prompt=[1, 2]),
            said("same", talk=free, prompt=[1, 2]),
            said("same-success", talk=free, prompt=[1, 2], acceptance_rate=0.9),
            said("other", talk=free, prompt=[1, 3]),
            said("old-judge", talk=held, prompt=[1, 4], created_at=NOW - 50 * 86400),
            said("same-as-old", talk=free, prompt=[1, 4]),
        ]
    )
    assert ids(found.held_out) == {"judge"}
    assert ids(found.failures) == {"other"} and not found.successes


def test_truncation_does_not_make_texts_distinct(material):
    long = list(range(LONGEST))
    output = {"output_tokens": tokens_blob([1, 2, 3, 4]), "top_k": make_top_k(4)}
    found = material(
        [
            said("judge", talk=held_talk(True), prompt=[7, *long], **output),
            said("same", talk=held_talk(False), prompt=[8, 9, *long], **output),
        ]
    )
    assert ids(found.held_out) == {"judge"} and not found.failures


def test_repeated_prompt_counts_once_in_one_split(material):
    messages = [{"role": "user", "content": "ping"}]
    repeats = [said(f"r{n}", talk=conversation_of(messages), prompt=[9], messages=messages) for n in range(50)]
    found = material(repeats)
    assert len(found.held_out) + len(found.failures) == 1


def test_long_history_is_sampled_and_no_chat_dominates(material):
    talks = [f"chat-{n}" for n in range(40) if not is_held_out(f"chat-{n}", SHARE)]
    endless = held_talk(False, "endless")
    records = [said(f"o{n}", talk=talks[n % len(talks)], prompt=[n, 1]) for n in range(300)]
    records += [said(f"e{n}", talk=endless, prompt=[n, 2]) for n in range(300)]  # stored last: the newest
    found = material(records, max_failure_cases=100)
    kinds = Counter(id[0] for id in ids(found.failures))
    assert sum(kinds.values()) == 100 and kinds["e"] <= 10
    assert found.last_generation == "e299"


def test_successes_are_bounded_by_the_replay_buffer(material):
    free = [f"chat-{n}" for n in range(60) if not is_held_out(f"chat-{n}", SHARE)]
    records = [said(f"s{n}", talk=free[n % len(free)], prompt=[n], acceptance_rate=0.8) for n in range(60)]
    records += [said("x", talk=free[0], prompt=[99], target_fingerprint="t1")]
    found = material(records, replay_buffer_size=20)
    assert len(found.successes) == 20 and not found.failures and found.last_generation == "s59"


def test_agreement_decides_where_acceptance_is_null(material):
    free = held_talk(False)
    records = [said(f"p{n}", talk=free, prompt=[n], acceptance_rate=None, model_drafted=0) for n in range(2)]
    found = material(records)
    assert ids(found.successes) == {"p0", "p1"}  # nobody knows yet
