"""Losses against each other: one head a loss, the same text, the same steps, the same seed; acceptance by depth at the end.

    python -m tests.bench.losses SHARDS [--train 24] [--steps 120] [--losses kl tv acceptance ce] [--json FILE]

SHARDS is the work folder of a `draft build` (training-*.npz and held-out-*.npz, with hidden states). It is only read.
Rates are over all held-out answers that were greedy; the interval is from drawing those answers again.
"""

# ruff: noqa: I001 - the BLAS comes before mlx
import argparse
import json
import time
from pathlib import Path

from specl.shared.models import blas  # noqa: F401 - binds the BLAS before mlx loads
import mlx.core as mx
import numpy as np
from specl.shared.settings.load import load_settings
from specl.shared.learning.build_draft import read_examples
from specl.shared.learning.examples import hot_vocabulary
from specl.shared.learning.learner import Learner, agreement, by_depth
from specl.shared.learning.losses import KINDS, LossSettings
from specl.shared.learning.steps import Batches, StepLoop, StepSettings
from specl.shared.models.head import new_head
from specl.shared.models.load import load
from specl.shared.models.report import to_stderr
from specl.shared.paths import find_paths


def interval(score, seed=0):
    """95% of the pooled agreement when answers are drawn again."""
    picks = np.random.default_rng(seed).integers(0, len(score.hits), (2000, len(score.hits)))
    return np.percentile(score.hits[picks].sum(1) / score.positions[picks].sum(1), (2.5, 97.5))


def run(target, kind, training, tests, hot, wish):
    """One head from the same beginning; what it is worth after `wish.steps` steps."""
    mx.random.seed(wish.seed)
    learner = Learner(new_head(target, hot))
    batches = Batches(training, (), wish.batch, 0.0, wish.seed)
    loop = StepLoop(learner, LossSettings(kind), StepSettings(wish.learning_rate, wish.steps, depths=wish.depths))
    start = time.process_time()
    losses = [loop.step([batches.next()]) for _ in range(wish.steps)]
    seconds = time.process_time() - start
    score = agreement(learner, tests)
    low, high = interval(score)
    return {
        "loss": kind,
        "agreement": score.value,
        "interval": [float(low), float(high)],
        "by_depth": by_depth(learner, tests).acceptance,
        "cpu_s": seconds,
        "first": losses[0],
        "last": float(np.mean(losses[-10:])),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--train", type=int, default=24, help="training shards to use")
    parser.add_argument("--judge", type=int, default=96, help="held-out answers to judge by, at most")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--depths", type=int, default=2)
    parser.add_argument("--hot", type=int, default=6144)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--losses", nargs="+", default=["kl", "tv", "acceptance", "ce"], choices=KINDS)
    parser.add_argument("--json", type=Path)
    wish = parser.parse_args()
    settings, paths = load_settings(), find_paths()
    target = load(settings.models.target.name, paths.models, settings.models.precision, to_stderr)
    training = read_examples(target, sorted(wish.shards.glob("training-*.npz"))[: wish.train], "head")
    tests = read_examples(target, sorted(wish.shards.glob("held-out-*.npz")), "head")
    tests = [example for example in tests if example.greedy][:: max(1, len(tests) // wish.judge)]
    hot = hot_vocabulary(training, wish.hot, int(target.config["vocab_size"]))
    tokens = sum(example.rows for example in training)
    print(
        f"{tokens} tokens of {len(training)} answers; {wish.steps} steps of {wish.batch}; judged on {len(tests)} answers"
    )
    print("| loss | acceptance at depth 1 / 2 / 3 | 95% of depth 1 | CPU s |\n| --- | --- | --- | --- |")
    results = []
    for kind in wish.losses:
        results.append(made := run(target, kind, training, tests, hot, wish))
        depths = " / ".join(f"{rate:.3f}" for rate in made["by_depth"])
        low, high = made["interval"]
        print(f"| {kind} | {depths} | {low:.3f} to {high:.3f} | {made['cpu_s']:.0f} |", flush=True)
        if wish.json:
            wish.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
