"""Text that the target writes itself, in batches, with its law and hidden states: what a draft is distilled from.

One pass: tokens, top-k and states are taken while generating. Rows of a batch are left-padded; finished ones leave it.
"""

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import BatchKVCache, KVCache

from specl.shared.engine.sampling import largest, log_sum_exp, top_indices
from specl.shared.errors import ModelError
from specl.shared.learning.examples import Example
from specl.shared.models.language_model import FEW_ROWS, LanguageModel
from specl.shared.models.report import Report, to_stderr
from specl.shared.runtime.atomic_files import atomic_file

SHRINK_AT = 0.75  # filter the batch once this share of its rows still runs
LANES = 8
# what numpy and zipfile say of an empty, torn or foreign file
DAMAGED = (EOFError, BadZipFile, ValueError, KeyError, RuntimeError, TypeError)
CAPTURE_ROWS = 128  # logits rows at once: 512 x 151,936 fp32 would be 311 MB


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt to answer; temperature 0 is greedy."""

    id: str
    tokens: list[int]
    temperature: float = 0.0


class _Row:
    """One answer under way."""

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt
        self.output: list[int] = []
        self.ids: list[np.ndarray] = []
        self.logprobs: list[np.ndarray] = []
        self.states: list[np.ndarray] = []
        self.done = False

    def take(self, logits: np.ndarray, k: int, rng: np.random.Generator) -> int:
        ids = top_indices(logits, k)
        return self.keep(logits, ids, logits[ids] - log_sum_exp(logits), rng)

    def keep(self, logits: np.ndarray, ids: np.ndarray, logprobs: np.ndarray, rng: np.random.Generator) -> int:
        """The next token; its row's largest `ids` and their log-probabilities are kept."""
        self.ids.append(ids.astype(np.uint32))
        self.logprobs.append(logprobs.astype(np.float16))
        if self.prompt.temperature == 0:
            token = int(ids[0])
        else:
            weights = np.exp((logits - logits.max()).astype(np.float64) / self.prompt.temperature)
            cumulative = np.cumsum(weights)
            token = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
        self.output.append(token)
        return token

    def example(self, with_states: bool) -> Example:
        tokens = np.array([*self.prompt.tokens, *self.output], np.uint32)
        states = np.concatenate(self.states)[: len(tokens) - 1] if with_states else None
        rows = len(self.output)
        return Example(
            self.prompt.id,
            tokens,
            len(self.prompt.tokens),
            np.stack(self.ids),
            np.stack(self.logprobs),
            np.ones(rows, np.float32),
            states,
            self.prompt.temperature == 0,
        )


def answer(
    target: LanguageModel,
    prompts: Sequence[Prompt],
    max_tokens: int,
    k: int,
    with_states: bool,
    rng: np.random.Generator,
    tick: Callable[[int], None] = lambda tokens: None,
) -> list[Example]:
    """Answer all prompts; `tick` hears how many tokens were made. A few side by side where few rows are native, which is
    faster than a dense batch, else as one batch. Raises ModelError for caches that do not batch.
    """
    if target.few_rows_native:
        return _answer_lanes(target, prompts, max_tokens, k, with_states, rng, tick)
    if any(type(layer) is not KVCache for layer in target.new_cache()):
        raise ModelError(f"{target.name} cannot be run in batches: its cache is not a plain one")
    longest = max(len(prompt.tokens) for prompt in prompts)
    padding = [longest - len(prompt.tokens) for prompt in prompts]
    cache = [BatchKVCache(padding) for _ in target.new_cache()]
    rows = [_Row(prompt) for prompt in prompts]
    active = list(rows)
    ids = np.array([[0] * pad + prompt.tokens for pad, prompt in zip(padding, prompts, strict=True)])
    states = target.hidden_states(mx.array(ids), cache)
    kept = np.array(states.astype(mx.float16))
    for row, pad, state in zip(rows, padding, kept, strict=True):
        if with_states:
            row.states.append(state[pad:])
    last = states[:, -1]
    for _ in range(max_tokens):
        logits = np.array(target.logits(last).astype(mx.float32), copy=False)
        tokens = [row.take(line, k, rng) if not row.done else 0 for row, line in zip(active, logits, strict=True)]
        tick(sum(not row.done for row in active))
        for row, token in zip(active, tokens, strict=True):
            row.done = row.done or token in target.stop_tokens or len(row.output) >= max_tokens
        running = [i for i, row in enumerate(active) if not row.done]
        if not running:
            break
        if len(running) <= SHRINK_AT * len(active):
            for layer in cache:
                layer.filter(mx.array(running))
            active, tokens = [active[i] for i in running], [tokens[i] for i in running]
        states = target.hidden_states(mx.array(tokens)[:, None], cache)
        last = states[:, -1]
        mx.eval(last)
        if with_states:
            for row, state in zip(active, np.array(states.astype(mx.float16)), strict=True):
                if not row.done:
                    row.states.append(state)
    return [row.example(with_states) for row in rows]


