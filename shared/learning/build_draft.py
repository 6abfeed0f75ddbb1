"""`draft build`: a draft out of the target itself. Generate, choose a hot vocabulary, train, evaluate, write.

Every stage leaves files under its work folder and skips what is already there, so a stopped build goes on where it was.
A time limit is shared out between generating and training; what there is when it ends is what the draft is made of.
"""

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from specl.shared.errors import ModelError
from specl.shared.learning.batch_generate import Prompt, answer, kept_shard, load_shard, recapture, save_shard
from specl.shared.learning.depths import ByDepth
from specl.shared.learning.examples import Example, hot_vocabulary
from specl.shared.learning.learner import Learner, by_depth
from specl.shared.learning.losses import LossSettings
from specl.shared.learning.steps import Batches, StepLoop, StepSettings, about_checkpoint
from specl.shared.learning.synthetic_prompts import invent
from specl.shared.learning.target_texts import save_answers, save_replay, set_aside
from specl.shared.learning.user_texts import OwnText, capture, forget
from specl.shared.models.head import HeadDraft, load_head, new_head, save_head
from specl.shared.models.language_model import LanguageModel
from specl.shared.models.layers import new_layers, save_layers
from specl.shared.models.load import load
from specl.shared.prompts import ShippedPrompt
from specl.shared.runtime.progress import Progress, Tell

BATCH_ROWS = 32
SORT_WINDOW = 8  # batches sorted by length together: little padding, prompts still mixed
GENERATE_SHARE = 0.6  # of the time limit
CHECKPOINT_S = 60.0
HELDOUT_PROMPTS = 96
INVENTING_TEMPERATURE = 1.0
KINDS = ("head", "layers")
Group = Callable[[], list[Prompt]]  # made when it is needed: a shard that is there needs no prompts


@dataclass(frozen=True, slots=True)
class BuildSettings:
    """What a build is made of. `tokens` counts generated tokens; `seconds` limits everything. `layers` are the target's
    that a `layers` draft has; `hot_size` and `depths` are a head's.
    """

    kind: str = "head"
    layers: tuple[int, ...] = ()
    tokens: int = 200_000
    seconds: float = 3600.0
    hot_size: int = 8192
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
class Texts:
    """What a build learns from and is judged by: prompts that the target answers, and texts that it wrote before: of a user's
    traffic (`own`), or for an earlier build (`written`).

    Where more text is wanted than the prompts give, the target invents prompts; `wanted` may refuse some.
    """

    prompts: Sequence[Any]
    heldout: Sequence[Any]
    own: Sequence[OwnText] = ()
    written: Sequence[OwnText] = ()
    wanted: Callable[[str], bool] = lambda text: True


@dataclass(frozen=True, slots=True)
class Built:
    """A finished build: the draft as written and read again, its held-out acceptance by depth, its manifest."""

    draft: HeadDraft | LanguageModel
    by_depth: ByDepth
    manifest: dict[str, Any]


def _groups(prompts: Sequence[Prompt]) -> list[Group]:
    window = BATCH_ROWS * SORT_WINDOW
    ordered: list[Prompt] = []
    for start in range(0, len(prompts), window):
        ordered += sorted(prompts[start : start + window], key=lambda prompt: len(prompt.tokens))
    return [partial(ordered.__getitem__, slice(i, i + BATCH_ROWS)) for i in range(0, len(ordered), BATCH_ROWS)]


def _passes(target: LanguageModel, texts: Texts, settings: BuildSettings) -> Iterator[Group]:
    """Groups of all prompts; then, for as long as text is wanted, of what the target invents: of the prompts again, sampled,
    where it invents nothing.
    """
    prompts = encode_prompts(target, texts.prompts, settings)
    yield from _groups(prompts)
    again = [replace(prompt, id=f"{prompt.id}#again", temperature=settings.temperature) for prompt in prompts]
    repeats = itertools.cycle(_groups(again))
    for number in itertools.count():
        yield partial(_invented, target, texts.wanted, settings, number, next(repeats))


def _invented(
    target: LanguageModel, wanted: Callable[[str], bool], settings: BuildSettings, number: int, instead: Group
) -> list[Prompt]:
    """One group of invented prompts, `instead` where hardly any came about."""
    rng = np.random.default_rng([settings.seed, 1, number])
    try:
        made = invent(target, BATCH_ROWS, INVENTING_TEMPERATURE, rng, wanted)
    except ModelError:  # a chat template that does not lend itself to it
        made = []
    if len(made) < BATCH_ROWS // 4:
        return instead()
    items = [
        ShippedPrompt(f"invented-{number}-{n}", "invented", [{"role": "user", "content": text}])
        for n, text in enumerate(made)
    ]
    return encode_prompts(target, items, settings, rng=rng)


