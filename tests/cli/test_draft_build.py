"""`draft build` from the user's own traffic: what it may use, and what it says where there is nothing."""

import json
import time

import numpy as np
import pytest

from specl.cli.draft.texts import prompts_of, texts_of_store
from specl.shared import prompts
from specl.shared.errors import ConfigError, ModelError
from specl.shared.learning.examples import is_held_out
from specl.shared.learning.recapture import WrittenText
from specl.shared.paths import find_paths
from specl.shared.settings.load import load_settings
from specl.shared.store import Store
from specl.shared.training_files.target_texts import load_target_texts, save_target_texts
from tests.fakes import make_generation, to_row, tokens_blob

NOW = time.time()
TRAINED = [f"talk-{n}" for n in range(60) if not is_held_out(f"talk-{n}", 0.2)]
HELD = [f"talk-{n}" for n in range(60) if is_held_out(f"talk-{n}", 0.2)]


@pytest.fixture
def kept():
    """`kept(records)`: a store that holds them; its path."""

    def write(*records):
        path = find_paths().create().store
        store = Store(path)
        store.add_rows([to_row(record) for record in records])
        store.close()
        return path

    return write


def record(id, **changes):
    number = int("".join(c for c in id if c.isdigit()) or 0)
    values = {
        "conversation_id": TRAINED[number % 40],
        "created_at": NOW - 3600,
        "prompt_tokens": tokens_blob([1, 70, 71, number + 10]),
    }
    return make_generation(id, **(values | changes))


def found(path, **records):
    settings = load_settings()
    settings = settings.model_copy(update={"records": settings.records.model_copy(update=records)})
    return texts_of_store(path, settings, "t0", "target")


def test_prompt_and_answer_are_what_the_target_saw(kept):
    (text,) = found(kept(record("a1", sampling={"temperature": 0.7, "top_p": 1.0})))
    assert text.tokens.tolist() == [1, 70, 71, 11, 1, 2, 3, 4, 5]
    assert (text.id, text.prompt_length, text.greedy) == ("a1", 4, False)


def test_heldout_conversations_other_targets_and_repeats_are_excluded(kept):
    path = kept(
        record("a1"),
        record("a2", conversation_id=HELD[0]),
        record("a3", target_fingerprint="t1"),
        record("b1"),  # the same text as a1
        record("a4", output_tokens=tokens_blob([9]), output_ids=[9]),
        record("a5"),
    )
    assert sorted(text.id for text in found(path)) == ["a5", "b1"]


def test_heldout_text_is_excluded_everywhere(kept):
    same = {"prompt_tokens": tokens_blob([1, 2, 3])}
    path = kept(record("a1", **same), record("a2", conversation_id=HELD[0], **same), record("a3", **same), record("a4"))
    assert [text.id for text in found(path)] == ["a4"]


def test_retention_holds_even_before_the_collector_has_purged(kept):
    path = kept(record("a1", created_at=NOW - 20 * 86400), record("a2"))
    assert len(found(path)) == 2
    assert [text.id for text in found(path, retention_days=7)] == ["a2"]
    assert found(path, retention_days=30)[0].id == "a1"


def test_where_there_is_nothing_it_says_why(kept):
    with pytest.raises(ConfigError, match="no store at"):
        found(find_paths().store)
    bare = {"prompt_tokens": b"", "output_tokens": b"", "sources": b"", "top_k": None, "disagreements": []}
    path = kept(record("a1", **bare), record("a2", conversation_id=HELD[1]), record("a3", target_fingerprint="t1"))
    with pytest.raises(ConfigError) as caught:
        found(path, keep="statistics")
    said = str(caught.value)
    assert "1 without tokens" in said and "1 held out" in said and "1 written by another target" in said
    assert "statistics" in caught.value.hint and "--prompts" in caught.value.hint


def test_an_empty_store_has_nothing(kept):
    with pytest.raises(ConfigError, match="it is empty"):
        found(kept())


def test_prompts_are_a_file_or_the_shipped_ones(tmp_path):
    assert len(prompts_of("shipped")[0]) == len(prompts.load("train"))
    file = tmp_path / "mine.txt"
    file.write_text('one\n\n{"messages": [{"role": "user", "content": "two"}]}\n{"prompt": "three"}\n')
    items, digest = prompts_of(str(file))
    assert [item.messages[-1]["content"] for item in items] == ["one", "two", "three"]
    assert digest != prompts.sha256("train")


