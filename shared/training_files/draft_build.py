"""`draft build` in a work folder: generate, choose a hot vocabulary, train, evaluate, write.
The method is in learning/build_draft.py.

Every stage leaves files in the work folder and skips what is already there, so that a stopped build
goes on where it was. A time limit is divided between generating and training; the draft is made of
what there is when it ends.
"""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from specl.shared.errors import ModelError
from specl.shared.learning.batch_generate import batch_generate
from specl.shared.learning.build_draft import (
    SYNTHETIC_IDS,
    BuildSettings,
    DraftTraining,
    PromptGroup,
    TrainingFigures,
    embedding_digest,
    encode_prompts,
    hot_coverage,
    new_draft,
    prompt_groups,
    split_replay,
    training_groups,
    training_plan,
)
from specl.shared.learning.depths import DepthRates
from specl.shared.learning.examples import Example
from specl.shared.learning.learner import Learner, acceptance_by_depth
from specl.shared.learning.recapture import WrittenText, recapture
from specl.shared.models.head import HeadDraft, load_head, save_head
from specl.shared.models.language_model import LanguageModel
from specl.shared.models.layers import save_layers
from specl.shared.models.load import load
from specl.shared.runtime.progress import OnProgress, ProgressMeter, ignore_progress
from specl.shared.training_files.captured_texts import capture_texts, remove_captured
from specl.shared.training_files.checkpoint import load_checkpoint, read_notes, save_checkpoint
from specl.shared.training_files.shards import load_or_discard, load_shard, save_shard
from specl.shared.training_files.target_texts import save_replay, save_target_texts

GENERATE_SHARE = 0.6  # of the time limit
HELDOUT_SHARE = 0.1  # of the time limit
CHECKPOINT_S = 60.0
HELDOUT_PROMPTS = 96


@dataclass(frozen=True, slots=True)
class BuildTexts:
    """What a build learns from and is evaluated on: prompts that the target answers, texts that it
    wrote before in a user's traffic, and texts that it wrote for earlier builds. Where `prompts` do
    not give enough text, the target writes prompts, of which those that pass `may_train` are used.
    """

    prompts: Sequence[Any]
    heldout: Sequence[Any]
    user_texts: Sequence[WrittenText] = ()
    earlier_texts: Sequence[WrittenText] = ()
    may_train: Callable[[str], bool] = lambda text: True


@dataclass(frozen=True, slots=True)
class BuiltDraft:
    """A finished build: the draft as written and loaded again, its held-out acceptance by depth,
    its manifest.
    """

    draft: HeadDraft | LanguageModel
    by_depth: DepthRates
    manifest: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _TrainingTexts:
    """Examples by origin. `general` and `users` are trained on, `replay` is kept for the trainer."""

    general: list[Example]
    users: list[Example]
    replay: list[Example]
    earlier_count: int

    @property
    def training(self) -> list[Example]:
        return self.general + self.users


def build(
    target: LanguageModel,
    texts: BuildTexts,
    work: Path,
    out: Path,
    settings: BuildSettings,
    about: dict[str, Any],
    report: OnProgress = ignore_progress,
    begin: HeadDraft | None = None,
    keep_answers: Path | None = None,
) -> BuiltDraft:
    """The whole build. `about` goes into the manifest; a head begins with the weights of `begin`
    where given; `keep_answers` is the file that the target's answers are written to, a user's
    traffic left out. Raises ModelError where the target was changed.
    """
    work.mkdir(parents=True, exist_ok=True)
    work.chmod(0o700)  # it may hold what a user wrote
    start, digest = time.monotonic(), embedding_digest(target)
    sources = "+".join(filter(None, [about.get("prompts_sha256"), *about.get("answers_sha256", [])])) or None
    check_origin(work, {"target": target.fingerprint, "prompts": sources, "seed": settings.seed})
    pipeline = _Pipeline(target, texts, work, settings, start, report)
    heldout = pipeline.generate_heldout()
    examples = pipeline.training_texts(keep_answers)
    draft = new_draft(target, examples.training, settings, begin)
    figures = train(draft, examples.training, work, settings, start + settings.seconds, report)
    tests = read_examples(target, heldout, settings.kind)
    by_depth = acceptance_by_depth(Learner(draft), tests)
    if embedding_digest(target) != digest:
        raise ModelError(
            f"the embedding of {target.name} changed while its draft was trained: this is a fault of the program"
        )
    manifest = about | _manifest(target, settings, digest, examples, figures, len(tests), by_depth)
    manifest["hours"] = round((time.monotonic() - start) / 3600, 3)
    if isinstance(draft, HeadDraft):
        manifest["hot_coverage_heldout"] = hot_coverage(tests, draft.hot)
    manifest = json.loads(json.dumps(manifest))
    built = BuiltDraft(_write(draft, target, out, manifest, examples.replay), by_depth, manifest)
    remove_captured(work)
    return built


