"""`draft build`: a head draft out of the target itself. Generate, choose a hot vocabulary, train, evaluate, write.

Every stage leaves files under its work folder and skips what is already there, so a stopped build goes on where it was.
A time limit is shared out between generating and training; what there is when it ends is what the draft is made of.
"""

import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from specl.shared.errors import ModelError
from specl.shared.learning.examples import Example, hot_vocabulary
from specl.shared.learning.learner import Agreement, Learner, agreement
from specl.shared.learning.losses import LossSettings
from specl.shared.learning.steps import Batches, StepLoop, StepSettings, about_checkpoint
from specl.shared.learning.traffic import Prompt, answer, load_shard, save_shard
from specl.shared.models.head import HeadDraft, load_head, new_head, save_head
from specl.shared.models.load import LanguageModel

BATCH_ROWS = 32
SORT_WINDOW = 8  # batches sorted by length together: little padding, prompts still mixed
GENERATE_SHARE = 0.6  # of the time limit
CHECKPOINT_EVERY = 200
HELDOUT_PROMPTS = 96
REPLAY_TEXTS = 200


@dataclass(frozen=True, slots=True)
class BuildSettings:
    """What a build is made of. `tokens` counts generated tokens; `seconds` limits everything."""

    tokens: int = 200_000
    seconds: float = 3600.0
    hot_size: int = 6144
    answer_tokens: int = 160
    top_k: int = 32
    sampled_share: float = 0.35
    temperature: float = 0.8
    epochs: int = 6
    batch_size: int = 8
    learning_rate: float = 1e-3
    loss: LossSettings = field(default_factory=lambda: LossSettings("acceptance"))
    depths: int = 2
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a build is: `done` of `total` (tokens or steps), seconds left by the current pace, and a note."""

    stage: str
    done: int
    total: int
    left_s: float
    note: str = ""


Tell = Callable[[Progress], None]


def _groups(prompts: Sequence[Prompt]) -> list[list[Prompt]]:
    window = BATCH_ROWS * SORT_WINDOW
    ordered: list[Prompt] = []
    for start in range(0, len(prompts), window):
        ordered += sorted(prompts[start : start + window], key=lambda prompt: len(prompt.tokens))
    return [ordered[i : i + BATCH_ROWS] for i in range(0, len(ordered), BATCH_ROWS)]


def _passes(prompts: Sequence[Prompt], settings: BuildSettings) -> Iterator[list[Prompt]]:
    """Groups of all prompts; then of all prompts again, sampled, for as long as text is wanted."""
    yield from _groups(prompts)
    for number in itertools.count(2):
        yield from _groups([Prompt(f"{p.id}#{number}", p.tokens, settings.temperature) for p in prompts])


def generate(
    target: LanguageModel,
    groups: Iterable[list[Prompt]],
    folder: Path,
    name: str,
    settings: BuildSettings,
    deadline: float,
    tell: Tell,
) -> list[Path]:
    """Answer groups of prompts into a shard each; stops at the token budget or the deadline (monotonic seconds)."""
    shards, done, start = [], 0, time.monotonic()
    made = 0
    for number, group in enumerate(groups):
        path = folder / f"{name}-{number:05d}.npz"
        if done >= settings.tokens or (not path.exists() and time.monotonic() > deadline and shards):
            break
        if not path.exists():
            rng = np.random.default_rng([settings.seed, number])

            def tick(count: int) -> None:
                nonlocal made, done
                made, done = made + count, done + count
                pace = made / (time.monotonic() - start)
                tell(Progress(f"writing {name} text", done, settings.tokens, (settings.tokens - done) / pace))

            save_shard(path, answer(target, group, settings.answer_tokens, settings.top_k, True, rng, tick))
        else:
            done += sum(example.rows for example in load_shard(path))
        shards.append(path)
    return shards


def encode_prompts(
    target: LanguageModel, prompts: Sequence[Any], settings: BuildSettings, sampled: bool = True
) -> list[Prompt]:
    """Shipped or user prompts through the chat template; a share is answered at temperature, the rest greedily."""
    rng = np.random.default_rng(settings.seed)
    encoded = []
    for prompt in prompts:
        text = target.tokenizer.apply_chat_template(prompt.messages, tokenize=False, add_generation_prompt=True)
        tokens = list(target.tokenizer.encode(text, add_special_tokens=False))
        warm = sampled and rng.random() < settings.sampled_share
        if len(tokens) < target.context_length - settings.answer_tokens:
            encoded.append(Prompt(prompt.id, tokens, settings.temperature if warm else 0.0))
    if not encoded:
        raise ModelError("there are no prompts to build a draft from")
    return [encoded[i] for i in rng.permutation(len(encoded))] if sampled else encoded


def train(
    draft: HeadDraft, examples: Sequence[Example], folder: Path, settings: BuildSettings, deadline: float, tell: Tell
) -> dict[str, Any]:
    """Train until the epochs or the time are over; resumes from its checkpoint. Returns steps, seconds and losses."""
    learner = Learner(draft)
    per_epoch = max(1, len(examples) // settings.batch_size)
    total = per_epoch * settings.epochs
    batches = Batches(examples, (), settings.batch_size, 0.0, settings.seed)
    loop = StepLoop(learner, settings.loss, StepSettings(settings.learning_rate, total, depths=settings.depths))
    checkpoint = folder / "checkpoint"
    if about_checkpoint(checkpoint) is not None:
        loop.resume(checkpoint)
        for _ in range(loop.step_number):
            batches.next()
    start, first, smooth, begun = time.monotonic(), None, None, loop.step_number
    while loop.step_number < total and time.monotonic() < deadline:
        loop.time_share = (time.monotonic() - start) / max(deadline - start, 1e-9)
        loss = loop.step([batches.next()])
        first = loss if first is None else first
        smooth = loss if smooth is None else 0.98 * smooth + 0.02 * loss
        pace = (time.monotonic() - start) / (loop.step_number - begun)
        left = min(pace * (total - loop.step_number), max(0.0, deadline - time.monotonic()))
        tell(Progress("training", loop.step_number, total, left, f"loss {smooth:.3f}"))
        if loop.step_number % CHECKPOINT_EVERY == 0:
            loop.save(checkpoint, {})
    loop.save(checkpoint, {})
    return {
        "steps": loop.step_number,
        "seconds": round(time.monotonic() - start, 1),
        "loss_first": first,
        "loss_last": smooth,
    }


def build_head(
    target: LanguageModel,
    train_prompts: Sequence[Any],
    heldout_prompts: Sequence[Any],
    work: Path,
    out: Path,
    settings: BuildSettings,
    about: dict[str, Any],
    tell: Tell = lambda progress: None,
    begin: HeadDraft | None = None,
) -> tuple[HeadDraft, Agreement, dict[str, Any]]:
    """The whole pipeline, from `begin`'s weights where given. Returns the draft as written, its held-out agreement (greedy prompts) and its manifest."""
    work.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    heldout = encode_prompts(target, heldout_prompts[:HELDOUT_PROMPTS], settings, sampled=False)
    judged = generate(target, _groups(heldout), work, "held-out", settings, start + 0.1 * settings.seconds, tell)
    prompts = encode_prompts(target, train_prompts, settings)
    groups = _passes(prompts, settings)
    shards = generate(target, groups, work, "training", settings, start + GENERATE_SHARE * settings.seconds, tell)
    examples = [example for shard in shards for example in load_shard(shard) if example.rows > 1]
    hot = hot_vocabulary(examples, settings.hot_size, int(target.config["vocab_size"]))
    draft = new_head(target, hot)
    if begin is not None:
        draft.head.update(begin.head.parameters())
    figures = train(draft, examples, work, settings, start + settings.seconds, tell)
    tests = [example for shard in judged for example in load_shard(shard) if example.rows > 1]
    score = agreement(Learner(draft), tests, depths=3)
    manifest = {
        **about,
        "kind": "head",
        "target": target.name,
        "target_fingerprint": target.fingerprint,
        "settings": asdict(settings),
        "training_prompts": len(examples),
        "training_tokens": int(sum(example.rows for example in examples)),
        "training": figures,
        "hot_coverage_heldout": _coverage(tests, hot),
        "heldout_prompts": len(tests),
        "heldout_agreement_by_depth": [round(value, 4) for value in score.by_depth],
        "hours": round((time.monotonic() - start) / 3600, 3),
    }
    save_head(draft, out, json.loads(json.dumps(manifest)))
    save_replay(examples, out / "replay.npz", settings.seed)
    return load_head(out, out.name, target), score, manifest


def save_replay(examples: Sequence[Example], path: Path, seed: int) -> None:
    """Token ids of some training texts: what the trainer replays so that general text is not forgotten."""
    rng = np.random.default_rng(seed)
    greedy = [example for example in examples if example.greedy]
    chosen = [greedy[i] for i in rng.permutation(len(greedy))[:REPLAY_TEXTS]]
    np.savez_compressed(
        path,
        tokens=np.concatenate([example.tokens for example in chosen]).astype(np.uint32),
        lengths=np.array([len(example.tokens) for example in chosen], np.uint32),
        prompt_lengths=np.array([example.prompt_length for example in chosen], np.uint32),
    )


def _coverage(examples: Sequence[Example], hot: np.ndarray) -> float:
    tokens = np.concatenate([example.tokens[example.prompt_length :] for example in examples])
    return round(float(np.isin(tokens, hot).mean()), 4)