def _answer_lanes(
    target: LanguageModel,
    prompts: Sequence[Prompt],
    max_tokens: int,
    k: int,
    with_states: bool,
    rng: np.random.Generator,
    tick: Callable[[int], None],
) -> list[Example]:
    """Answers side by side, each with its own cache; whoever is done makes room for the next prompt."""
    waiting = [_Row(prompt) for prompt in prompts]
    rows, lanes = list(waiting), []
    waiting.reverse()
    while waiting or lanes:
        while waiting and len(lanes) < LANES:
            row, cache = waiting.pop(), target.new_cache()
            states = target.prefill(row.prompt.tokens, cache)
            if with_states:
                row.states.append(np.array(states.astype(mx.float16)))
            lanes.append((row, cache, states[-1:]))
        logits = np.array(target.logits(mx.concatenate([last for _, _, last in lanes])).astype(mx.float32), copy=False)
        best, values, totals = largest(logits, k)
        for i, (row, _, _) in enumerate(lanes):
            token = row.keep(logits[i], best[i], values[i] - totals[i], rng)
            row.done = token in target.stop_tokens or len(row.output) >= max_tokens
        tick(len(lanes))
        running = [(row, cache) for row, cache, _ in lanes if not row.done]
        if not running:
            lanes = []
            continue
        states = target.batch_hidden_states([row.output[-1:] for row, _ in running], [cache for _, cache in running])
        if with_states:
            for (row, _), state in zip(running, np.array(states.astype(mx.float16)), strict=True):
                row.states.append(state[None])
        lanes = [(row, cache, states[i : i + 1]) for i, (row, cache) in enumerate(running)]
    return [row.example(with_states) for row in rows]


def save_shard(path: Path, examples: Sequence[Example]) -> None:
    """Keep examples in one file, whole, by rename; on the disk before it has its name, so that a power cut leaves no torn one."""
    arrays: dict[str, np.ndarray] = {
        "ids": np.array([example.id for example in examples]),
        "lengths": np.array([len(example.tokens) for example in examples]),
        "prompt_lengths": np.array([example.prompt_length for example in examples]),
        "greedy": np.array([example.greedy for example in examples]),
        "tokens": np.concatenate([example.tokens for example in examples]),
        "top_ids": np.concatenate([example.ids for example in examples]),
        "top_logprobs": np.concatenate([example.logprobs for example in examples]),
    }
    if all(example.states is not None for example in examples):
        arrays["states"] = np.concatenate([example.states for example in examples])
    with atomic_file(path, sync=True) as file:
        np.savez(file, **arrays)


def kept_shard(path: Path, say: Report = to_stderr) -> list[Example] | None:
    """What `save_shard` kept, or None where there is nothing. A file that is damaged is removed, which `say` hears of: what
    it held can be made again. Raises OSError where the disk does not let it be read.
    """
    try:
        return load_shard(path)
    except FileNotFoundError:
        return None
    except (*DAMAGED, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.EINVAL, errno.EIO):  # a bad offset, a bad sector
            raise
        path.unlink(missing_ok=True)
        say(f"{path} was damaged ({type(error).__name__}: {error}) and is made again")
        return None


def load_shard(path: Path) -> list[Example]:
    """What `save_shard` kept. Raises one of DAMAGED or OSError for anything else."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    examples, t, r, s = [], 0, 0, 0
    for i, (length, prompt_length) in enumerate(
        zip(arrays["lengths"].tolist(), arrays["prompt_lengths"].tolist(), strict=True)
    ):
        rows = length - prompt_length
        states = arrays["states"][s : s + length - 1] if "states" in arrays else None
        examples.append(
            Example(
                str(arrays["ids"][i]),
                arrays["tokens"][t : t + length],
                prompt_length,
                arrays["top_ids"][r : r + rows],
                arrays["top_logprobs"][r : r + rows],
                np.ones(rows, np.float32),
                states,
                bool(arrays["greedy"][i]),
            )
        )
        t, r, s = t + length, r + rows, s + length - 1
    return examples


def recapture(
    target: LanguageModel, tokens: np.ndarray, prompt_length: int, k: int, with_law: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """States fp16 [t-1, hidden], top-k ids and log-probabilities [n, k] of a text that is already written.

    One forward over the whole text; the head runs on output rows only, in chunks.
    """
    states = target.prefill(tokens[:-1].tolist(), target.new_cache())
    ids, logprobs = [], []
    rows = FEW_ROWS if target.few_rows_native else CAPTURE_ROWS
    for start in range(prompt_length - 1, len(tokens) - 1 if with_law else 0, rows):
        logits = np.array(target.logits(states[start : start + rows]).astype(mx.float32), copy=False)
        for row, total in zip(logits, log_sum_exp(logits), strict=True):
            best = top_indices(row, k)
            ids.append(best.astype(np.uint32))
            logprobs.append((row[best] - total).astype(np.float16))
    empty = np.zeros((0, k))
    return (
        np.array(states.astype(mx.float16)),
        np.stack(ids) if ids else empty.astype(np.uint32),
        np.stack(logprobs) if logprobs else empty.astype(np.float16),
    )