def generate(
    target: LanguageModel,
    groups: Iterable[Group],
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
        if done >= settings.tokens:
            break
        if (kept := kept_shard(path)) is not None:
            done += sum(example.rows for example in kept)
        elif time.monotonic() > deadline and shards:
            break
        else:
            rng = np.random.default_rng([settings.seed, number])

            def tick(count: int) -> None:
                nonlocal made, done
                made, done = made + count, done + count
                pace = made / (time.monotonic() - start)
                tell(Progress(f"writing {name} text", done, settings.tokens, (settings.tokens - done) / pace))

            with_states = settings.kind == "head"
            made_now = answer(target, group(), settings.answer_tokens, settings.top_k, with_states, rng, tick)
            save_shard(path, made_now)
        shards.append(path)
    return shards


def encode_prompts(
    target: LanguageModel,
    prompts: Sequence[Any],
    settings: BuildSettings,
    sampled: bool = True,
    rng: np.random.Generator | None = None,
) -> list[Prompt]:
    """Shipped or user prompts through the chat template; a share is answered at temperature, the rest greedily."""
    rng = rng or np.random.default_rng(settings.seed)
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


def read_examples(target: LanguageModel, shards: Sequence[Path], kind: str) -> list[Example]:
    """What shards hold, as this kind of draft needs it: a head reads states, which are captured where a shard has none."""
    examples = []
    for shard in shards:
        for example in load_shard(shard):
            if example.rows < 2:
                continue
            states = example.states if kind == "head" else None
            if kind == "head" and states is None:
                states, _, _ = recapture(target, example.tokens, example.prompt_length, 1, with_law=False)
            examples.append(example.with_states(states))
    return examples


def train(
    draft: HeadDraft | LanguageModel,
    examples: Sequence[Example],
    folder: Path,
    settings: BuildSettings,
    deadline: float,
    tell: Tell,
) -> dict[str, Any]:
    """Train until the epochs or the time are over; resumes from its checkpoint. Returns steps, tokens seen, seconds and losses.

    Raises ModelError for a checkpoint of another training.
    """
    learner = Learner(draft)
    per_epoch = max(1, len(examples) // settings.batch_size)
    total = per_epoch * settings.epochs
    batches = Batches(examples, (), settings.batch_size, 0.0, settings.seed)
    loop = StepLoop(learner, settings.loss, StepSettings(settings.learning_rate, total, depths=settings.depths))
    checkpoint, plan = folder / "checkpoint", _plan(settings)
    first, smooth, before, seen = None, None, 0.0, 0
    about = about_checkpoint(checkpoint)
    if about is not None:
        if about.get("plan", plan) != plan:
            raise ModelError(
                f"{folder} holds a training that was begun otherwise: {_differences(about['plan'], plan)}",
                "give the same options to go on with it, or another --work to begin anew",
            )
        loop.resume(checkpoint)
        first, smooth, before = about.get("loss_first"), about.get("loss_last"), about.get("seconds", 0.0)
        seen = about.get("tokens_seen", 0)
        for _ in range(loop.step_number):
            batches.next()
    start, begun = time.monotonic(), loop.step_number
    saved = start

    def figures() -> dict[str, Any]:
        seconds = round(before + time.monotonic() - start, 1)
        losses = {"loss_first": first, "loss_last": smooth}
        return {"steps": loop.step_number, "tokens_seen": seen, "seconds": seconds, **losses}

    while loop.step_number < total and time.monotonic() < deadline:
        loop.time_share = (time.monotonic() - start) / max(deadline - start, 1e-9)
        group = batches.next()
        loss = loop.step([group])
        seen += sum(example.rows for example in group)
        first = loss if first is None else first
        smooth = loss if smooth is None else 0.98 * smooth + 0.02 * loss
        pace = (time.monotonic() - start) / (loop.step_number - begun)
        left = min(pace * (total - loop.step_number), max(0.0, deadline - time.monotonic()))
        tell(Progress("training", loop.step_number, total, left, f"loss {smooth:.3f}"))
        if time.monotonic() - saved > CHECKPOINT_S:
            loop.save(checkpoint, {**figures(), "plan": plan})
            saved = time.monotonic()
    loop.save(checkpoint, {**figures(), "plan": plan})
    return figures()


def _plan(settings: BuildSettings) -> dict[str, Any]:
    """What a checkpoint cannot be carried over: everything that shapes weights, data order or schedule but their length."""
    names = ["kind", "layers", "batch_size", "learning_rate", "loss", "seed"]
    names += ["hot_size", "depths"] if settings.kind == "head" else []
    return json.loads(json.dumps({name: value for name, value in asdict(settings).items() if name in names}))


def _differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    return ", ".join(f"{name} {old.get(name)} (now {new.get(name)})" for name in new if old.get(name) != new[name])


def check_work(work: Path, origin: dict[str, Any]) -> None:
    """Remember what `work` is for. Raises ModelError where it was begun for something else, whose text it holds."""
    path = work / "origin.json"
    try:
        held = json.loads(path.read_text())
    except FileNotFoundError:
        path.write_text(json.dumps(origin))
        return
    except ValueError as error:
        raise ModelError(f"{path} is damaged", f"remove {work}, or give another --work") from error
    if held != origin:
        raise ModelError(
            f"{work} holds a build that was begun otherwise: {_differences(held, origin)}",
            "give the same options to go on with it, or another --work to begin anew",
        )


def embedding_digest(target: LanguageModel) -> str:
    """sha256 over the target's embedding and head in memory: what every draft shares and no training may touch."""
    digest = hashlib.sha256()
    for holder, name in ((target.model.model, "embed_tokens"), (target.model, "lm_head")):
        if name in holder:
            for _, value in sorted(tree_flatten(holder[name].parameters())):
                digest.update(np.array(value.view(mx.uint8), copy=False))
    return digest.hexdigest()


def build(
    target: LanguageModel,
    texts: Texts,
    work: Path,
    out: Path,
    settings: BuildSettings,
    about: dict[str, Any],
    tell: Tell = lambda progress: None,
    begin: HeadDraft | None = None,
    keep_answers: Path | None = None,
) -> Built:
    """The whole pipeline, a head from `begin`'s weights where given; `keep_answers` is where the target's answers go, a user's
    own traffic left out. Raises ModelError where the target itself was changed."""
    work.mkdir(parents=True, exist_ok=True)
    work.chmod(0o700)  # it may hold what a user wrote
    start, shared = time.monotonic(), embedding_digest(target)
    begun_with = "+".join(filter(None, [about.get("prompts_sha256"), *about.get("answers_sha256", [])])) or None
    check_work(work, {"target": target.fingerprint, "prompts": begun_with, "seed": settings.seed})
    heldout = encode_prompts(target, texts.heldout[:HELDOUT_PROMPTS], settings, sampled=False)
    judged = generate(target, _groups(heldout), work, "held-out", settings, start + 0.1 * settings.seconds, tell)
    deadline, shards = start + GENERATE_SHARE * settings.seconds, []
    read = [*texts.own, *texts.written]
    captured = capture(target, read, work, settings.top_k, settings.kind == "head", deadline, tell)
    users = {text.id for text in texts.own}
    own = [example for example in captured if example.id in users]
    written = [example for example in captured if example.id not in users]
    if texts.prompts:
        shards = generate(target, _passes(target, texts, settings), work, "training", settings, deadline, tell)
    answers = [*written, *read_examples(target, shards, settings.kind)]
    if keep_answers is not None and answers:
        save_answers(keep_answers, answers, target.fingerprint)
    general, replay = set_aside(answers)
    examples = general + own
    draft = _untrained(target, examples, settings, begin)
    figures = train(draft, examples, work, settings, start + settings.seconds, tell)
    tests = read_examples(target, judged, settings.kind)
    judged_at = by_depth(Learner(draft), tests)
    if embedding_digest(target) != shared:
        raise ModelError(
            f"the embedding of {target.name} changed while its draft was trained: this is a fault of the program"
        )
    manifest = {
        **about,
        "kind": settings.kind,
        "target": target.name,
        "target_fingerprint": target.fingerprint,
        "target_embedding_sha256": shared,
        "settings": asdict(settings),
        "training_prompts": len(examples),
        "training_tokens": int(sum(example.rows for example in examples)),
        "own_texts": len(own),
        "texts_of_earlier_builds": len(written),
        "answers_to_invented_prompts": sum(example.id.startswith("invented-") for example in general),
        "training": figures,
        "heldout_prompts": len(tests),
        "heldout_agreement_by_depth": [round(value, 4) for value in judged_at.agreement],
        "heldout_acceptance_by_depth": [round(value, 4) for value in judged_at.acceptance],
        "hours": round((time.monotonic() - start) / 3600, 3),
    }
    if settings.kind == "head":
        manifest["hot_coverage_heldout"] = _coverage(tests, draft.hot)
    manifest = json.loads(json.dumps(manifest))
    built = Built(_write(draft, target, out, manifest, replay), judged_at, manifest)
    forget(work)
    return built


def _untrained(
    target: LanguageModel, examples: Sequence[Example], settings: BuildSettings, begin: HeadDraft | None
) -> HeadDraft | LanguageModel:
    """The draft before training: a head at random or from `begin`'s weights, or the target's own layers."""
    if settings.kind != "head":
        return new_layers(target, settings.layers)
    hot = hot_vocabulary(examples, settings.hot_size, int(target.config["vocab_size"]))
    mx.random.seed(settings.seed)
    draft = new_head(target, hot)
    if begin is not None:
        draft.head.update(begin.head.parameters())
    return draft


def _write(
    draft: HeadDraft | LanguageModel,
    target: LanguageModel,
    out: Path,
    manifest: dict[str, Any],
    replay: Sequence[Example],
) -> HeadDraft | LanguageModel:
    """The draft's folder, whole, and what it holds read again."""

    def beside(folder: Path) -> None:
        save_replay(replay, folder / "replay.npz")

    if isinstance(draft, HeadDraft):
        save_head(draft, out, manifest, beside)
        return load_head(out, out.name, target)
    save_layers(draft, target, out, manifest, beside)
    return load(out.name, out.parent, path=out)


def _coverage(examples: Sequence[Example], hot: np.ndarray) -> float:
    tokens = np.concatenate([example.tokens[example.prompt_length :] for example in examples])
    return round(float(np.isin(tokens, hot).mean()), 4)
