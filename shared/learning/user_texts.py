"""A user's own traffic as training text: texts that the target has written already, its law and states captured again.

Knows token ids; where they come from (the store) is for the caller to say, and what may be used as well. What is captured
lies in the work folder, readable by its owner alone, until the build is done: a purge does not look there, but the next run of a
stopped build drops what has been purged.
"""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from specl.shared.learning.batch_generate import kept_shard, recapture, save_shard
from specl.shared.learning.examples import Example
from specl.shared.models.language_model import LanguageModel
from specl.shared.runtime.progress import Progress, Tell

SHARD_TEXTS = 32
LONGEST = 512  # tokens of a text: the last of a long one
READ = 1024  # of it that the target reads, for what it expects of those


@dataclass(frozen=True, slots=True)
class OwnText:
    """One answered request: `tokens` are the rendered prompt and then the answer, just as the target saw and wrote them."""

    id: str
    tokens: np.ndarray
    prompt_length: int
    greedy: bool


def capture(
    target: LanguageModel,
    texts: Sequence[OwnText],
    work: Path,
    k: int,
    with_states: bool,
    deadline: float,
    tell: Tell,
) -> list[Example]:
    """The texts with the target's law. What a stopped build captured is used again, but for texts that are gone by now."""
    texts = [text for text in texts if text.prompt_length + 1 < len(text.tokens)]
    wanted = {text.id for text in texts}
    held: dict[str, Example] = {}
    for path in sorted(work.glob("own-*.npz")):
        if path.name.endswith(".partial.npz"):  # its writer was killed
            path.unlink()
            continue
        found = kept_shard(path)
        if found is None:
            continue
        if all(example.id in wanted and (example.states is not None) >= with_states for example in found):
            held |= {example.id: example for example in found}
        else:
            path.unlink()
    missing = [text for text in texts if text.id not in held]
    done, start = 0, time.monotonic()
    total = len(missing)
    for first in range(0, total, SHARD_TEXTS):
        if time.monotonic() > deadline and held:
            break
        made = []
        for text in missing[first : first + SHARD_TEXTS]:
            made.append(_captured(target, text, k, with_states))
            done += 1
            pace = done / (time.monotonic() - start)
            tell(Progress("reading own text", done, total, (total - done) / pace))
        name = hashlib.sha256("\n".join(example.id for example in made).encode()).hexdigest()[:16]
        save_shard(work / f"own-{name}.npz", made)
        held |= {example.id: example for example in made}
    return [held[text.id] for text in texts if text.id in held]


def forget(work: Path) -> None:
    """Remove what was captured of a user's text."""
    for path in work.glob("own-*.npz"):
        path.unlink()


def _captured(target: LanguageModel, text: OwnText, k: int, with_states: bool) -> Example:
    tokens = text.tokens[-READ:]
    prompt_length = text.prompt_length - (len(text.tokens) - len(tokens))
    prompt_length = max(prompt_length, len(tokens) - LONGEST + 1, 1)  # no law of what is cut off next
    states, ids, logprobs = recapture(target, tokens, prompt_length, k)
    weights = np.ones(len(ids), np.float32)
    kept = states if with_states else None
    return Example(text.id, tokens, prompt_length, ids, logprobs, weights, kept, text.greedy).clipped(LONGEST)