def test_evaluation_prompts_are_not_trained_on(tmp_path, capsys):
    judge = prompts.load("heldout")[0].messages[-1]["content"]
    file = tmp_path / "mine.txt"
    file.write_text(f"one\n{json.dumps({'prompt': judge})}\n")
    assert [item.messages[-1]["content"] for item in prompts_of(str(file))[0]] == ["one"]
    assert "1 prompts of" in capsys.readouterr().err
    file.write_text(json.dumps({"prompt": judge}))
    with pytest.raises(ConfigError, match="evaluated on"):
        prompts_of(str(file))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompts", "nowhere.txt"], "cannot be read"),
        (["--layers", "99", "--kind", "layers"], "--layers 99"),
        (["--time", "soon"], "a time is written like"),
        (["--from-store"], "no store at"),
        (["--kind", "layers", "--begin", "."], "--begin goes on from a head"),
        (["--answers", "nowhere.npz"], "does not hold answers"),
        (["--keep-answers", "nowhere/kept.npz"], "there is no folder nowhere"),
        (["--answers", "a/x.npz", "--answers", "b/x.npz"], "different names"),
    ],
)
def test_a_users_mistake_is_one_sentence(specl, stored, monkeypatch, arguments, said):
    monkeypatch.setattr("specl.shared.models.load.load", lambda *given, **more: stored())
    outcome = specl("draft", "build", *arguments)
    assert outcome.exit_code == 2
    assert said in outcome.stderr and "Traceback" not in outcome.stderr


def test_build_command_makes_a_draft_the_settings_accept(specl, stored, monkeypatch, tmp_path):
    from specl.shared.models import load
    from specl.shared.training_files import draft_build

    target = stored()
    real = load.load
    monkeypatch.setattr(draft_build, "HELDOUT_PROMPTS", 4)
    monkeypatch.setattr("specl.cli.draft.command.MEASURED_PROMPTS", 1)
    monkeypatch.setattr(
        load, "load", lambda name, *given, **more: target if name == "it" else real(name, *given, **more)
    )
    file = tmp_path / "mine.txt"
    file.write_text("\n".join(f"say {n} things" for n in range(10)))
    out, answers = tmp_path / "made", tmp_path / "answers.npz"
    common = (
        "draft",
        "build",
        "--target",
        "it",
        "--kind",
        "layers",
        "--layers",
        "0,3",
        "--tokens",
        "1000",
        "--epochs",
        "1",
    )
    outcome = specl(*common, "--prompts", file, "--time", "5m", "--out", out, "--keep-answers", answers)
    assert outcome.exit_code == 0, outcome.stderr
    assert "held-out acceptance by depth" in outcome.stdout and f"name: {out}" in outcome.stdout
    assert (out / "model.safetensors").is_file()
    assert "one draft token" in outcome.stdout and "expected speed" in outcome.stdout

    def no_text(*arguments, **more):
        raise AssertionError("text was written")

    again = tmp_path / "again"
    (tmp_path / ".again.work").mkdir()
    for shard in (tmp_path / ".made.work").glob("held-out-*.npz"):
        (tmp_path / ".again.work" / shard.name).write_bytes(shard.read_bytes())
    monkeypatch.setattr(draft_build, "batch_generate", no_text)
    outcome = specl(*common, "--answers", answers, "--time", "5m", "--out", again)
    assert outcome.exit_code == 0, outcome.stderr
    made, remade = (json.loads((folder / "manifest.json").read_text()) for folder in (out, again))
    assert remade["training_tokens"] == made["training_tokens"] and remade["user_texts"] == 0
    assert remade["texts_of_earlier_builds"] >= remade["training_prompts"] == made["training_prompts"]
    assert len(remade["answers_sha256"]) == 1 and "--answers answers.npz" in remade["command"]
    with np.load(out / "replay.npz") as first, np.load(again / "replay.npz") as second:
        assert first["tokens"].tolist() == second["tokens"].tolist()


def test_kept_answers_are_read_only_for_their_target(tmp_path):
    written = [WrittenText(f"w{n}", np.arange(n, n + 9, dtype=np.uint32) * 6000, 3 + n, n == 1) for n in range(3)]
    path = tmp_path / "kept.npz"
    save_target_texts(path, written, "t0")
    for one, other in zip(load_target_texts(path, "t0"), written, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        assert (one.prompt_length, one.greedy) == (other.prompt_length, other.greedy)
    save_target_texts(path, written[:1] + [WrittenText("w", np.array([70_000, 5], np.uint32), 1, True)], "t0")
    assert load_target_texts(path, "t0")[1].tokens.tolist() == [70_000, 5]
    with pytest.raises(ModelError, match="written by target t0"):
        load_target_texts(path, "t1")
    whole = path.read_bytes()
    for size in (0, 50, len(whole) - 3):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError, match="does not hold answers"):
            load_target_texts(path, "t0")