@dataclass(frozen=True, slots=True)
class _Pipeline:
    """The stages of one build before training. `start` is when it began (monotonic seconds)."""

    target: LanguageModel
    texts: BuildTexts
    work: Path
    settings: BuildSettings
    start: float
    report: OnProgress

    def generate_heldout(self) -> list[Path]:
        """Shards of the answers that the draft is evaluated on."""
        prompts = encode_prompts(self.target, self.texts.heldout[:HELDOUT_PROMPTS], self.settings, sampled=False)
        deadline = self.start + HELDOUT_SHARE * self.settings.seconds
        groups = prompt_groups(prompts)
        return generate(self.target, groups, self.work, "held-out", self.settings, deadline, self.report)

    def training_texts(self, keep_answers: Path | None) -> _TrainingTexts:
        """Read the given texts again and generate further ones."""
        target, texts, settings = self.target, self.texts, self.settings
        deadline = self.start + GENERATE_SHARE * settings.seconds
        written = [*texts.user_texts, *texts.earlier_texts]
        captured = capture_texts(
            target, written, self.work, settings.top_k, settings.reads_states, deadline, self.report
        )
        user_ids = {text.id for text in texts.user_texts}
        users = [example for example in captured if example.id in user_ids]
        earlier = [example for example in captured if example.id not in user_ids]
        shards: list[Path] = []
        if texts.prompts:
            groups = training_groups(target, texts.prompts, texts.may_train, settings)
            shards = generate(target, groups, self.work, "training", settings, deadline, self.report)
        answers = [*earlier, *read_examples(target, shards, settings.kind)]
        if keep_answers is not None and answers:
            save_target_texts(keep_answers, answers, target.fingerprint)
        general, replay = split_replay(answers)
        return _TrainingTexts(general, users, replay, len(earlier))


def _manifest(
    target: LanguageModel,
    settings: BuildSettings,
    digest: str,
    examples: _TrainingTexts,
    figures: TrainingFigures,
    heldout_prompts: int,
    by_depth: DepthRates,
) -> dict[str, Any]:
    """What the draft's manifest says of its build."""
    return {
        "kind": settings.kind,
        "target": target.name,
        "target_fingerprint": target.fingerprint,
        "target_embedding_sha256": digest,
        "settings": settings.as_json(),
        "training_prompts": len(examples.training),
        "training_tokens": int(sum(example.rows for example in examples.training)),
        "user_texts": len(examples.users),
        "texts_of_earlier_builds": examples.earlier_count,
        "answers_to_synthetic_prompts": sum(example.id.startswith(SYNTHETIC_IDS) for example in examples.general),
        "training": figures.as_json(),
        "heldout_prompts": heldout_prompts,
        "heldout_agreement_by_depth": [round(value, 4) for value in by_depth.agreement],
        "heldout_acceptance_by_depth": [round(value, 4) for value in by_depth.acceptance],
    }


def _write(
    draft: HeadDraft | LanguageModel,
    target: LanguageModel,
    out: Path,
    manifest: dict[str, Any],
    replay: Sequence[Example],
) -> HeadDraft | LanguageModel:
    """Write the draft's folder, which appears whole, and load the draft from it."""

    def add_replay(folder: Path) -> None:
        save_replay(replay, folder / "replay.npz")

    if isinstance(draft, HeadDraft):
        save_head(draft, out, manifest, add_replay)
        return load_head(out, out.name, target)
    save_layers(draft, target, out, manifest, add_replay)
    return load(out.name, out.parent, path=out)


