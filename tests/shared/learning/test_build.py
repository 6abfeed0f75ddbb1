"""`draft build` on a random model: both kinds, stopped at every stage, and nothing of the target's changed."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from specl.shared.errors import ModelError
from specl.shared.learning import build_draft
from specl.shared.learning.build_draft import BuildSettings, embedding_digest
from specl.shared.learning.depths import DepthRates
from specl.shared.learning.recapture import WrittenText
from specl.shared.learning.steps import BatchSampler
from specl.shared.models.head import HeadDraft
from specl.shared.prompts import ShippedPrompt
from specl.shared.training_files import draft_build
from specl.shared.training_files.draft_build import BuildTexts, read_examples
from specl.shared.training_files.shards import load_shard

WORDS = ["the", "rain", "in", "the", "street", "and", "one", "more", "thing", "to", "tell"]
HEAD = BuildSettings(
    tokens=500, seconds=600, hot_size=128, answer_tokens=12, top_k=8, epochs=2, batch_size=4, learning_rate=1e-3
)
LAYERS = replace(HEAD, kind="layers", layers=(0, 3), depths=1)


def asked(count, start=0):
    return [
        ShippedPrompt(f"p{n}", "chat", [{"role": "user", "content": f"{WORDS[n % 11]} {WORDS[n % 7]} {n}"}])
        for n in range(start, start + count)
    ]


TEXTS = BuildTexts(asked(40), asked(6, 100))
ABOUT = {"prompts_sha256": "0"}


def run(target, folder, settings, texts=TEXTS, tell=lambda progress: None):
    return draft_build.build(target, texts, folder / "work", folder / "draft", settings, ABOUT, tell)


def weights_of(folder):
    return dict(mx.load(str(folder / "draft" / "model.safetensors")))


class Killed(BaseException):
    pass


@pytest.mark.parametrize("settings", [HEAD, LAYERS], ids=["head", "layers"])
def test_build_makes_a_draft_and_leaves_the_target(stored, tmp_path, settings):
    target = stored()
    before = embedding_digest(target)
    built = run(target, tmp_path, replace(settings, epochs=4))
    figures = built.manifest["training"]
    assert figures["loss_last"] < figures["loss_first"] and figures["steps"] == 4 * (
        built.manifest["training_prompts"] // 4
    )
    assert figures["tokens_seen"] == pytest.approx(4 * built.manifest["training_tokens"], rel=0.1)
    assert built.manifest["target_embedding_sha256"] == before == embedding_digest(target)
    assert isinstance(built.draft, HeadDraft) == (settings.kind == "head")
    assert len(built.by_depth.acceptance) == 3
    assert len(np.load(tmp_path / "draft" / "replay.npz")["lengths"]) > 0


def test_an_embedding_that_changed_is_noticed(stored, tmp_path, monkeypatch):
    target = stored()
    inner = target.model.model.embed_tokens
    kept = inner.weight

    def meddle(*arguments, **more):
        inner.weight = kept + 1e-3
        return DepthRates((), ())

    monkeypatch.setattr(draft_build, "acceptance_by_depth", meddle)
    try:
        with pytest.raises(ModelError, match="embedding"):
            run(target, tmp_path, LAYERS)
    finally:
        inner.weight = kept


@pytest.fixture(scope="module")
def uninterrupted(stored, tmp_path_factory):
    folders = {}
    for settings in (HEAD, LAYERS):
        folders[settings.kind] = tmp_path_factory.mktemp("whole")
        run(stored(), folders[settings.kind], settings)
    return folders


@pytest.mark.parametrize("settings", [HEAD, LAYERS], ids=["head", "layers"])
def test_build_killed_at_any_stage_resumes_identically(stored, tmp_path, settings, uninterrupted, monkeypatch):
    target, moments = stored(), []
    monkeypatch.setattr(draft_build, "CHECKPOINT_S", 0.0)  # after every step

    def dies_at(stage, count):
        passed = 0

        def tell(progress):
            nonlocal passed
            passed += progress.stage == stage
            if progress.stage == stage and passed == count:
                moments.append(progress.stage)
                raise Killed

        return tell

    for stage, count in (
        ("writing held-out text", 3),
        ("writing training text", 2),
        ("writing training text", 7),
        ("training", 1),
        ("training", 6),
    ):
        with pytest.raises(Killed):
            run(target, tmp_path, settings, tell=dies_at(stage, count))
        assert not (tmp_path / "draft").exists()
    with monkeypatch.context() as patch:
        patch.setattr(draft_build, "save_replay", lambda *arguments: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):  # the weights are written, the folder has no name yet
            run(target, tmp_path, settings)
    assert not (tmp_path / "draft").exists()
    built = run(target, tmp_path, settings)
    assert len(moments) == 5
    assert built.manifest["training"]["steps"] == 2 * (built.manifest["training_prompts"] // 4)
    whole, resumed = weights_of(uninterrupted[settings.kind]), weights_of(tmp_path)
    assert whole.keys() == resumed.keys()
    for name in whole:
        assert mx.allclose(
            whole[name].astype(mx.float32), resumed[name].astype(mx.float32), rtol=2e-2, atol=2e-3
        ).item(), name


def test_build_replaces_an_older_draft(stored, tmp_path):
    for leftover in (".draft.partial", ".draft.old"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "half").write_text("x")
    run(stored(), tmp_path, LAYERS)
    run(stored(), tmp_path, LAYERS)
    assert {path.name for path in tmp_path.iterdir()} == {"draft", "work"}
    assert not (tmp_path / "draft" / "half").exists()


def test_work_begun_otherwise_is_refused_with_what_differs(stored, tmp_path):
    run(stored(), tmp_path, LAYERS)
    with pytest.raises(ModelError, match=r"loss .*kl"):
        run(stored(), tmp_path, replace(LAYERS, loss=replace(LAYERS.loss, kind="kl")))
    with pytest.raises(ModelError, match="seed 0 .now 1"):
        run(stored(), tmp_path, replace(LAYERS, seed=1))
    with pytest.raises(ModelError, match="target"):
        run(stored(quantised=True), tmp_path, LAYERS)


def test_head_trains_on_the_shards_of_layers(stored, tmp_path):
    run(stored(), tmp_path, LAYERS)
    (shard, *_) = sorted((tmp_path / "work").glob("training-*.npz"))
    bare, full = load_shard(shard), read_examples(stored(), [shard], "head")
    assert bare[0].states is None
    for example in full:
        direct = stored().hidden_states(mx.array(example.tokens[None, :-1].astype(np.int64)))[0]
        assert np.allclose(example.states, np.array(direct), atol=2e-2)


def texts_in(folder):
    with np.load(folder / "draft" / "replay.npz") as file:
        ends = np.cumsum(file["lengths"])
        return {file["tokens"][end - size : end].tobytes() for end, size in zip(ends, file["lengths"], strict=True)}


def test_what_is_replayed_later_is_never_trained_on(stored, tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(build_draft, "BatchSampler", lambda *given: trained.extend(given[0]) or BatchSampler(*given))
    run(stored(), tmp_path, LAYERS)
    kept = texts_in(tmp_path)
    assert len(kept) == len(trained) // 9  # a tenth of all
    assert not kept & {example.tokens.astype(np.uint32).tobytes() for example in trained if example.greedy}


def test_synthetic_prompts_fill_up_and_are_made_once(stored, tmp_path, monkeypatch):
    asked_for = []

    def synthesize(target, count, temperature, rng, accepts):
        asked_for.append(rng.bit_generator.state["state"]["state"])
        return [f"tell me more about the rain, please {n} {len(asked_for)}" for n in range(count)]

    monkeypatch.setattr(build_draft, "synthetic_prompts", synthesize)
    more = replace(LAYERS, tokens=40 * 12 + 300)
    assert run(stored(), tmp_path, more).manifest["answers_to_synthetic_prompts"] > 10
    ids = [e.id for path in sorted((tmp_path / "work").glob("training-*.npz")) for e in load_shard(path)]
    assert {id.split("-")[0] for id in ids[40:]} == {"synthetic"} and len(ids) > 60
    made = len(asked_for)
    assert len(set(asked_for)) == made >= 1
    run(stored(), tmp_path, more)
    assert len(asked_for) == made


def refuses(*given):
    raise ModelError("the chat template does not show a user's words")


@pytest.mark.parametrize("synthesize", [lambda *given: [], refuses], ids=["nothing", "refuses"])
def test_prompts_are_answered_again_when_synthesis_fails(stored, tmp_path, monkeypatch, synthesize):
    monkeypatch.setattr(build_draft, "synthetic_prompts", synthesize)
    run(stored(), tmp_path, replace(LAYERS, tokens=40 * 12 + 300))
    found = [e for path in sorted((tmp_path / "work").glob("training-*.npz")) for e in load_shard(path)]
    again = [example for example in found if example.id.endswith("#again")]
    assert len(again) > 20 and not any(example.greedy for example in again)


# ---------------------------------------------------------------------------------------------------- own traffic
def own(count):
    rng = np.random.default_rng(7)
    return [
        WrittenText(f"own/{n}", rng.integers(4, 290, 20 + n).astype(np.uint32), 9, n % 2 == 0) for n in range(count)
    ]


@pytest.mark.parametrize("settings", [HEAD, LAYERS], ids=["head", "layers"])
def test_user_texts_alone_build_a_draft(stored, tmp_path, settings):
    texts = own(40)
    built = run(stored(), tmp_path, settings, BuildTexts([], asked(6, 100), texts))
    assert built.manifest["user_texts"] == 40
    assert built.manifest["training_tokens"] == sum(len(text.tokens) - 9 for text in texts)
    assert not list((tmp_path / "work").glob("own-*"))
    assert not (tmp_path / "draft" / "replay.npz").exists()


def test_user_texts_join_prompts_without_replay(stored, tmp_path):
    built = run(stored(), tmp_path, LAYERS, BuildTexts(asked(40), asked(6, 100), own(5)))
    assert built.manifest["user_texts"] == 5 and built.manifest["training_prompts"] > 40
    tokens = np.load(tmp_path / "draft" / "replay.npz")["tokens"]
    for text in own(5):
        windows = np.lib.stride_tricks.sliding_window_view(tokens, len(text.tokens))
        assert not (windows == text.tokens).all(axis=1).any()


def test_next_run_does_not_learn_purged_texts(stored, tmp_path):
    def stop(progress):
        if progress.stage == "training":
            raise Killed

    with pytest.raises(Killed):
        run(stored(), tmp_path, LAYERS, BuildTexts([], asked(6, 100), own(40)), stop)
    (tmp_path / "work" / "own-half.partial.npz").write_bytes(b"PK")
    assert len(list((tmp_path / "work").glob("own-*"))) == 3
    left = [text for text in own(40) if text.id != "own/3"]
    read = []
    built = run(
        stored(),
        tmp_path,
        LAYERS,
        BuildTexts([], asked(6, 100), left),
        lambda p: read.append(p) if p.stage == "reading written text" else None,
    )
    assert built.manifest["user_texts"] == 39
    assert read[-1].total == 31  # the shard that held it is gone; the other one is used again


# ---------------------------------------------------------------------------------------------------- by depth
@pytest.mark.parametrize("settings", [HEAD, LAYERS], ids=["head", "layers"])
def test_acceptance_by_depth_counts_drafting_at_every_position(stored, tmp_path, settings):
    from specl.shared.engine.drafters import DraftSampler, HeadDrafter, ModelDrafter
    from specl.shared.learning.learner import Learner, acceptance_by_depth
    from specl.shared.sampling_params import SamplingParams

    target = stored()
    built = run(target, tmp_path, replace(settings, epochs=6))
    examples = read_examples(target, sorted((tmp_path / "work").glob("held-out-*.npz")), settings.kind)
    stood, tried = np.zeros(3), np.zeros(3)
    greedy = DraftSampler(SamplingParams(temperature=0.0), lambda: 0.5, None)
    for example in examples:
        text = [int(token) for token in example.tokens]
        states = target.hidden_states(mx.array([text[:-1]]))[0]
        for place in range(example.prompt_length, len(text) - 2):
            head = settings.kind == "head"
            drafter = HeadDrafter(built.draft) if head else ModelDrafter(built.draft, int(target.config["vocab_size"]))
            drafter.extend(text[:place], states[: place - 1] if head else None)
            for depth, token in enumerate(drafter.propose(3, greedy).tokens):
                tried[depth] += 1
                stood[depth] += token == text[place + depth]
                if token != text[place + depth]:
                    break
    rates = acceptance_by_depth(Learner(built.draft), examples).acceptance
    assert tried[1] > 0
    # places at the very end of a text have no second or third token to judge
    assert rates[1:] == pytest.approx((stood / np.maximum(tried, 1))[1:], abs=0.06)
    assert rates[0] == pytest.approx(stood[0] / tried[0], abs=0.12)
