"""Does the gate promote what learned nothing? Adapters trained on permuted targets before the real gate, and their control.

    python tests/bench/null.py [--decisions 40] [--controls 8] [--steps 30] [--json FILE]

A random two-layer Llama is the target; a head draft of it is built on its general text. Each decision has conversations of
its own: LoRA trains on some, the gate judges on others and on a regression slice of general text. Null: every target (token and law)
is permuted across the positions of all training records, held-out untouched; so the tokens' frequencies are all there is to
learn. Control: the same without the permutation. Exit code 0: at most one of the nulls in 40 was promoted, and the control
shows that the gate does promote what did learn.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from specl.shared.learning.examples import Example
from specl.shared.learning.gate import Verdict, judge
from specl.shared.learning.learner import Learner, agreement
from specl.shared.learning.losses import LossSettings
from specl.shared.learning.steps import Batches, StepLoop, StepSettings
from specl.shared.learning.traffic import Prompt, answer
from specl.shared.models.head import HeadDraft, new_head
from specl.shared.models.lora import LoraShape, attach, choose_layers, detach
from tests.conftest import tiny_model

VOCABULARY, PROMPT, OUTPUT, TOP_K = 97, 10, 16, 16
MOTIF = 12  # tokens that the new kind's prompts are made of
LEARNING_RATE = 2e-3
DEPTHS = 2


class World:
    """A target, a draft that knows its general text, and that text. Everything follows from `seed`."""

    def __init__(self, seed: int = 0, build_steps: int = 160) -> None:
        self.target = tiny_model(seed=31)
        mx.random.seed(seed)
        self.draft: HeadDraft = new_head(self.target, np.arange(VOCABULARY))
        rng = np.random.default_rng([seed, 1])
        self.learner = Learner(self.draft)
        train(self.learner, self.general(96, rng), build_steps, LEARNING_RATE, seed)
        self.regression = self.general(60, rng)
        self.draft.head.freeze()

    def general(self, count: int, rng: np.random.Generator) -> list[Example]:
        """Answers to prompts of any tokens."""
        return self._answers(rng.integers(4, VOCABULARY, (count, PROMPT)), rng)

    def new_kind(self, count: int, rng: np.random.Generator) -> list[Example]:
        """Answers to prompts of a few tokens: the same for all of one decision."""
        few = rng.permutation(np.arange(4, VOCABULARY))[:MOTIF]
        return self._answers(few[rng.integers(0, MOTIF, (count, PROMPT))], rng)

    def _answers(self, prompts: np.ndarray, rng: np.random.Generator) -> list[Example]:
        asked = [Prompt(str(i), tokens.tolist(), 0.8) for i, tokens in enumerate(prompts)]
        return answer(self.target, asked, OUTPUT, TOP_K, True, rng)


def train(learner: Learner, examples: list[Example], steps: int, rate: float, seed: int) -> None:
    """What a training run does, without its daemon."""
    batches = Batches(examples, [], 8, 0.0, seed)
    loop = StepLoop(learner, LossSettings(), StepSettings(rate, steps, depths=DEPTHS))
    for _ in range(steps):
        loop.step([batches.next()])


def permuted(examples: list[Example], rng: np.random.Generator) -> list[Example]:
    """The same records, their targets dealt out anew over all positions of all of them."""
    tokens = np.concatenate([example.tokens[example.prompt_length :] for example in examples])
    ids = np.concatenate([example.ids for example in examples])
    logprobs = np.concatenate([example.logprobs for example in examples])
    order = rng.permutation(len(tokens))
    made, place = [], 0
    for example in examples:
        part = order[place : place + example.rows]
        place += example.rows
        text = np.concatenate([example.tokens[: example.prompt_length], tokens[part].astype(example.tokens.dtype)])
        made.append(replace(example, tokens=text, ids=ids[part], logprobs=logprobs[part]))
    return made


def decide(world: World, number: int, shuffle: bool, steps: int) -> Verdict:
    """One run: train on 40 records, judge on 40 others."""
    rng = np.random.default_rng([7, number])
    examples = world.new_kind(80, rng)
    training, held_out = examples[:40], examples[40:]
    training = permuted(training, rng) if shuffle else training
    before = [agreement(world.learner, part) for part in (held_out, world.regression)]
    module = world.learner.module
    mx.random.seed(number)
    attach(module, LoraShape(8, 16.0, 0.0, choose_layers(module, "all")))
    try:
        train(world.learner, training, steps, LEARNING_RATE, number)
        after = [agreement(world.learner, part) for part in (held_out, world.regression)]
    finally:
        detach(module)
    return judge(before[0], after[0], 30, (before[1], after[1]))


def summary(verdicts: list[Verdict]) -> dict:
    """Counts and mean figures of many decisions."""
    return {
        "decisions": len(verdicts),
        "promoted": sum(verdict.verdict == "promoted" for verdict in verdicts),
        "interval above zero": sum(verdict.low > 0 for verdict in verdicts),
        "held-out before": round(float(np.mean([verdict.before for verdict in verdicts])), 4),
        "held-out after": round(float(np.mean([verdict.after for verdict in verdicts])), 4),
        "regression before": round(float(np.mean([verdict.regression_before for verdict in verdicts])), 4),
        "regression after": round(float(np.mean([verdict.regression_after for verdict in verdicts])), 4),
    }


def main() -> int:
    """Run both arms, print their figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--decisions", type=int, default=40)
    parser.add_argument("--controls", type=int, default=8, help="decisions of the control arm")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps of each decision")
    parser.add_argument("--json", type=Path, help="write the figures of every decision")
    wish = parser.parse_args()
    start = time.monotonic()
    world = World()
    arms = {}
    print(f"built {time.monotonic() - start:.0f} s", flush=True)
    for name, shuffle, count in (("control", False, wish.controls), ("null", True, wish.decisions)):
        arms[name] = [decide(world, number, shuffle, wish.steps) for number in range(count)]
        print(name, json.dumps(summary(arms[name])), f"{time.monotonic() - start:.0f} s", flush=True)
    if wish.json:
        told = {name: {"summary": summary(arm), "verdicts": [v.numbers() for v in arm]} for name, arm in arms.items()}
        wish.json.write_text(json.dumps(told, indent=1))
    null, control = (summary(arms[name])["promoted"] for name in ("null", "control"))
    return 0 if null <= max(1, wish.decisions // 40) and 2 * control > wish.controls else 1


if __name__ == "__main__":
    sys.exit(main())
