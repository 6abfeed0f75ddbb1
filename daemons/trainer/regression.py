"""The regression slice: the target's own greedy answers to shipped general prompts, which no
adapter may make worse.

Made once for each target, in chunks that survive a kill, and kept under var/regression/FINGERPRINT.
Holds no user data.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from specl.shared import prompts
from specl.shared.engine.core import EngineCore
from specl.shared.learning.batch_generate import Prompt, batch_generate
from specl.shared.learning.examples import Example
from specl.shared.runtime import log
from specl.shared.training_files.shards import load_or_discard, save_shard

CHUNK = 8  # prompts answered side by side: what a kill can cost
MAX_TOKENS = 48
_log = log.get("regression")


class RegressionSlice:
    """The first `count` of the shipped prompts. `pause` is called between tokens and may wait or
    raise Interrupted.
    """

    def __init__(self, folder: Path, engine: EngineCore, count: int, pause: Callable[[], object]) -> None:
        self.engine, self._pause = engine, pause
        self.folder = folder / f"{engine.target.fingerprint}-{MAX_TOKENS}"
        self._prompts = prompts.load("regression")[:count]

    def examples(self) -> list[Example]:
        """The whole slice; missing chunks are generated now. Raises ModelError for a target that
        does not batch.
        """
        examples: list[Example] = []
        for start in range(0, len(self._prompts), CHUNK):
            chunk = self._prompts[start : start + CHUNK]
            path = self.folder / f"{chunk[0].id}-{len(chunk)}.npz"
            examples += load_or_discard(path, _damaged) or self._generate(path, chunk)
        return examples

    def _generate(self, path: Path, chunk: list[prompts.ShippedPrompt]) -> list[Example]:
        self.folder.mkdir(parents=True, exist_ok=True)
        tokenized = [Prompt(item.id, self.engine.encode_chat(item.messages)[1]) for item in chunk]
        rng = np.random.default_rng(0)
        examples = batch_generate(
            self.engine.target, tokenized, MAX_TOKENS, 1, self.engine.reads_states, rng, self._wait
        )
        save_shard(path, examples)
        _log.debug("regression.generated", chunk=path.name)
        return examples

    def _wait(self, tokens: int) -> None:
        self._pause()


def _damaged(reason: str) -> None:
    _log.warning("regression.damaged", reason=reason)
