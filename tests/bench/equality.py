"""Greedy texts of the engine against mlx_lm's generation in a process of its own: 200 prompts x 128 tokens.

    python -m tests.bench.equality [--prompts 200] [--tokens 128] [--draft NAME] [--k auto] [--cache FOLDER]

The reference is made once and kept under --cache by a hash of target, prompts, length and versions. Exit code 0: every
text equal, or parted at a logged tie after which it is equal again, with enough drafted and refused to tell.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from specl.shared.bench import prompt_sets
from specl.shared.bench.arms import EngineArm
from specl.shared.bench.measure import ENOUGH_DRAFTED, ENOUGH_REJECTED, check
from specl.shared.loading.costs import load_or_calibrate
from specl.shared.loading.engine import load_engine
from specl.shared.paths import find_paths
from specl.shared.sampling_params import SamplingParams
from specl.shared.settings.load import load_settings
from specl.shared.settings.schema import DraftModel

SETS = ("general", "code", "structured", "copy")


def chosen(count):
    items = [item for name in SETS for item in prompt_sets.load(name)]
    return [items[i * len(items) // count] for i in range(min(count, len(items)))]


def write_reference(file, prompts, tokens):
    """In this process: mlx_lm.stream_generate (what mlx_lm.generate prints) over token prompts."""
    import mlx.core as mx
    from mlx_lm import stream_generate
    from mlx_lm.generate import generation_stream

    from specl.shared.models.load import load

    settings = load_settings()
    target = load(settings.models.target.name, find_paths().models, settings.models.precision)
    found = []
    for place, prompt in enumerate(prompts):
        steps = stream_generate(target.model, target.tokenizer, prompt, max_tokens=tokens)
        found.append([step.token for step in steps])
        print(f"reference {place + 1} of {len(prompts)}", file=sys.stderr, flush=True)
    file.write_text(json.dumps(found))
    mx.synchronize(generation_stream)  # a step is still in flight; a process that ends under it crashes in its BLAS


def reference(engine, prompts, tokens, cache):
    """The reference texts, from the cache or from a separate process."""
    parts = [engine.target.fingerprint, json.dumps(prompts), str(tokens), version("mlx"), version("mlx-lm")]
    file = cache / f"reference-{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:16]}.json"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        asked = cache / "asked.json"
        asked.write_text(json.dumps(prompts))
        partial = file.with_suffix(".partial")
        subprocess.run(
            [sys.executable, __file__, "--write", str(partial), "--asked", str(asked), "--tokens", str(tokens)],
            check=True,
            env=os.environ | {"SPECL_NATIVE": "0"},  # mlx-lm as it comes
        )
        partial.rename(file)
    return json.loads(file.read_text())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--draft")
    parser.add_argument("--k", default="auto")
    parser.add_argument("--cache", type=Path, default=find_paths().root / "bench")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--asked", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        return write_reference(options.write, json.loads(options.asked.read_text()), options.tokens)
    settings, paths = load_settings(), find_paths()
    if options.draft:
        settings = settings.model_copy(
            update={"models": settings.models.model_copy(update={"draft": DraftModel(name=options.draft)})}
        )
    engine = load_engine(settings, paths.models)
    load_or_calibrate(engine, paths.costs)
    items = chosen(options.prompts)
    prompts = [engine.encode_chat(item.messages)[1] for item in items]
    expected = reference(engine, prompts, options.tokens, options.cache)
    arm = EngineArm(
        "ours", engine, SamplingParams(), None if options.k == "auto" else int(options.k), ngram=True, capture_k=32
    )
    counts, drafted, rejected, ties = {}, 0, 0, []
    for item, prompt, text in zip(items, prompts, expected, strict=True):
        answer = arm.run(item, prompt, options.tokens)
        found = check(engine, arm, prompt, text, answer.tokens)
        counts[found.verdict] = counts.get(found.verdict, 0) + 1
        drafted, rejected = drafted + answer.drafted, rejected + answer.rejected
        ties += [f"{item.id} at {tie.position}: gap {tie.gap:.2e}" for tie in found.ties]
        if found.verdict == "different":
            print(f"DIFFERENT: {item.id} at {found.position}", flush=True)
    print(f"{len(items)} prompts x {options.tokens}: {counts}, {drafted} drafted, {rejected} refused")
    print("\n".join(ties))
    conclusive = drafted >= ENOUGH_DRAFTED and rejected >= ENOUGH_REJECTED
    if not conclusive:
        print("INCONCLUSIVE")
    sys.exit(0 if conclusive and set(counts) <= {"equal", "tie"} else 1)


if __name__ == "__main__":
    main()
