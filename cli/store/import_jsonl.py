"""Generations from a file of JSON lines: read with care, given the target's law, made into records.

The shape is the documented one: id, prompt, target_output, acceptance_rate, timestamp, disagreements. Whatever wrote the
file, the law is the configured target's own, so that what is learned fits it.
"""

import hashlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from specl.cli.files.prompts import raise_problems
from specl.cli.files.text import parse_json, read_lines
from specl.shared.conversations import conversation_of
from specl.shared.messaging.messages import Disagreement, Generation, TopK
from specl.shared.paths import find_paths
from specl.shared.settings.schema import Settings

_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")  # ids become file names


@dataclass(frozen=True, slots=True)
class Item:
    """One line of the file."""

    id: str
    prompt: str
    output: str
    acceptance_rate: float | None
    created_at: float
    disagreements: list[Disagreement]


@dataclass(frozen=True, slots=True)
class Law:
    """What the target says of an item's text. `greedy`: it would have written exactly this."""

    prompt: str
    prompt_tokens: np.ndarray
    output_tokens: np.ndarray
    top_k: TopK
    greedy: bool
    target: str
    fingerprint: str


# ---------------------------------------------------------------------------------------------------- reading
def read_items(file: str) -> list[Item]:
    """Every line of `file` (`-`: standard input). Raises ConfigError that names the bad lines; then nothing is imported."""
    items, problems = {}, []
    for number, line in read_lines(file):
        if not line.strip():
            continue
        try:
            item = parse(line)
            items[item.id] = item
        except ValueError as error:
            problems.append(f"{file}:{number}: {error}")
    raise_problems(problems, "nothing was imported")
    return list(items.values())


def parse(line: str) -> Item:
    """One line. Raises ValueError with what is wrong with it."""
    value = parse_json(line)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    prompt, output = _text(value, "prompt"), _text(value, "target_output")
    rate = value.get("acceptance_rate")
    if rate is not None and (isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate <= 1):
        raise ValueError(f"acceptance_rate is a share from 0 to 1, not {rate!r}")
    id = value.get("id") or hashlib.sha256(f"{prompt}\0{output}".encode()).hexdigest()[:32]
    if not _ID.fullmatch(str(id)):
        raise ValueError(f"an id has letters, digits, _ and -, at most 128 of them, not {str(id)[:40]!r}")
    lines = value.get("disagreements") or []
    if not isinstance(lines, list):
        raise ValueError("disagreements is a list")
    found = [_disagreement(item) for item in lines]
    return Item(
        str(id), prompt, output, float(rate) if rate is not None else None, _moment(value.get("timestamp")), found
    )


def _text(value: dict[str, Any], name: str) -> str:
    if not isinstance(value.get(name), str) or not value[name]:
        raise ValueError(f"{name} is missing or no text")
    return value[name]


def _moment(value: Any) -> float:
    if value is None:
        return time.time()
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 250_000_000_000:
        return float(value)
    try:
        moment = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        raise ValueError(f"timestamp is a moment like 2026-01-31T12:00:00Z, not {value!r}") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _disagreement(value: Any) -> Disagreement:
    try:
        return Disagreement(
            position=int(value["position"]),
            draft_token=int(value["draft_token"]),
            target_token=int(value["target_token"]),
            draft_text="",
            target_text="",
            draft_confidence=float(value["draft_confidence"]),
            target_confidence=float(value["target_confidence"]),
            drafter="imported",
            depth=0,
            context_tokens=[int(token) for token in value.get("context_tokens", [])],
        )
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError(f"a disagreement cannot be read: {error!r}") from None


