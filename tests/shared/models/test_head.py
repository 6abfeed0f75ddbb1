"""The head draft: its shapes, its cache against the text, its hot rows, and training's view of it against drafting's."""

import io
import json

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache

from specl.shared.engine.drafters import DraftSampler, HeadDrafter
from specl.shared.errors import ModelError
from specl.shared.models.head import head_shape, is_head, load_head, new_head, save_head
from specl.shared.sampling_params import SamplingParams

HOT = np.arange(1, 97, 3)
TEXT = [5, 17, 40, 8, 17, 40, 8, 22, 31, 90, 2, 64]
GREEDY = DraftSampler(SamplingParams(temperature=0.0), lambda: 0.5, None)
ATOL = 2e-4  # where few rows are computed natively their sums run in another order


@pytest.fixture
def target(tiny):
    return tiny(seed=31)


@pytest.fixture
def draft(target):
    mx.random.seed(5)
    return new_head(target, HOT)


def states_of(target, text):
    """The state from which each token but the first was predicted, [n - 1, hidden]."""
    return target.hidden_states(mx.array([text[:-1]]))[0]


def naive_draft(draft, text, k):
    """The oracle: no cache, everything computed anew for each of k greedy tokens; what the head itself put out stands in
    for the states that the target has not computed.
    """
    states, tokens = states_of(draft.target, text), list(text)
    found = []
    for _ in range(k):
        embeddings = draft.target.embed(mx.array([tokens[1:]]))
        last = draft.head(states[None], embeddings)[0, -1:]
        found.append(int(draft.hot[int(mx.argmax(draft.logits(last)[0]).item())]))
        tokens.append(found[-1])
        states = mx.concatenate([states, last])
    return found


def drafter_after(draft, text):
    drafter = HeadDrafter(draft)
    drafter.extend(text, states_of(draft.target, text))
    return drafter


# ---------------------------------------------------------------------------------------------------- shapes
def test_head_is_a_layer_of_the_targets_kind(target, draft):
    shape = head_shape(target, len(HOT))
    assert draft.shape == shape
    assert (shape.hidden_size, shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim) == (64, 4, 2, 16)
    out = draft.head(mx.zeros((2, 5, 64)), mx.zeros((2, 5, 64)))
    assert out.shape == (2, 5, 64)
    assert draft.logits(out).shape == (2, 5, len(HOT))
    assert [x.shape for x in draft.head.unroll(mx.zeros((1, 7, 64)), mx.zeros((1, 7, 64)), 3)] == [(1, 7, 64)] * 3


def test_target_weights_are_not_the_heads(draft):
    from mlx.utils import tree_flatten

    names = {name for name, _ in tree_flatten(draft.head.parameters())}
    assert not any("embed" in name and "norm" not in name for name in names) and not any("output" in n for n in names)


# ---------------------------------------------------------------------------------------------------- hot vocabulary
def test_hot_scores_are_exactly_the_targets_rows(target, draft):
    rows = np.array(target.model.lm_head.weight)[HOT]
    assert (np.array(draft.output.weight) == rows).all()
    out = mx.random.normal((1, 20, 64))  # more rows than the native path takes
    whole = np.array(out @ target.model.lm_head.weight.T)
    assert np.allclose(np.array(draft.logits(out)), whole[..., HOT], atol=1e-4)


def test_exchanged_hot_vocabulary_scores_and_restores(target, draft):
    before = np.array(draft.output.weight)
    draft.set_hot(HOT[::-1] + 1)
    assert (draft.hot == HOT + 1).all()
    assert (np.array(draft.output.weight) == np.array(target.model.lm_head.weight)[HOT + 1]).all()
    draft.set_hot(HOT)
    assert (np.array(draft.output.weight) == before).all()


@pytest.mark.parametrize(
    "hot", [HOT[1:], np.r_[HOT, 0], np.r_[-1, HOT[1:]], np.r_[HOT[1:], 97], np.r_[HOT[1:], HOT[1]]]
)
def test_hot_vocabulary_outside_the_vocabulary_is_refused(draft, hot):
    with pytest.raises(ModelError, match="32 distinct tokens below 97"):
        draft.set_hot(hot)
    assert (draft.hot == HOT).all()


def test_only_hot_tokens_are_proposed(draft):
    proposed = drafter_after(draft, TEXT).propose(6, GREEDY).tokens
    assert len(proposed) == 6 and set(proposed) <= set(HOT.tolist())


