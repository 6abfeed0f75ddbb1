"""Tokens a second of a training step against mlx-lm's LoRA trainer: the same draft, texts, loss, rank, batch and length.

    python -m tests.bench.training [--rounds 5] [--steps 6] [--batch 4] [--length 128] [--layers 5] [--json FILE]

The draft is some layers of the target (`draft build --kind layers` makes such), LoRA stands on every linear layer of it, the
loss is cross-entropy on every token but the first. Both sides train copies with AdamW in this process, in turn; mlx_lm's own `train`
runs its compiled step. The first `--steps` of every turn are not counted. Seconds are processor time, which a busy machine stretches less;
wall time is printed beside it. Exit code 0: at least as fast as mlx-lm.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from pathlib import Path

from specl.shared.models import blas  # binds the BLAS before mlx loads

# isort: split
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.trainer import TrainingArgs, train
from mlx_lm.tuner.utils import linear_to_lora_layers

from specl.shared import prompts
from specl.shared.learning.examples import Example
from specl.shared.learning.learner import Learner
from specl.shared.learning.losses import LossSettings
from specl.shared.learning.steps import StepLoop, StepSettings
from specl.shared.models.language_model import LanguageModel
from specl.shared.models.layers import new_layers, pick_layers
from specl.shared.models.load import load
from specl.shared.models.lora import LoraShape, attach, choose_layers
from specl.shared.models.report import to_stderr
from specl.shared.paths import find_paths
from specl.shared.settings.load import load_settings

RANK, SCALE, RATE, DECAY = 8, 2.0, 1e-4, 0.01
TOP_K = 8  # of the stored distribution; cross-entropy does not read it


class Clock:
    """Wall and processor seconds between two looks."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def lap(self) -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        passed = (wall - self.wall, cpu - self.cpu)
        self.wall, self.cpu = wall, cpu
        return passed


class Theirs(TrainingCallback):
    """mlx_lm.tuner.trainer.train; it tells of every `steps` steps, and the second telling is what counts."""

    def __init__(self, draft: LanguageModel, texts: np.ndarray, options: argparse.Namespace) -> None:
        self.model, self.options = draft.model, options
        self.model.freeze()
        linear_to_lora_layers(self.model, options.layers, {"rank": RANK, "scale": SCALE, "dropout": 0.0})
        self.texts = [(text.tolist(), 0) for text in texts]
        self.optimizer = optim.AdamW(learning_rate=RATE, weight_decay=DECAY)
        self.trained = count(self.model)

    def on_train_loss_report(self, train_info: dict) -> None:
        """Called by mlx-lm."""
        self.laps.append(self.clock.lap())
        self.loss = train_info["train_loss"]

    def turn(self) -> tuple[float, float]:
        self.clock, self.laps = Clock(), []
        steps, batch = self.options.steps, self.options.batch
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            file = str(Path(folder) / "adapters.safetensors")
            sizes = {"batch_size": batch, "iters": 2 * steps, "max_seq_length": 1 + self.options.length}
            arguments = TrainingArgs(**sizes, steps_per_report=steps, steps_per_save=10**6, adapter_file=file)
            train(self.model, self.optimizer, self.texts, args=arguments, training_callback=self)
        return self.laps[1]


class Ours:
    """learning/steps.py, as the trainer runs it."""

    def __init__(self, draft: LanguageModel, texts: np.ndarray, options: argparse.Namespace) -> None:
        self.options, self.place = options, 0
        self.examples = [to_example(text) for text in texts]
        module = draft.model
        module.freeze()
        attach(module, LoraShape(RANK, RANK * SCALE, 0.0, choose_layers(module, "all")))
        self.loop = StepLoop(
            Learner(draft),
            LossSettings("ce"),
            StepSettings(RATE, 2 * options.steps * options.rounds, weight_decay=DECAY),
        )
        self.trained = count(module)

    def turn(self) -> tuple[float, float]:
        self._steps()
        clock = Clock()
        self.loss = self._steps()
        return clock.lap()

    def _steps(self) -> float:
        losses = []
        for _ in range(self.options.steps):
            self.place = (self.place + self.options.batch) % (len(self.examples) - self.options.batch + 1)
            losses.append(self.loop.step([self.examples[self.place : self.place + self.options.batch]]))
        return float(np.mean(losses))


def count(module) -> int:
    """Trainable parameters."""
    return sum(value.size for _, value in tree_flatten(module.trainable_parameters()))


def to_example(tokens: np.ndarray) -> Example:
    """A text of which every token but the first is learned."""
    rows = len(tokens) - 1
    sampling = np.tile(tokens[1:, None], (1, TOP_K)).astype(np.uint32)
    logprobs = np.full((rows, TOP_K), -np.log(TOP_K), np.float16)
    return Example("text", tokens, 1, sampling, logprobs, np.ones(rows, np.float32), None)


def texts_of(target: LanguageModel, number: int, length: int) -> np.ndarray:
    """Shipped prompts one after the other, cut into texts of `length` tokens."""
    words = " ".join(item.messages[-1]["content"] for item in prompts.load("train")[: number * length // 8])
    tokens = np.array(target.tokenizer.encode(words), np.uint32)[: number * length]
    return tokens.reshape(number, length)


def measure(options: argparse.Namespace) -> dict:
    """Both sides in turn."""
    settings = load_settings()
    target = load(settings.models.target.name, find_paths().models, "auto", to_stderr)
    layers = pick_layers(str(options.layers), int(target.config["num_hidden_layers"]))
    texts = texts_of(target, 4 * options.batch, options.length)
    sides = {
        "mlx-lm": Theirs(new_layers(target, layers), texts, options),
        "ours": Ours(new_layers(target, layers), texts, options),
    }
    tokens = options.steps * options.batch * (options.length - 1)
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for number in range(options.rounds):
        for name in sorted(sides, reverse=number % 2 == 1):
            rates[name].append(tuple(tokens / seconds for seconds in sides[name].turn()))
            print(name, "tokens a second: wall {:.0f}, processor {:.0f}".format(*rates[name][-1]), flush=True)
    ratio = np.array(rates["ours"]) / np.array(rates["mlx-lm"])
    middle = {name: np.median(values, axis=0).round(1).tolist() for name, values in rates.items()}
    return {
        "tokens_per_second (wall, processor)": middle,
        "ratio by processor time": round(float(np.median(ratio[:, 1])), 3),
        "of each round": ratio[:, 1].round(3).tolist(),
        "ratio by wall time": round(float(np.median(ratio[:, 0])), 3),
        "trained parameters": {name: side.trained for name, side in sides.items()},
        "loss of the last turn": {name: round(float(side.loss), 4) for name, side in sides.items()},
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    blas.set_threads(1)
    found = measure(options)
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    return 0 if found["ratio by processor time"] >= 1 else 1


if __name__ == "__main__":
    sys.exit(main())
