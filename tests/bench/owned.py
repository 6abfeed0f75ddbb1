"""LoRA against all of a head's own weights: the same new kind of work, the same replayed texts, the same steps, the same seed.

    SPECL_VAR=DIR python -m tests.bench.owned [--steps 120] [--ways lora:3e-4 owned:3e-5 owned:1e-4 owned:3e-4] [--json FILE]

What an adapter would hold is LoRA's A and B, or the change of every weight. A way may name a loss: `lora:3e-4:ce`.
Texts are made once and kept in DIR (training/owned-*.npz, beside the replayed texts and the regression slice that a trainer would make there). Agreement, greedy, at depth 1.
"""

# ruff: noqa: I001 - the BLAS comes before mlx
import argparse
import json
import time
from pathlib import Path

from specl.shared.models import blas  # noqa: F401 - binds the BLAS before mlx loads
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from specl.daemons.trainer.training_loop import TRAINED_DEPTHS
from specl.daemons.trainer.data_loader import DataLoader
from specl.daemons.trainer.regression import RegressionSlice
from specl.shared.settings.load import load_settings
from specl.shared.learning.examples import hot_vocabulary
from specl.shared.learning.learner import Learner, agreement
from specl.shared.learning.losses import LossSettings
from specl.shared.learning.steps import Batches, StepLoop, StepSettings
from specl.shared.learning.batch_generate import Prompt, answer, load_shard, save_shard
from specl.shared.models.head import load_head
from specl.shared.models.lora import LoraShape, attach, choose_layers
from specl.shared.loading.engine import load_engine
from specl.shared.paths import find_paths
from specl.shared.prompts import reserved

TOKENS = 96


def texts(path, engine, asked):
    """The target's greedy answers, made once."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        wanted = [
            Prompt(str(n), engine.encode_chat([{"role": "user", "content": text}])[1]) for n, text in enumerate(asked)
        ]
        made = []
        for start in range(0, len(wanted), 32):
            made += answer(engine.target, wanted[start : start + 32], TOKENS, 32, True, np.random.default_rng(0))
        save_shard(path, made)
    return [example for example in load_shard(path) if example.rows > 1]


def run(engine, settings, way, rate, loss, sets, steps):
    """One way to change the shipped head; what it gains, what it costs, how large it is."""
    mx.random.seed(0)
    fresh, replay, unseen, general = sets
    draft = load_head(engine.draft.path, "draft", engine.target)
    learner, module = Learner(draft), draft.head
    lora = settings.training.lora
    if way == "lora":
        module.freeze()
        attach(module, LoraShape(lora.rank, lora.alpha, 0.0, choose_layers(module, lora.target_modules)), None)
    vocabulary = int(engine.target.config["vocab_size"])
    learner.set_hot(hot_vocabulary([*fresh, *replay], draft.shape.hot_size, vocabulary, keep=draft.hot))
    share = settings.training.replay_ratio
    batches = Batches(fresh, replay, settings.training.batch_size, share, 0)
    loop = StepLoop(learner, LossSettings(loss), StepSettings(rate, steps, depths=TRAINED_DEPTHS))
    start = time.process_time()
    for _ in range(steps):
        loop.step([batches.next()])
    seconds = time.process_time() - start
    return {
        "way": way,
        "learning_rate": rate,
        "loss": loss,
        "weights": sum(value.size for _, value in tree_flatten(module.trainable_parameters())),
        "unseen": agreement(learner, unseen).value,
        "general": agreement(learner, general).value,
        "cpu_s": seconds,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", default=reserved.KINDS[0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--ways", nargs="+", default=["lora:3e-4", "owned:3e-5", "owned:1e-4", "owned:3e-4"])
    parser.add_argument("--json", type=Path)
    wish = parser.parse_args()
    settings, paths = load_settings(), find_paths().create()
    engine = load_engine(settings, paths.models)
    kept = paths.training
    fresh = texts(kept / f"owned-{wish.kind}-learn.npz", engine, reserved.prompts(wish.kind, 80, seed=1))
    asked = reserved.prompts(wish.kind, 30, seed=2, split=reserved.SPLITS[-1])
    unseen = texts(kept / f"owned-{wish.kind}-unseen.npz", engine, asked)
    replay = DataLoader(None, engine, settings, None, lambda: None).replay(kept)
    general = RegressionSlice(paths.regression, engine, settings.training.regression_prompts, lambda: None).examples()
    learner = Learner(engine.draft)
    print(f"{wish.kind}: {len(fresh)} texts to learn, {len(replay)} to replay, {wish.steps} steps")
    print("| | weights | unseen | general | CPU s |\n| --- | --- | --- | --- | --- |")
    print(
        f"| before | | {agreement(learner, unseen).value:.3f} | {agreement(learner, general).value:.4f} | |", flush=True
    )
    results = []
    for item in wish.ways:
        way, rate, loss = (*item.split(":"), settings.training.loss.type)[:3]
        sets = (fresh, replay, unseen, general)
        results.append(made := run(engine, settings, way, float(rate), loss, sets, wish.steps))
        scores = f"{made['unseen']:.3f} | {made['general']:.4f} | {made['cpu_s']:.0f}"
        print(f"| {way}, {rate}, {loss} | {made['weights']:,} | {scores} |", flush=True)
        if wish.json:
            wish.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