# ---------------------------------------------------------------------------------------------------- stages
def generate(
    target: LanguageModel,
    groups: Iterable[PromptGroup],
    folder: Path,
    name: str,
    settings: BuildSettings,
    deadline: float,
    report: OnProgress,
) -> list[Path]:
    """Answer groups of prompts, a shard each, until there are `settings.tokens` tokens or until
    `deadline` (monotonic seconds).
    """
    shards: list[Path] = []
    meter = ProgressMeter(f"writing {name} text", settings.tokens, report)
    for number, group in enumerate(groups):
        path = folder / f"{name}-{number:05d}.npz"
        if meter.done >= settings.tokens:
            break
        if (examples := load_or_discard(path)) is not None:
            meter.skip(sum(example.rows for example in examples))
        elif time.monotonic() > deadline and shards:
            break
        else:
            rng = np.random.default_rng([settings.seed, number])
            save_shard(
                path,
                batch_generate(
                    target, group(), settings.answer_tokens, settings.top_k, settings.reads_states, rng, meter.advance
                ),
            )
        shards.append(path)
    return shards


def read_examples(target: LanguageModel, shards: Sequence[Path], kind: str) -> list[Example]:
    """The examples of shards, as this kind of draft needs them: a head reads states, which are
    captured where a shard has none.
    """
    examples = []
    for shard in shards:
        for example in load_shard(shard):
            if example.rows < 2:
                continue
            states = example.states if kind == "head" else None
            if kind == "head" and states is None:
                states, _, _ = recapture(target, example.tokens, example.prompt_length, 1, with_top_k=False)
            examples.append(example.with_states(states))
    return examples


def train(
    draft: HeadDraft | LanguageModel,
    examples: Sequence[Example],
    work: Path,
    settings: BuildSettings,
    deadline: float,
    report: OnProgress,
) -> TrainingFigures:
    """Train until the epochs or the time are over, with checkpoints. Raises ModelError for a
    checkpoint of another training.
    """
    training = DraftTraining(draft, examples, settings)
    checkpoint, plan = work / "checkpoint", json.loads(json.dumps(training_plan(settings)))
    _resume(training, work, checkpoint, plan)
    saved = time.monotonic()

    def save() -> None:
        nonlocal saved
        save_checkpoint(checkpoint, training.state, {**training.figures.as_json(), "plan": plan})
        saved = time.monotonic()

    def save_now_and_then() -> None:
        if time.monotonic() - saved > CHECKPOINT_S:
            save()

    training.run(deadline, report, save_now_and_then)
    save()
    return training.figures


def _resume(training: DraftTraining, work: Path, checkpoint: Path, plan: dict[str, Any]) -> None:
    notes = read_notes(checkpoint)
    if notes is None:
        return
    if notes.get("plan", plan) != plan:
        raise _begun_otherwise(f"{work} holds a training", notes["plan"], plan)
    state = load_checkpoint(checkpoint)
    figures = TrainingFigures(
        state.step,
        notes.get("tokens_seen", 0),
        notes.get("seconds", 0.0),
        notes.get("loss_first"),
        notes.get("loss_last"),
    )
    training.resume(state, figures)


def check_origin(work: Path, origin: dict[str, Any]) -> None:
    """Note in `work` what it is for. Raises ModelError where it was begun with another `origin`,
    whose text it holds.
    """
    path = work / "origin.json"
    try:
        noted = json.loads(path.read_text())
    except FileNotFoundError:
        path.write_text(json.dumps(origin))
        return
    except ValueError as error:
        raise ModelError(f"{path} is damaged", f"remove {work}, or give another --work") from error
    if noted != origin:
        raise _begun_otherwise(f"{work} holds a build", noted, origin)


def _begun_otherwise(what: str, old: dict[str, Any], new: dict[str, Any]) -> ModelError:
    differences = [f"{name} {old.get(name)} (now {new.get(name)})" for name in new if old.get(name) != new[name]]
    return ModelError(
        f"{what} that was begun otherwise: {', '.join(differences)}",
        "give the same options to go on with it, or another --work to begin anew",
    )
