"""The stages of `draft build` as functions of arrays: which prompts the target answers, the
untrained draft, its training.

Knows no folder: `training_files.draft_build` keeps what each stage makes, so that a stopped build
goes on where it was.
"""

import hashlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from specl.shared.errors import ModelError
from specl.shared.learning.batch_generate import Prompt
from specl.shared.learning.examples import Example, hot_vocabulary
from specl.shared.learning.learner import Learner
from specl.shared.learning.losses import LossSettings
from specl.shared.learning.steps import BatchSampler, StepLoop, StepSettings, TrainingState
from specl.shared.learning.synthetic_prompts import synthetic_prompts
from specl.shared.models import chat_prompt
from specl.shared.models.head import HeadDraft, new_head
from specl.shared.models.language_model import LanguageModel
from specl.shared.models.layers import new_layers
from specl.shared.prompts import ShippedPrompt
from specl.shared.runtime.progress import OnProgress, ProgressMeter

BATCH_ROWS = 32
SORT_WINDOW = 8  # batches sorted by length together: little padding, prompts still mixed
SYNTHETIC_TEMPERATURE = 1.0
SYNTHETIC_IDS = ("synthetic-", "invented-")  # how the ids of answers to synthetic prompts begin; the second until 0.1
SMOOTHING = 0.98  # of the running loss
REPLAY_TEXTS = 600  # 96 were not enough: four minutes of training had each ten times, and general text fell by 0.02
REPLAY_SHARE = 0.1  # of the answers at most: they are kept out of training
PromptGroup = Callable[[], list[Prompt]]  # called when needed: a shard that exists needs no prompts


@dataclass(frozen=True, slots=True)
class BuildSettings:
    """How a draft is built. `tokens` counts generated tokens; `seconds` limits the whole build.
    `layers` are the target's that a `layers` draft has; `hot_size` and `depths` are a head's.
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

    @property
    def reads_states(self) -> bool:
        """Whether this kind of draft reads the target's hidden states."""
        return self.kind == "head"

    def as_json(self) -> dict[str, Any]:
        """For a manifest or a checkpoint's notes."""
        return asdict(self) | {"loss": self.loss.as_json()}


# ---------------------------------------------------------------------------------------------------- prompts
def encode_prompts(
    target: LanguageModel,
    prompts: Sequence[Any],
    settings: BuildSettings,
    sampled: bool = True,
    rng: np.random.Generator | None = None,
) -> list[Prompt]:
    """Prompts through the chat template, in random order: a share is answered at temperature, the
    rest greedily. Without `sampled` all are greedy and in order. Raises ModelError where none fits
    the target's context.
    """
    rng = rng or np.random.default_rng(settings.seed)
    encoded = []
    for prompt in prompts:
        rendered = chat_prompt.render(target.tokenizer, prompt.messages, target.content_form)
        tokens = chat_prompt.encode(target.tokenizer, rendered)
        warm = sampled and rng.random() < settings.sampled_share
        if len(tokens) < target.context_length - settings.answer_tokens:
            encoded.append(Prompt(prompt.id, tokens, settings.temperature if warm else 0.0))
    if not encoded:
        raise ModelError("there are no prompts to build a draft from")
    return [encoded[i] for i in rng.permutation(len(encoded))] if sampled else encoded


def prompt_groups(prompts: Sequence[Prompt]) -> list[PromptGroup]:
    """Prompts in groups of BATCH_ROWS of similar length."""
    window = BATCH_ROWS * SORT_WINDOW
    ordered: list[Prompt] = []
    for start in range(0, len(prompts), window):
        ordered += sorted(prompts[start : start + window], key=lambda prompt: len(prompt.tokens))
    groups = [ordered[start : start + BATCH_ROWS] for start in range(0, len(ordered), BATCH_ROWS)]
    return [partial(list, group) for group in groups]


def training_groups(
    target: LanguageModel, prompts: Sequence[Any], may_train: Callable[[str], bool], settings: BuildSettings
) -> Iterator[PromptGroup]:
    """Groups of all `prompts`, then, without end, of synthetic prompts that pass `may_train`. Where
    the target writes none, of `prompts` again, sampled.
    """
    encoded = encode_prompts(target, prompts, settings)
    yield from prompt_groups(encoded)
    again = [replace(prompt, id=f"{prompt.id}#again", temperature=settings.temperature) for prompt in encoded]
    repeats = itertools.cycle(prompt_groups(again))
    for number in itertools.count():
        yield partial(_synthetic_group, target, may_train, settings, number, next(repeats))


def _synthetic_group(
    target: LanguageModel,
    may_train: Callable[[str], bool],
    settings: BuildSettings,
    number: int,
    fallback: PromptGroup,
) -> list[Prompt]:
    """One group of synthetic prompts; `fallback` where hardly any came about."""
    rng = np.random.default_rng([settings.seed, 1, number])
    try:
        texts = synthetic_prompts(target, BATCH_ROWS, SYNTHETIC_TEMPERATURE, rng, may_train)
    except ModelError:  # the chat template does not show a user's words
        texts = []
    if len(texts) < BATCH_ROWS // 4:
        return fallback()
    items = [
        ShippedPrompt(f"{SYNTHETIC_IDS[0]}{number}-{n}", "synthetic", [{"role": "user", "content": text}])
        for n, text in enumerate(texts)
    ]
    return encode_prompts(target, items, settings, rng=rng)


