"""Answers that a target has written, as token ids alone: small enough to keep and to hand on, so
that a draft can be made again of the same text. What the target expects at each token, and the
hidden states of a head, are read again.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from specl.shared.errors import ModelError
from specl.shared.learning.examples import Example
from specl.shared.learning.recapture import WrittenText
from specl.shared.runtime.atomic_files import output_file
from specl.shared.training_files.shards import DAMAGED, read_arrays

SMALL = 1 << 16  # token ids of vocabularies up to this size are stored in two bytes


class TokenizedAnswer(Protocol):
    """Prompt and answer: tokens [t], how many of them are the prompt, whether the answer is greedy."""

    @property
    def tokens(self) -> np.ndarray:
        """Prompt, then answer."""
        ...

    @property
    def prompt_length(self) -> int:
        """How many tokens are the prompt."""
        ...

    @property
    def greedy(self) -> bool:
        """Whether the answer was not sampled."""
        ...


def save_target_texts(path: Path, answers: Sequence[TokenizedAnswer], target: str) -> None:
    """Write answers to one file, which appears whole. `target` is the fingerprint of the model that
    wrote them.
    """
    tokens = np.concatenate([answer.tokens for answer in answers]).astype(np.uint32)
    with output_file(path) as file:
        np.savez_compressed(
            file,
            tokens=tokens.astype(np.uint16) if len(tokens) and tokens.max() < SMALL else tokens,
            lengths=np.array([len(answer.tokens) for answer in answers], np.uint32),
            prompt_lengths=np.array([answer.prompt_length for answer in answers], np.uint32),
            greedy=np.array([answer.greedy for answer in answers], bool),
            target=np.array(target),
        )


def load_target_texts(path: Path, target: str) -> list[WrittenText]:
    """The answers of a file. Raises ModelError for the answers of another target and for a file of
    another kind.
    """
    try:
        file = read_arrays(path)
        writer = str(file["target"])
        tokens = file["tokens"].astype(np.uint32)
        columns = (file["lengths"].tolist(), file["prompt_lengths"].tolist(), file["greedy"].tolist())
        ends = np.cumsum(columns[0])
        if ends[-1] != len(tokens) or not all(0 < prompt < length for length, prompt, _ in zip(*columns, strict=True)):
            raise ValueError("its lengths do not fit")
    except (*DAMAGED, OSError, IndexError) as error:
        reason = str(error) or type(error).__name__
        raise ModelError(
            f"{path} does not hold answers: {reason}", "`draft build --keep-answers FILE` writes such a file"
        ) from error
    if writer != target:
        raise ModelError(f"{path} was written by target {writer}, this one is {target}")
    return [
        WrittenText(f"{path.stem}-{n}", tokens[end - length : end], prompt, bool(greedy))
        for n, (end, length, prompt, greedy) in enumerate(zip(ends.tolist(), *columns, strict=True))
    ]


def save_replay(examples: Sequence[Example], path: Path) -> None:
    """Token ids of texts kept out of training: what the trainer replays so that general text is not
    forgotten.

    Never a user's text: a purge does not reach the files that come with a draft.
    """
    if not examples:
        return
    np.savez_compressed(
        path,
        tokens=np.concatenate([example.tokens for example in examples]).astype(np.uint32),
        lengths=np.array([len(example.tokens) for example in examples], np.uint32),
        prompt_lengths=np.array([example.prompt_length for example in examples], np.uint32),
    )
