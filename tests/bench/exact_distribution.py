"""The distribution of sampled sequences of 3 tokens through the whole engine, vocabulary 8, against the exact one: chi-square.

    python -m tests.bench.exact_distribution [--draws 100000] [--temperature 0.7] [--top-p 0.8] [--broken]

Automatic draft length that drafts, parks and probes, n-gram drafts over a repetitive prompt, an end-of-answer token inside
runs, and a draft whose weights are swapped in the middle of answers. `--broken` replaces the residual by the target's own
distribution, which must be detected. Exit code 0: p > 0.001 (with --broken: p < 0.001).
"""

# ruff: noqa: I001 - the BLAS comes before mlx
import argparse
import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

from specl.shared.models import blas  # noqa: F401 - binds the BLAS before mlx loads
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.llama import Model, ModelArgs
from scipy.stats import chisquare
from specl.shared.engine import acceptance
from specl.shared.engine.costs import Costs
from specl.shared.engine.request_options import RequestOptions
from specl.shared.engine.core import EngineCore
from specl.shared.engine.sampling import distribution
from specl.shared.sampling_params import SamplingParams
from specl.shared.models.language_model import LanguageModel

VOCABULARY, LENGTH, END = 8, 3, 7
PROMPT = [1, 2, 3, 4, 1, 2, 3, 5, 1, 2]


def model(seed, sharp=2.0):
    shape = dict(model_type="llama", hidden_size=16, num_hidden_layers=1, intermediate_size=16, num_attention_heads=2)
    shape |= dict(num_key_value_heads=2, rms_norm_eps=1e-5, vocab_size=VOCABULARY, tie_word_embeddings=False)
    mx.random.seed(seed)
    made = Model(ModelArgs.from_dict(shape))
    weights = [(name, value * sharp if value.ndim == 2 else value) for name, value in tree_flatten(made.parameters())]
    made.update(tree_unflatten(weights))
    mx.eval(made.parameters())
    tokenizer = SimpleNamespace(eos_token_ids={END})
    return LanguageModel(f"m{seed}", Path(), made, tokenizer, shape | {"max_position_embeddings": 64}, f"m{seed}", "t")


def exact(target, sampling):
    """Probability of every sequence, cut at the end token."""
    found = {}
    for tokens in itertools.product(range(VOCABULARY), repeat=LENGTH):
        p, kept = 1.0, []
        for token in tokens:
            row = np.array(target.model(mx.array([[*PROMPT, *kept]]))[0, -1])
            p *= distribution(row, sampling).of(token)
            kept.append(token)
            if token == END or p == 0:
                break
        if p > 0:
            found[tuple(kept)] = p
    return found


def draw_all(engine, sampling, draws, others):
    counts, k_used = {}, {}
    engine.prefixes.budget = 0
    for n in range(draws):
        session = engine.session(PROMPT, RequestOptions(sampling=sampling, max_tokens=LENGTH, ngram=n % 2 == 0))
        while not session.prefill():
            pass
        while session.finish_reason is None:
            session.round()
            if n % 7 == 0:  # a swap in the middle of the answer
                engine.draft.model.update(others[(n // 7) % len(others)])
        for k, count in session.stats.k_histogram.items():
            k_used[k] = k_used.get(k, 0) + count
        key = tuple(session.output)
        counts[key] = counts.get(key, 0) + 1
    return counts, k_used


def p_value(counts, expected, draws):
    """Chi-square; sequences expected fewer than 5 times are one cell."""
    if set(counts) - set(expected):
        return 0.0
    big = {key: p for key, p in expected.items() if p * draws >= 5}
    rest = 1 - sum(big.values())
    seen = [counts.get(key, 0) for key in big]
    want = [p * draws for p in big.values()]
    if rest * draws >= 5:
        seen, want = [*seen, draws - sum(seen)], [*want, rest * draws]
    want = np.array(want) * sum(seen) / sum(want)
    return float(chisquare(seen, want).pvalue)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--draws", type=int, default=100_000)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--top-p", type=float, default=0.8)
    parser.add_argument("--broken", action="store_true")
    options = parser.parse_args()
    if options.broken:
        acceptance.residual = lambda target_p, draft_p: target_p
    sampling = SamplingParams(temperature=options.temperature, top_p=options.top_p)
    target, draft = model(3), model(4)
    others = [model(seed).model.parameters() for seed in (4, 5, 3)]
    engine = EngineCore(target, draft)
    engine.costs = Costs({1: 1.0, 2: 1.02, 8: 1.1}, {1: 0.1, 8: 0.8}, ngram=0.01)
    expected = exact(target, sampling)
    counts, k_used = draw_all(engine, sampling, options.draws, others)
    p = p_value(counts, expected, options.draws)
    print(
        f"T={options.temperature} top-p={options.top_p}: {len(expected)} sequences, {options.draws} draws, k used {k_used}, p = {p:.4g}"
    )
    sys.exit(0 if (p < 0.001 if options.broken else p > 0.001) else 1)


if __name__ == "__main__":
    main()