# ---------------------------------------------------------------------------------------------------- the draft
def split_replay(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Training examples, and greedy answers to replay later, which the draft must not know by
    heart: the last ones, which a draft that this build began from has not seen either.
    """
    count = min(REPLAY_TEXTS, int(REPLAY_SHARE * len(examples)))
    greedy = [i for i, example in enumerate(examples) if example.greedy]
    replayed = set(greedy[len(greedy) - count :] if count < len(greedy) else greedy)
    return (
        [example for i, example in enumerate(examples) if i not in replayed],
        [example for i, example in enumerate(examples) if i in replayed],
    )


def new_draft(
    target: LanguageModel, examples: Sequence[Example], settings: BuildSettings, begin: HeadDraft | None
) -> HeadDraft | LanguageModel:
    """The draft before training: a head at random or with the weights of `begin`, or the target's
    own layers.
    """
    if settings.kind != "head":
        return new_layers(target, settings.layers)
    hot = hot_vocabulary(examples, settings.hot_size, int(target.config["vocab_size"]))
    mx.random.seed(settings.seed)
    draft = new_head(target, hot)
    if begin is not None:
        draft.head.update(begin.head.parameters())  # type: ignore[no-untyped-call]  # mlx has no types here
    return draft


def hot_coverage(examples: Sequence[Example], hot: np.ndarray) -> float:
    """The share of all output tokens that the hot vocabulary `hot` has."""
    tokens = np.concatenate([example.tokens[example.prompt_length :] for example in examples])
    return round(float(np.isin(tokens, hot).mean()), 4)


def embedding_digest(target: LanguageModel) -> str:
    """sha256 over the target's embedding and output head in memory, which every draft shares and no
    training may change.
    """
    digest = hashlib.sha256()
    for holder, name in ((target.model.model, "embed_tokens"), (target.model, "lm_head")):
        if name in holder:
            arrays: dict[str, mx.array] = dict(tree_flatten(holder[name].parameters()))
            for _, value in sorted(arrays.items()):
                digest.update(np.array(value.view(mx.uint8), copy=False).data)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------- training
@dataclass(slots=True)
class TrainingFigures:
    """How far a training is: seconds of all its runs, the first step's loss and the running mean."""

    steps: int = 0
    tokens_seen: int = 0
    seconds: float = 0.0
    loss_first: float | None = None
    loss_last: float | None = None

    def add(self, loss: float, tokens: int) -> None:
        """Count one step."""
        self.steps += 1
        self.tokens_seen += tokens
        self.loss_first = loss if self.loss_first is None else self.loss_first
        self.loss_last = loss if self.loss_last is None else SMOOTHING * self.loss_last + (1 - SMOOTHING) * loss

    def as_json(self) -> dict[str, Any]:
        """For a manifest or a checkpoint's notes."""
        return asdict(self)


class DraftTraining:
    """Trains a draft for some epochs. `state` and `figures` are what a checkpoint needs, and
    `resume` takes them back.
    """

    def __init__(self, draft: HeadDraft | LanguageModel, examples: Sequence[Example], settings: BuildSettings) -> None:
        self.figures = TrainingFigures()
        self.total_steps = max(1, len(examples) // settings.batch_size) * settings.epochs
        self._batches = BatchSampler(examples, (), settings.batch_size, 0.0, settings.seed)
        step_settings = StepSettings(settings.learning_rate, self.total_steps, depths=settings.depths)
        self._loop = StepLoop(Learner(draft), settings.loss, step_settings)

    @property
    def state(self) -> TrainingState:
        """Weights and optimizer after the last step."""
        return self._loop.state

    def resume(self, state: TrainingState, figures: TrainingFigures) -> None:
        """Go on from a checkpoint, with the batches that come after it."""
        self._loop.restore(state)
        self.figures = figures
        for _ in range(state.step):
            self._batches.next()

    def run(self, deadline: float, report: OnProgress, after_step: Callable[[], None]) -> None:
        """Take all steps, or those that fit before `deadline` (monotonic seconds)."""
        start, before = time.monotonic(), self.figures.seconds
        meter = ProgressMeter("training", self.total_steps, report, done=self._loop.step_number)
        while self._loop.step_number < self.total_steps and time.monotonic() < deadline:
            self._loop.time_share = (time.monotonic() - start) / max(deadline - start, 1e-9)
            group = self._batches.next()
            self.figures.add(self._loop.step([group]), sum(example.rows for example in group))
            self.figures.seconds = round(before + time.monotonic() - start, 1)
            meter.advance(note=f"loss {self.figures.loss_last:.3f}", at_most_s=deadline - time.monotonic())
            after_step()


def training_plan(settings: BuildSettings) -> dict[str, Any]:
    """What must be the same for a checkpoint to be gone on with: what shapes weights, data order or
    schedule, but not length.
    """
    names = ["kind", "layers", "batch_size", "learning_rate", "loss", "seed"]
    names += ["hot_size", "depths"] if settings.kind == "head" else []
    return {name: value for name, value in settings.as_json().items() if name in names}