# ---------------------------------------------------------------------------------------------------- cache and text
def test_cache_stays_in_step_after_rewinds(target, draft):
    rng, text = np.random.default_rng(0), list(TEXT)
    drafter = drafter_after(draft, text)
    for _ in range(12):
        k = int(rng.integers(0, 6))
        proposed = drafter.propose(k, GREEDY)
        assert proposed.tokens == naive_draft(draft, text, k), "as if it had read the whole text anew"
        assert drafter.length == len(text)
        if k:
            assert drafter.cache.offset == len(text) - 1, "guesses leave no entry behind"
        accepted = proposed.tokens[: int(rng.integers(0, k + 1))]
        new = [*accepted, int(rng.integers(0, 97))]
        text += new
        drafter.extend(new, states_of(target, text)[-len(new) :])
        assert drafter.length == len(text)
        if rng.random() < 0.4:  # a stop string cut the answer, or a next turn shares only a part
            text = text[: len(text) - int(rng.integers(1, 4))]
            drafter.rewind(len(text))
            assert drafter.length == len(text)
            if drafter._last is None and not drafter._tokens:
                assert drafter.propose(3, GREEDY).tokens == [], "nothing to start from until the text grows again"
                token = int(rng.integers(0, 97))
                text.append(token)
                drafter.extend([token], states_of(target, text)[-1:])


def test_rewinding_to_nothing_starts_anew(target, draft):
    drafter = drafter_after(draft, TEXT)
    drafter.propose(2, GREEDY)
    drafter.rewind(0)
    assert drafter.length == 0 and drafter.propose(2, GREEDY).tokens == []
    other = [9, 9, 41, 3, 77]
    drafter.extend(other, states_of(target, other))
    assert drafter.propose(3, GREEDY).tokens == naive_draft(draft, other, 3)


def test_states_of_other_tokens_are_an_error(draft):
    drafter = HeadDrafter(draft)
    with pytest.raises(ValueError, match="3 tokens with 1 states"):
        drafter.extend([1, 2, 3, 4], mx.zeros((1, 64)))
    with pytest.raises(ValueError, match="needs the target's states"):
        drafter.extend([1], None)


# ---------------------------------------------------------------------------------------------------- training's view
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_unrolled_is_step_by_step_at_every_place(target, draft, steps):
    states = states_of(target, TEXT)[None]
    embeddings = target.embed(mx.array([TEXT[1:]]))
    outputs = draft.head.unroll(states, embeddings, steps)
    for start in range(len(TEXT) - steps):
        cache = KVCache()
        out = draft.head(states[:, : start + 1], embeddings[:, : start + 1], cache)[:, -1:]
        for depth in range(steps):
            place = start + depth
            assert mx.allclose(outputs[depth][:, place], out[:, 0], atol=ATOL).item(), (start, depth)
            if place + 1 < embeddings.shape[1]:
                out = draft.head(out, embeddings[:, place + 1 : place + 2], cache)


# ---------------------------------------------------------------------------------------------------- on disk
def test_a_saved_head_drafts_as_before(target, draft, tmp_path):
    for _ in range(2):  # the second time replaces a folder that is there
        save_head(draft, tmp_path / "draft", {"note": 1})
    assert is_head(tmp_path / "draft") and not is_head(tmp_path)
    loaded = load_head(tmp_path / "draft", "draft", target)
    assert (loaded.hot == draft.hot).all() and loaded.shape == draft.shape and len(loaded.fingerprint) == 16
    x = mx.random.normal((1, 20, 64))
    assert mx.allclose(loaded.head(x, x), draft.head(x, x), atol=0.05).item()  # bf16 on disk
    assert sorted(path.name for path in tmp_path.iterdir()) == ["draft"]


WRONG_FIELDS = [
    {"hidden_size": "64"}, {"head_dim": None}, {"head_dim": 0}, {"num_attention_heads": -1}, {"rope_theta": [1]},
    {"hot_size": 1.5}, {"hidden_size": 10**30}, {"target_name": 3}, {"rms_norm_eps": float("nan")},
    {"num_key_value_heads": 3},
]  # fmt: skip
WRONG_HOT = [HOT + 50, HOT * 10**6, -HOT, np.repeat(HOT[:1], len(HOT)), HOT[:-1], HOT.astype(float), HOT[None]]


def npy(array):
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def test_damaged_or_mismatched_head_is_refused(target, tiny, draft, tmp_path):
    folder = tmp_path / "draft"
    save_head(draft, folder, {})
    with pytest.raises(ModelError, match="was made for tiny"):
        load_head(folder, "draft", tiny(seed=32))
    config = json.loads((folder / "config.json").read_text())
    for name, data in (
        ("hot_vocab.npy", b"\x93NUMPY"),
        ("hot_vocab.npy", b""),
        ("model.safetensors", b"abc"),
        ("config.json", json.dumps(config | {"surprise": 1}).encode()),
        ("config.json", b"{"),
        ("config.json", b"[]"),
        *(("config.json", json.dumps(config | changed).encode()) for changed in WRONG_FIELDS),
        *(("hot_vocab.npy", npy(hot)) for hot in WRONG_HOT),
    ):
        kept = (folder / name).read_bytes()
        (folder / name).write_bytes(data)
        with pytest.raises(ModelError, match="damaged"):
            load_head(folder, "draft", target)
        (folder / name).write_bytes(kept)
    load_head(folder, "draft", target)
