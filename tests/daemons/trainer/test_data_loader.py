"""What a run works with, from a real store: nothing that is held out is trained on, and all of a long history has its share."""

from collections import Counter
from types import SimpleNamespace

import pytest

from specl.daemons.trainer.data_loader import MAX_TOKENS, DataLoader
from specl.shared.conversations import conversation_of
from specl.shared.learning.examples import is_held_out
from specl.shared.settings.load import load_settings
from specl.shared.store import Store
from tests.fakes import make_generation, make_top_k, to_row, tokens_blob

SHARE = 0.2
NOW = 1_790_100_000.0


@pytest.fixture
def load(tmp_path):
    """`load(records, **training)`: what a data loader gives of a store that holds them."""

    def load_from(records, **training):
        store = Store(tmp_path / "store.db")
        store.add_rows([to_row(record) for record in records])
        settings = load_settings()
        changed = settings.training.model_copy(update={"heldout_share": SHARE} | training)
        engine = SimpleNamespace(target=SimpleNamespace(fingerprint="t0"), reads_states=False)
        data_loader = DataLoader(store, engine, settings.model_copy(update={"training": changed}), None, lambda: None)
        try:
            return data_loader.load(data_loader.split(lambda: NOW))
        finally:
            store.close()

    return load_from


def ids(examples):
    return {example.id for example in examples}


def answered(id, *, conversation_id, prompt, created_at=NOW - 3600, **changes):
    return make_generation(
        id, conversation_id=conversation_id, prompt_tokens=tokens_blob(prompt), created_at=created_at, **changes
    )


def conversation(held_out, name="talk"):
    return next(f"{name}-{n}" for n in range(100) if is_held_out(f"{name}-{n}", SHARE) == held_out)


def test_turns_of_a_chat_are_on_one_side(load):
    """As a client in OpenAI's style sends them: the whole history each time, and no id."""
    records = []
    for chat in range(40):
        messages = [{"role": "system", "content": "Be brief."}]
        for turn in range(5):
            messages += [{"role": "user", "content": f"question {turn} of chat {chat}"}]
            talk = conversation_of(messages)
            records.append(
                answered(f"{chat}.{turn}", conversation_id=talk, prompt=[chat, turn], messages=list(messages))
            )
            messages += [{"role": "assistant", "content": f"answer {turn}"}]
    data = load(records)
    sides = [{id.split(".")[0] for id in ids(part)} for part in (data.held_out, data.failures)]
    assert not sides[0] & sides[1] and len(sides[0]) + len(sides[1]) == 40
    assert Counter(id.split(".")[0] for id in ids(data.held_out)).keys() == sides[0]
    assert len(data.held_out) == 5 * len(sides[0]) and len(data.failures) == 5 * len(sides[1])


def test_held_out_text_is_never_trained_on(load):
    held, free = conversation(True), conversation(False)
    data = load(
        [
            answered("judge", conversation_id=held, prompt=[1, 2]),
            answered("same", conversation_id=free, prompt=[1, 2]),
            answered("same-success", conversation_id=free, prompt=[1, 2], acceptance_rate=0.9),
            answered("other", conversation_id=free, prompt=[1, 3]),
            answered("old-judge", conversation_id=held, prompt=[1, 4], created_at=NOW - 50 * 86400),
            answered("same-as-old", conversation_id=free, prompt=[1, 4]),
        ]
    )
    assert ids(data.held_out) == {"judge"}
    assert ids(data.failures) == {"other"} and not data.successes


def test_texts_are_compared_by_what_examples_hold(load):
    long = list(range(MAX_TOKENS))
    output = {"output_tokens": tokens_blob([1, 2, 3, 4]), "top_k": make_top_k(4)}
    data = load(
        [
            answered("judge", conversation_id=conversation(True), prompt=[7, *long], **output),
            answered("same", conversation_id=conversation(False), prompt=[8, 9, *long], **output),
        ]
    )
    assert ids(data.held_out) == {"judge"} and not data.failures


def test_repeated_prompt_counts_once_and_on_one_side(load):
    messages = [{"role": "user", "content": "ping"}]
    repeats = [
        answered(f"r{n}", conversation_id=conversation_of(messages), prompt=[9], messages=messages) for n in range(50)
    ]
    data = load(repeats)
    assert len(data.held_out) + len(data.failures) == 1


def test_no_chat_takes_all_places(load):
    talks = [f"chat-{n}" for n in range(40) if not is_held_out(f"chat-{n}", SHARE)]
    endless = conversation(False, "endless")
    records = [answered(f"o{n}", conversation_id=talks[n % len(talks)], prompt=[n, 1]) for n in range(300)]
    records += [
        answered(f"e{n}", conversation_id=endless, prompt=[n, 2]) for n in range(300)
    ]  # stored last: the newest
    data = load(records, max_failure_cases=100)
    kinds = Counter(id[0] for id in ids(data.failures))
    assert sum(kinds.values()) == 100 and kinds["e"] <= 10
    assert data.last_generation == "e299"


def test_successes_are_bounded_and_of_this_target(load):
    free = [f"chat-{n}" for n in range(60) if not is_held_out(f"chat-{n}", SHARE)]
    records = [
        answered(f"s{n}", conversation_id=free[n % len(free)], prompt=[n], acceptance_rate=0.8) for n in range(60)
    ]
    records += [answered("x", conversation_id=free[0], prompt=[99], target_fingerprint="t1")]
    data = load(records, replay_buffer_size=20)
    assert len(data.successes) == 20 and not data.failures and data.last_generation == "s59"


def test_agreement_decides_where_acceptance_is_null(load):
    free = conversation(False)
    records = [
        answered(f"p{n}", conversation_id=free, prompt=[n], acceptance_rate=None, model_drafted=0) for n in range(2)
    ]
    data = load(records)
    assert ids(data.successes) == {"p0", "p1"}  # nobody knows yet
