"""Rows of the store as examples: failures, replayed successes, held-out conversations; states from
the spool or recomputed.

A conversation is held out by a stable hash of its id; a held-out text is never trained on, in
another conversation neither. General texts to replay come with the draft (`replay.npz`: texts of
its target), because a new user's store has no successes yet.
"""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specl.daemons.trainer.stratified_sample import stratified_sample
from specl.shared.engine.core import EngineCore
from specl.shared.learning.examples import Example, is_held_out
from specl.shared.learning.recapture import recapture
from specl.shared.retention.hidden_states import HiddenSpool
from specl.shared.runtime import log
from specl.shared.settings.schema import Settings
from specl.shared.store import GenerationSummary, Store, StoredGeneration
from specl.shared.store.failure import is_failure
from specl.shared.training_files.shards import DAMAGED, load_or_discard, read_arrays, save_shard

MAX_TOKENS = 512  # of an example: the last of a long text
MAX_RECAPTURED_TOKENS = 1024  # of a long text whose states are computed again
MAX_HELD_OUT = 100
HELD_OUT_DAYS = 30
NEWEST = 20_000  # generations that failures, successes and held-out ones are chosen from
REPLAY_PART = 96  # texts captured at once: about 20 s on two cores
Tokens = NDArray[Any]
Text = tuple[Tokens, int]  # tokens, and how many of them are the prompt
OnProgress = Callable[[int, int], None]  # done, in all
_log = log.get("replay")


@dataclass(frozen=True, slots=True)
class TrainingData:
    """The examples of one run: `failures` and `successes` are trained on, `held_out` judges.
    `last_generation` is the newest seen.
    """

    failures: list[Example]
    successes: list[Example]
    held_out: list[Example]
    last_generation: str


@dataclass(frozen=True, slots=True)
class Split:
    """Generations, newest first. `eval_rows` are those of `held_out` that are new enough to judge
    by.
    """

    failures: list[GenerationSummary]
    successes: list[GenerationSummary]
    held_out: list[GenerationSummary]
    eval_rows: list[GenerationSummary]
    newest: str


