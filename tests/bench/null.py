"""Does the judge promote what learned nothing? Adapters trained on permuted targets before the real judge, and their control.

    python -m tests.bench.null [--model tiny|builtin] [--decisions 40] [--controls 8] [--steps 30] [--minutes 60] [--json FILE]

`tiny`: a random two-layer Llama is the target; a head draft of it is built on its general text, and each decision has
conversations of its own. `builtin`: SmolLM2 and the head that ships, with the settings' recipe; a decision draws its
conversations from a pool of answers to reserved prompts. LoRA trains on some, the judge scores others and on a regression
slice of general text. Null: every target (token and distribution) is permuted across the positions of all training records, held-out
untouched; so the tokens' frequencies are all there is to learn. Control: the same without the permutation. Exit code 0: at most
one of the nulls in 40 was promoted, and the control's interval lies above zero. (`builtin` replays nothing, so that the control
loses general text, and the slice keeps it from being promoted.)
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from specl.shared import prompts
from specl.shared.learning.batch_generate import Prompt, batch_generate
from specl.shared.learning.examples import Example, hot_vocabulary
from specl.shared.learning.judge import Regression, Verdict, judge
from specl.shared.learning.learner import Learner, agreement
from specl.shared.learning.losses import LossSettings
from specl.shared.learning.steps import BatchSampler, StepLoop, StepSettings
from specl.shared.loading.engine import load_engine
from specl.shared.models import blas  # noqa: F401 - binds the BLAS before mlx loads
from specl.shared.models.head import HeadDraft, new_head
from specl.shared.models.lora import LoraShape, attach, choose_layers, detach
from specl.shared.models.report import to_stderr
from specl.shared.paths import find_paths
from specl.shared.prompts import reserved
from specl.shared.settings.load import load_settings
from tests.conftest import tiny_model

VOCABULARY, PROMPT, OUTPUT, TOP_K = 97, 10, 16, 16
MOTIF = 12  # tokens that the new kind's prompts are made of
LEARNING_RATE = 2e-3
DEPTHS = 2
KIND_PROMPTS, GENERAL_PROMPTS = (
    120,
    64,
)  # of the built-in model: a decision draws 80 of the first, all are scored on the second
TOKENS = 32  # of each of its answers
BATCH = 2
MIXED = LossSettings()


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
        self.scored = agreement(self.learner, self.regression)

    def attach(self, training: list[Example]) -> None:
        """Make the draft ready to learn from `training`."""
        attach(self.learner.module, LoraShape(8, 16.0, 0.0, choose_layers(self.learner.module, "all")))

    def learn(self, training: list[Example], steps: int, seed: int) -> None:
        """A training run."""
        train(self.learner, training, steps, LEARNING_RATE, seed)

    def detach(self) -> None:
        """The pristine draft again."""
        detach(self.learner.module)

    def general(self, count: int, rng: np.random.Generator) -> list[Example]:
        """Answers to prompts of any tokens."""
        return self._answers(rng.integers(4, VOCABULARY, (count, PROMPT)), rng)

    def new_kind(self, count: int, rng: np.random.Generator) -> list[Example]:
        """Answers to prompts of a few tokens: the same for all of one decision."""
        few = rng.permutation(np.arange(4, VOCABULARY))[:MOTIF]
        return self._answers(few[rng.integers(0, MOTIF, (count, PROMPT))], rng)

    def _answers(self, prompts: np.ndarray, rng: np.random.Generator) -> list[Example]:
        asked = [Prompt(str(i), tokens.tolist(), 0.8) for i, tokens in enumerate(prompts)]
        return batch_generate(self.target, asked, OUTPUT, TOP_K, True, rng)


class Builtin:
    """SmolLM2 and its shipped head: answers to a reserved kind, and to general prompts. As World otherwise."""

    def __init__(self, kind_prompts: int = KIND_PROMPTS, general_prompts: int = GENERAL_PROMPTS) -> None:
        self.settings = load_settings().training
        self.engine = load_engine(load_settings(), find_paths().models, to_stderr)
        self.learner = Learner(self.engine.draft)
        self.learner.module.freeze()
        self.hot = self.engine.draft.hot
        rng = np.random.default_rng(0)
        asked = [[{"role": "user", "content": text}] for text in reserved.prompts(reserved.KINDS[0], kind_prompts)]
        self.pool = self._answers(asked, rng)
        general = [item.messages for item in prompts.load("regression")[:general_prompts]]
        self.regression = self._answers(general, rng)
        self.scored = agreement(self.learner, self.regression)

    def _answers(self, conversations: list[list[dict]], rng: np.random.Generator) -> list[Example]:
        asked = [Prompt(str(n), self.engine.encode_chat(one)[1]) for n, one in enumerate(conversations)]
        return batch_generate(self.engine.target, asked, TOKENS, TOP_K, True, rng)

    def new_kind(self, count: int, rng: np.random.Generator) -> list[Example]:
        """Drawn from the pool."""
        return [self.pool[n] for n in rng.permutation(len(self.pool))[:count]]

    def attach(self, training: list[Example]) -> None:
        """LoRA and a hot vocabulary refreshed from `training`, as the trainer does."""
        lora, draft = self.settings.lora, self.engine.draft
        wanted = choose_layers(self.learner.module, lora.target_modules)
        attach(self.learner.module, LoraShape(lora.rank, lora.alpha, lora.dropout, wanted))
        vocabulary = int(self.engine.target.config["vocab_size"])
        self.learner.set_hot(hot_vocabulary(training, draft.shape.hot_size, vocabulary, keep=self.hot))

    def learn(self, training: list[Example], steps: int, seed: int) -> None:
        """A training run by the settings, without replay: that would teach it something true."""
        loss = LossSettings(self.settings.loss.type, self.settings.loss.temperature, self.settings.loss.alpha)
        train(self.learner, training, steps, self.settings.learning_rate, seed, loss, BATCH)

    def detach(self) -> None:
        """The pristine draft again."""
        self.engine.use_adapter(None)
        self.learner.set_hot(self.hot)


def train(
    learner: Learner,
    examples: list[Example],
    steps: int,
    rate: float,
    seed: int,
    loss: LossSettings = MIXED,
    batch: int = 8,
) -> None:
    """What a training run does, without its daemon."""
    batches = BatchSampler(examples, [], batch, 0.0, seed)
    loop = StepLoop(learner, loss, StepSettings(rate, steps, depths=DEPTHS))
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


def decide(world: World | Builtin, number: int, shuffle: bool, steps: int) -> Verdict:
    """One run: train on 40 records, judge on 40 others."""
    rng = np.random.default_rng([7, number])
    examples = world.new_kind(80, rng)
    training, held_out = examples[:40], examples[40:]
    training = permuted(training, rng) if shuffle else training
    before = agreement(world.learner, held_out)
    mx.random.seed(number)
    world.attach(training)
    try:
        world.learn(training, steps, number)
        after = [agreement(world.learner, part) for part in (held_out, world.regression)]
    finally:
        world.detach()
    return judge(before, after[0], 30, Regression(world.scored.value, after[1].value))


def summary(verdicts: list[Verdict]) -> dict:
    """Counts and mean figures of many decisions."""
    return {
        "decisions": len(verdicts),
        "promoted": sum(verdict.verdict == "promoted" for verdict in verdicts),
        "interval above zero": sum(verdict.comparison.low > 0 for verdict in verdicts),
        "held-out before": round(float(np.mean([verdict.comparison.before for verdict in verdicts])), 4),
        "held-out after": round(float(np.mean([verdict.comparison.after for verdict in verdicts])), 4),
        "regression before": round(float(np.mean([verdict.regression.before for verdict in verdicts])), 4),
        "regression after": round(float(np.mean([verdict.regression.after for verdict in verdicts])), 4),
    }


def main() -> int:
    """Run both arms, print their figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("tiny", "builtin"), default="tiny")
    parser.add_argument("--decisions", type=int, default=40)
    parser.add_argument("--controls", type=int, default=8, help="decisions of the control arm")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps of each decision")
    parser.add_argument("--minutes", type=float, default=60, help="begin no decision later than this")
    parser.add_argument("--json", type=Path, help="write the figures of every decision")
    options = parser.parse_args()
    start = time.monotonic()
    world = World() if options.model == "tiny" else Builtin()
    arms: dict[str, list[Verdict]] = {}
    print(f"built {time.monotonic() - start:.0f} s", flush=True)
    for name, shuffle, count in (("control", False, options.controls), ("null", True, options.decisions)):
        arms[name] = []
        for number in range(count):
            if time.monotonic() - start < 60 * options.minutes:
                arms[name].append(decide(world, number, shuffle, options.steps))
                print(name, number, arms[name][-1].reason, f"{time.monotonic() - start:.0f} s", flush=True)
        print(
            name, json.dumps(summary(arms[name]) if arms[name] else {}), f"{time.monotonic() - start:.0f} s", flush=True
        )
    if options.json:
        output = {name: {"summary": summary(arm), "verdicts": [v.numbers() for v in arm]} for name, arm in arms.items()}
        options.json.write_text(json.dumps(output, indent=1))
    promoted = summary(arms["null"])["promoted"]
    seen = sum(verdict.comparison.low > 0 for verdict in arms["control"])
    return 0 if promoted <= max(1, len(arms["null"]) // 40) and 2 * seen > len(arms["control"]) else 1


if __name__ == "__main__":
    sys.exit(main())
