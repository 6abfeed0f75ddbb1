"""What a draft learns from, cut and put into batches: positions stay right, and distributions of different k fit into one batch."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specl.shared.learning.examples import Example, collate
from specl.shared.learning.learner import Learner, agreement
from specl.shared.learning.losses import LOSSES, LossSettings, TargetTopK, position_losses
from specl.shared.models.head import new_head
from tests.conftest import tiny_model


def numbered(prompt, rows):
    """Every array says where in the text its row belongs."""
    n, places = prompt + rows, np.arange(prompt, prompt + rows)
    return Example(
        "a", np.arange(n, dtype=np.uint32), prompt, np.column_stack([places, places]).astype(np.uint32),
        np.column_stack([-places, -places]).astype(np.float32), places.astype(np.float32),
        np.arange(n - 1, dtype=np.float32)[:, None], False,
    )  # fmt: skip


@given(prompt=st.integers(1, 60), rows=st.integers(1, 60), limit=st.integers(1, 130))
def test_long_text_keeps_its_end_and_row_alignment(prompt, rows, limit):
    whole = numbered(prompt, rows)
    cut = whole.clipped(limit)
    kept = min(limit, prompt + rows)
    first = prompt + rows - kept  # the token that is the first now
    assert cut.tokens.tolist() == list(range(first, prompt + rows))
    assert cut.rows == len(cut.ids) == len(cut.logprobs) == len(cut.weights) == min(rows, kept - 1) >= 0
    assert cut.tokens[cut.prompt_length :].tolist() == cut.weights.tolist()
    assert (cut.ids[:, 0] == cut.weights).all() and (cut.logprobs[:, 1] == -cut.weights).all()
    assert cut.states[:, 0].tolist() == cut.tokens[:-1].tolist()
    assert (cut.id, cut.greedy) == ("a", False) and cut.prompt_length >= 1
    assert whole.with_states(None).clipped(limit).states is None


def test_overlong_prompt_leaves_the_answer_to_learn():
    assert numbered(600, 40).clipped(512).rows == 40
    batch = collate([numbered(600, 40).clipped(512), numbered(20, 3)])
    assert len(batch.supervised) == 43


# ---------------------------------------------------------------------------------------------------- distributions of different k
def text(n, k, rows=9):
    """A text with a made-up distribution over `k` tokens, the emitted one first."""
    rng = np.random.default_rng(n)
    tokens = rng.integers(4, 97, 5 + rows).astype(np.uint32)
    others = [rng.choice(np.setdiff1d(np.arange(97), [token]), k - 1, replace=False) for token in tokens[5:]]
    ids = np.column_stack([tokens[5:], np.array(others, np.uint32).reshape(rows, k - 1)])
    logprobs = np.log(rng.dirichlet(np.ones(k + 1), rows)[:, :k]).astype(np.float16)
    states = rng.normal(size=(4 + rows, 64)).astype(np.float16)
    return Example(f"{n}", tokens, 5, ids, logprobs, np.ones(rows, np.float32), states, n % 2 == 0)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("draft", ["head", "model"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_rows_of_another_k_weigh_the_same(kind, draft, temperature):
    target = tiny_model()
    learner = Learner(new_head(target, np.arange(0, 90)) if draft == "head" else target)
    texts, settings = [text(1, 6), text(2, 3)], LossSettings(kind, temperature)

    def losses(batch):
        rows, pick = learner.outputs(batch, 1)[0]
        return position_losses(learner.logits(rows), learner.target_top_k(batch, pick), settings)

    (mixed, valid), alone = losses(collate(texts)), [losses(collate([one])) for one in texts]
    if kind != "acceptance":  # which weighs its parts by the whole batch's overlap
        assert np.allclose(mixed, np.concatenate([loss for loss, _ in alone]), rtol=1e-4, atol=1e-5)
    assert np.isfinite(np.array(mixed)).all()
    assert np.array_equal(valid, np.concatenate([is_valid for _, is_valid in alone]))


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_padding_has_no_loss_or_gradient(kind, temperature):
    rng = np.random.default_rng(3)
    logits, logprobs = (
        mx.array(rng.normal(size=(4, 20)).astype(np.float32)),
        np.log(rng.dirichlet(np.ones(6), 4)[:, :5]),
    )
    columns = np.argsort(rng.random((4, 20)), axis=1)[:, :5]
    found = []
    for extra in (0, 7):
        filled = np.pad(columns, ((0, 0), (0, extra)), constant_values=-1)
        sampling = np.pad(logprobs, ((0, 0), (0, extra)), constant_values=-np.inf).astype(np.float32)
        teacher = TargetTopK(mx.array(filled), mx.array(sampling), mx.array(columns[:, 0]), mx.ones(4))
        loss = lambda rows, given=teacher: position_losses(rows, given, LossSettings(kind, temperature))[0].sum()  # noqa: E731
        found.append(mx.value_and_grad(loss)(logits))
    (value, slope), (filled_value, filled_slope) = found
    assert filled_value.item() == pytest.approx(value.item(), rel=1e-6)
    assert mx.allclose(slope, filled_slope, atol=1e-7).item() and mx.abs(slope).max().item() > 1e-3


def test_draft_is_judged_on_rows_of_any_k():
    learner, texts = Learner(tiny_model()), [text(n, k) for n, k in enumerate((2, 7, 4, 1))]
    together, alone = agreement(learner, texts, 2), [agreement(learner, [one], 2) for one in texts]
    assert together.hits == pytest.approx([one.hits[0] for one in alone], rel=1e-4)
    assert together.by_depth[0] == pytest.approx(together.value)
