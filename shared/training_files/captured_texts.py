"""Written texts that the target has read again, as shards in a work folder, so that a stopped build
does not read them twice.

The work folder can be read by its owner alone, and the shards stay until the build is done. A purge
does not look there, but the next run of a stopped build drops every shard that holds a text which
has been purged.
"""

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

from specl.shared.learning.examples import Example
from specl.shared.learning.recapture import WrittenText, to_example
from specl.shared.models.language_model import LanguageModel
from specl.shared.runtime.progress import OnProgress, ProgressMeter
from specl.shared.training_files.shards import load_or_discard, save_shard

SHARD_TEXTS = 32
SHARDS = "own-*.npz"  # the name is that of the first version: work folders of stopped builds have it
UNFINISHED = (".own-*.partial", "own-*.partial.npz")  # their writer was killed; the second is of earlier versions


def capture_texts(
    target: LanguageModel,
    texts: Sequence[WrittenText],
    work: Path,
    k: int,
    with_states: bool,
    deadline: float,
    report: OnProgress,
) -> list[Example]:
    """`texts` as examples, in their order. After `deadline` (monotonic seconds) no further shard is
    begun, unless there is none.
    """
    texts = [text for text in texts if text.prompt_length + 1 < len(text.tokens)]
    captured = _captured_before(work, {text.id for text in texts}, with_states)
    missing = [text for text in texts if text.id not in captured]
    meter = ProgressMeter("reading written text", len(missing), report)
    for start in range(0, len(missing), SHARD_TEXTS):
        if time.monotonic() > deadline and captured:
            break
        examples = []
        for text in missing[start : start + SHARD_TEXTS]:
            examples.append(to_example(target, text, k, with_states))
            meter.advance()
        digest = hashlib.sha256("\n".join(example.id for example in examples).encode()).hexdigest()
        save_shard(work / SHARDS.replace("*", digest[:16]), examples)
        captured |= {example.id: example for example in examples}
    return [captured[text.id] for text in texts if text.id in captured]


def _captured_before(work: Path, ids: set[str], with_states: bool) -> dict[str, Example]:
    """Examples of a stopped build by id. A shard is removed where it holds a text that is not among
    `ids`, or lacks states.
    """
    captured: dict[str, Example] = {}
    _remove(work, UNFINISHED)
    for path in sorted(work.glob(SHARDS)):
        examples = load_or_discard(path)
        if examples is None:
            continue
        if all(example.id in ids and (example.states is not None) >= with_states for example in examples):
            captured |= {example.id: example for example in examples}
        else:
            path.unlink()
    return captured


def remove_captured(work: Path) -> None:
    """Remove every captured text."""
    _remove(work, (SHARDS, *UNFINISHED))


def _remove(work: Path, patterns: Sequence[str]) -> None:
    for pattern in patterns:
        for path in work.glob(pattern):
            path.unlink()