def to_example(row: StoredGeneration, error_weight: float) -> Example:
    """One stored generation; positions where the draft was wrong weigh more."""
    prompt = np.frombuffer(row.prompt_tokens, "<u4")
    output = np.frombuffer(row.output_tokens, "<u4")
    if row.top_k is None or row.top_ids is None or row.top_logprobs is None:
        raise ValueError(f"{row.id} has no top-k to learn from")
    k = row.top_k
    rows = min(len(output), len(row.top_ids) // (4 * k))
    weights = np.ones(rows, np.float32)
    for item in row.disagreements:
        if item.position < rows:
            weights[item.position] = error_weight
    return Example(
        id=row.id,
        tokens=np.concatenate([prompt, output[:rows]]),
        prompt_length=len(prompt),
        ids=np.frombuffer(row.top_ids, "<u4").reshape(-1, k)[:rows],
        logprobs=np.frombuffer(row.top_logprobs, "<f2").reshape(-1, k)[:rows],
        weights=weights,
        states=None,
        greedy=row.temperature == 0,
    )


class DataLoader:
    """Reads examples for an engine's draft. `pause` is called between pieces of work and may wait."""

    def __init__(
        self, store: Store, engine: EngineCore, settings: Settings, spool: HiddenSpool, pause: Callable[[], object]
    ) -> None:
        self.store, self.engine, self.settings, self.spool, self._pause = store, engine, settings, spool, pause

    def split(self, clock: Callable[[], float] = time.time) -> Split:
        """Split the stored generations of this target by kind. It is quick, because no text is read."""
        threshold = self.settings.speculative.acceptance_threshold
        rows = [row for row in self.store.generation_summaries(NEWEST) if self._fits(row)]
        failures, successes, held_out = [], [], []
        for row in rows:
            if is_held_out(row.conversation_id, self.settings.training.heldout_share):
                held_out.append(row)
            elif is_failure(row.score, threshold):
                failures.append(row)
            else:
                successes.append(row)
        since = clock() - HELD_OUT_DAYS * 86400
        eval_rows = [row for row in held_out if row.created_at > since]
        return Split(failures, successes, held_out, eval_rows, rows[0].id if rows else "")

    def load(self, split: Split | None = None) -> TrainingData:
        """Failures, successes and held-out conversations, each chosen by stratified_sample.py. No
        held-out text, be it in another conversation too, is among those to train on.
        """
        training, split = self.settings.training, split or self.split()
        held_out = self._examples(split.eval_rows, MAX_HELD_OUT)
        # all held-out texts, not only those that judge today: tomorrow it may be another part of
        # them
        excluded = self._texts_of([row.id for row in split.held_out])
        failures, successes = (
            [example for example in self._examples(rows, most) if example.tokens.tobytes() not in excluded]
            for rows, most in (
                (split.failures, training.max_failure_cases),
                (split.successes, training.replay_buffer_size),
            )
        )
        return TrainingData(failures, successes, held_out, last_generation=split.newest)

    def since(self, moment: float, most: int, without: Collection[str]) -> list[Example]:
        """Answers that were generated after `moment` (seconds since the epoch), newest first, held out
        or not. Texts of the generations in `without` are left out.
        """
        rows = [row for row in self.store.generation_summaries(most) if self._fits(row) and row.created_at > moment]
        excluded = self._texts_of(list(without))
        return [example for example in self._examples(rows, most) if example.tokens.tobytes() not in excluded]

    def _texts_of(self, ids: Sequence[str]) -> set[bytes]:
        """The ends of these generations' texts, as long as examples are."""
        return {text[-4 * MAX_TOKENS :] for text in self.store.tokens(list(ids))}

    def _fits(self, row: GenerationSummary) -> bool:
        return row.target_fingerprint == self.engine.target.fingerprint and row.output_count > 1

    def _examples(self, rows: Sequence[GenerationSummary], most: int) -> list[Example]:
        """At most `most` of these rows as examples, without repeats."""
        chosen = self.store.generations([row.id for row in stratified_sample(rows, most)])
        return _distinct([self.example(row) for row in chosen])

    def example(self, row: StoredGeneration) -> Example:
        """One row, with the states that a head needs."""
        example = to_example(row, self.settings.training.loss.error_weight)
        return (self.with_states(example) if self.engine.reads_states else example).clipped(MAX_TOKENS)

    def with_states(self, example: Example) -> Example:
        """`example` with the target's hidden states, from the spool or recomputed. Of a very long text
        whose states must be recomputed, only the end is kept.
        """
        states = self.spool.read(example.id)
        needed = len(example.tokens) - 1
        if states is None or len(states) < needed or states.shape[1] != self.engine.target.hidden_size:
            self._pause()
            example = example.clipped(MAX_RECAPTURED_TOKENS)
            needed = len(example.tokens) - 1
            states, _, _ = recapture(self.engine.target, example.tokens, example.prompt_length, 1, with_top_k=False)
        return example.with_states(states[:needed])

    def replay(self, folder: Path, report: OnProgress = lambda done, total: None) -> list[Example]:
        """The general texts of the target that came with the draft. Parts that `capture_replay` has
        not captured yet are captured now.
        """
        parts = self._replay_parts(folder)
        total = sum(len(texts) for _, texts in parts)
        examples: list[Example] = []
        for path, texts in parts:
            examples += load_or_discard(path, _damaged) or self._capture(path, texts, len(examples), total, report)
        return examples

    def capture_replay(self, folder: Path, report: OnProgress = lambda done, total: None) -> bool:
        """Capture the next part of the texts to replay and save it in `folder`. Returns whether more
        parts are left. `report` gets the number of texts that are done, and of all.
        """
        parts = self._replay_parts(folder)
        missing = [part for part in parts if not part[0].is_file()]
        total = sum(len(texts) for _, texts in parts)
        done = total - sum(len(texts) for _, texts in missing)
        for path, texts in missing[:1]:
            self._capture(path, texts, done, total, report)
        return len(missing) > 1

    def _capture(self, path: Path, texts: Sequence[Text], done: int, total: int, report: OnProgress) -> list[Example]:
        """Capture one part and save it; `done` of `total` texts were captured before it."""
        examples: list[Example] = []
        for tokens, prompt_length in texts:
            self._pause()
            report(done + len(examples), total)
            k = self.settings.training.loss.top_k_logits
            states, ids, logprobs = recapture(self.engine.target, tokens, prompt_length, k)
            name, weights = f"{path.stem}-{len(examples)}", np.ones(len(ids), np.float32)
            needed = states if self.engine.reads_states else None
            examples.append(Example(name, tokens, prompt_length, ids, logprobs, weights, needed))
        save_shard(path, examples)
        self._drop_others(path)
        return examples

    @property
    def _replay_names(self) -> str:
        return f"replay-{self.engine.draft_fingerprint}-"

    def _drop_others(self, part: Path) -> None:
        """Remove this draft's parts that were made for another k or target: nothing reads them any more."""
        stem = part.stem.rpartition("-")[0]
        for path in part.parent.glob(f"{self._replay_names}*.npz"):
            if path.stem.rpartition("-")[0] != stem:
                path.unlink(missing_ok=True)

    def _replay_parts(self, folder: Path) -> list[tuple[Path, list[Text]]]:
        """The parts: the file of each and its texts. The name of a file says what its capture depends
        on: the draft's texts, the target and k.
        """
        draft = self.engine.draft
        source = draft.path / "replay.npz" if draft is not None and draft.path else None
        if source is None or not source.is_file():
            return []
        try:
            texts = _texts(source)
        except DAMAGED as error:  # it came with the draft: training does without
            _damaged(f"{source}: {error}")
            return []
        stem = f"{self._replay_names}{self.engine.target.fingerprint}-k{self.settings.training.loss.top_k_logits}"
        return [
            (folder / f"{stem}-{start:04d}.npz", texts[start : start + REPLAY_PART])
            for start in range(0, min(len(texts), self.settings.training.replay_buffer_size), REPLAY_PART)
        ]


def _damaged(reason: str) -> None:
    _log.warning("replay.damaged", reason=reason)


def _texts(path: Path) -> list[Text]:
    file = read_arrays(path)
    tokens, lengths, prompts = file["tokens"], file["lengths"], file["prompt_lengths"]
    ends = np.cumsum(lengths)
    return [
        (tokens[end - length : end], int(prompt)) for end, length, prompt in zip(ends, lengths, prompts, strict=True)
    ]


def _distinct(examples: Sequence[Example]) -> list[Example]:
    """Without repeats of the same text."""
    return list({example.tokens.tobytes(): example for example in examples}.values())


def micro_batches(group: Sequence[Example], max_tokens: int) -> list[list[Example]]:
    """A batch in parts of at most `max_tokens` with padding, longest texts first; one text is never
    split.
    """
    parts: list[list[Example]] = []
    for example in sorted(group, key=lambda item: -len(item.tokens)):
        if parts and len(parts[-1][0].tokens) * (len(parts[-1]) + 1) <= max_tokens:
            parts[-1].append(example)
        else:
            parts.append([example])
    return parts