# ---------------------------------------------------------------------------------------------------- the law
class Annotator:
    """Runs the target over texts that are already written. Loads it on construction; raises ModelError where it has no room."""

    def __init__(self, settings: Settings, models: Path) -> None:
        from specl.cli.memory_check import check_memory, local_path
        from specl.shared.engine.core import EngineCore
        from specl.shared.loading.engine import engine_options
        from specl.shared.models import blas  # noqa: F401 - binds the BLAS before mlx loads
        from specl.shared.models.load import load, to_stderr

        name = settings.models.target.name
        what = "reading texts with the target (--text-only does without)"
        check_memory(settings, find_paths(), local_path(name, models), None, what)
        target = load(name, models, settings.models.precision, to_stderr)
        self._engine = EngineCore(target, None, engine_options(settings))
        self._k = settings.training.loss.top_k_logits

    def __call__(self, item: Item) -> Generation:
        """The record of an item; without a law where the text does not fit into the target's context."""
        engine = self._engine
        text, prompt = engine.encode_chat([{"role": "user", "content": item.prompt}])
        law = law_of(engine.target, text, prompt, engine.encode(item.output), self._k)
        return to_record(spelled(item, law, engine.target.tokenizer.decode) if law else item, law)


def law_of(target: Any, text: str, prompt: list[int], output: list[int], k: int) -> Law | None:
    """The target's law at each token of `output` after `prompt`."""
    from specl.shared.learning.batch_generate import recapture

    if not output or len(prompt) + len(output) > target.context_length:
        return None
    _, ids, logprobs = recapture(target, np.array([*prompt, *output]), len(prompt), k)
    weights = np.exp(logprobs.astype(np.float64))
    tail = np.clip(1 - weights.sum(axis=1), 0, 1)
    entropy = -(weights * logprobs).sum(axis=1) - tail * np.log(np.maximum(tail, 1e-12))
    top = TopK(
        k=int(ids.shape[1]),
        ids=ids.astype("<u4").tobytes(),
        logprobs=logprobs.astype("<f2").tobytes(),
        tail=tail.astype("<f2").tobytes(),
        entropy=entropy.astype("<f2").tobytes(),
    )
    greedy = bool((ids[:, 0] == np.array(output)).all())
    return Law(text, np.array(prompt, "<u4"), np.array(output, "<u4"), top, greedy, target.name, target.fingerprint)


def spelled(item: Item, law: Law, decode: Callable[[list[int]], str]) -> Item:
    """The item with the text of disagreeing tokens, where the file's ids are this tokenizer's."""
    output = law.output_tokens.tolist()

    def named(line: Disagreement) -> Disagreement:
        if not 0 <= line.position < len(output) or output[line.position] != line.target_token:
            return line
        return replace(line, draft_text=decode([line.draft_token]), target_text=decode([line.target_token]))

    return replace(item, disagreements=[named(line) for line in item.disagreements])


def to_record(item: Item, law: Law | None) -> Generation:
    """What the store keeps. Nothing is claimed of drafting: the counts are zero, the rate is the file's."""
    messages = [{"role": "user", "content": item.prompt}]
    return Generation(
        id=item.id,
        conversation_id=conversation_of(messages),
        created_at=item.created_at,
        mode="imported",
        messages=messages,
        prompt=law.prompt if law else item.prompt,
        prompt_tokens=law.prompt_tokens.tobytes() if law else b"",
        output=item.output,
        output_tokens=law.output_tokens.tobytes() if law else b"",
        finish_reason="imported",
        # temperature 0 says that each token is the target's first choice; other texts are judged by overlap of laws
        sampling={"temperature": 0.0 if law and law.greedy else 1.0},
        drafted=0,
        accepted=0,
        model_drafted=0,
        model_accepted=0,
        rounds=0,
        acceptance_rate=item.acceptance_rate,
        tokens_per_second=0.0,
        ttft_ms=0.0,
        target_model=law.target if law else "imported",
        draft_model="imported",
        target_fingerprint=law.fingerprint if law else "",
        draft_fingerprint="",
        adapter_id="",
        sources=bytes(len(law.output_tokens)) if law else b"",
        stats=None,
        disagreements=item.disagreements,
        top_k=law.top_k if law else None,
    )
