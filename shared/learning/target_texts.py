"""Answers that a target has written, as token ids alone: small enough to keep and to hand on, so that a draft can be made again of
just the same text.

What the target expects at each token, and the hidden states of a head, are read again.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from specl.shared.errors import ModelError
from specl.shared.learning.batch_generate import DAMAGED
from specl.shared.learning.examples import Example
from specl.shared.learning.user_texts import OwnText
from specl.shared.runtime.atomic_files import atomic_file

REPLAY_TEXTS = 600  # 96 were not enough: four minutes of training had each ten times, and general text fell by 0.02
REPLAY_SHARE = 0.1  # of the answers at most: they are kept out of training
SMALL = 1 << 16  # vocabularies up to here take two bytes a token


class Written(Protocol):
    """Prompt and answer: tokens [t], how many of them are the prompt, whether the answer is greedy."""

    tokens: np.ndarray
    prompt_length: int
    greedy: bool


def save_answers(path: Path, answers: Sequence[Written], target: str) -> None:
    """Keep them in one file, whole, by rename. `target` is the fingerprint of the model that wrote them."""
    tokens = np.concatenate([answer.tokens for answer in answers]).astype(np.uint32)
    with atomic_file(path, sync=True, mode=0o666) as file:  # as other files of the user's: by the umask
        np.savez_compressed(
            file,
            tokens=tokens.astype(np.uint16) if len(tokens) and tokens.max() < SMALL else tokens,
            lengths=np.array([len(answer.tokens) for answer in answers], np.uint32),
            prompt_lengths=np.array([answer.prompt_length for answer in answers], np.uint32),
            greedy=np.array([answer.greedy for answer in answers], bool),
            target=np.array(target),
        )


def load_answers(path: Path, target: str) -> list[OwnText]:
    """What `save_answers` kept. Raises ModelError for another target's answers and for what is no such file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            wrote = str(file["target"])
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
    if wrote != target:
        raise ModelError(f"{path} was written by target {wrote}, this one is {target}")
    return [
        OwnText(f"{path.stem}-{n}", tokens[end - length : end], prompt, bool(greedy))
        for n, (end, length, prompt, greedy) in enumerate(zip(ends.tolist(), *columns, strict=True))
    ]


def set_aside(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """What to train on, and greedy answers to replay later, which this draft shall not know by heart: the last, which a draft
    that it began from has not seen either.
    """
    most = min(REPLAY_TEXTS, int(REPLAY_SHARE * len(examples)))
    greedy = [i for i, example in enumerate(examples) if example.greedy]
    kept = set(greedy[len(greedy) - most :] if most < len(greedy) else greedy)
    return (
        [example for i, example in enumerate(examples) if i not in kept],
        [example for i, example in enumerate(examples) if i in kept],
    )


def save_replay(examples: Sequence[Example], path: Path) -> None:
    """Token ids of texts kept out of training: what the trainer replays so that general text is not forgotten.

    Never a user's own: a purge does not reach what comes with a draft.
    """
    if not examples:
        return
    np.savez_compressed(
        path,
        tokens=np.concatenate([example.tokens for example in examples]).astype(np.uint32),
        lengths=np.array([len(example.tokens) for example in examples], np.uint32),
        prompt_lengths=np.array([example.prompt_length for example in examples], np.uint32),
    )
