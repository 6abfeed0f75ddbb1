"""Would a small draft tree beat a chain? Expected tokens a second of both, on held-out prompts, with this machine's costs.

    python -m tests.bench.tree [--prompts 48] [--tokens 64] [--json FILE]

At every position of the target's greedy answers the head draft's three best tokens are expanded three levels deep. A chain
keeps best tokens only, a tree any (EAGLE-2, arXiv 2406.16858: nodes by the product of their probabilities), both as long as
that product is at least a threshold, at most 7 nodes; fixed shapes besides. The rounds are then replayed: a round emits the
nodes along the target's own text, and one token more. Each shape is priced twice: by the calibrated costs of a step by its
rows, and with a step that costs the same at any width to 8, as on hardware whose verification is flat. A level of a tree is
charged like one draft token, which flatters the tree.
"""

# ruff: noqa: I001 - the BLAS comes before mlx
import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from specl.shared.models import blas  # noqa: F401 - binds the BLAS before mlx loads
import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache

from specl.shared import prompts
from specl.shared.settings.load import load_settings
from specl.shared.engine.costs import Costs
from specl.shared.engine.decode import Options
from specl.shared.engine.core import EngineCore
from specl.shared.models.head import HeadDraft
from specl.shared.paths import find_paths

BREADTH, DEPTH, MOST_NODES = 3, 3, 7
SHAPES = {"(1)": (1,), "(1,1)": (1, 1), "(1,1,1)": (1, 1, 1), "(2)": (2,), "(3)": (3,)}
SHAPES |= {"(2,1)": (2, 1), "(2,2)": (2, 2), "(3,1)": (3, 1), "(2,1,1)": (2, 1, 1)}


@dataclass(frozen=True, slots=True)
class Node:
    """A proposed token: its place among its siblings by level, the product of probabilities, and whether the text has it."""

    ranks: tuple[int, ...]
    chance: float
    true: bool


def expand(draft: HeadDraft, state: mx.array, row: np.ndarray, truth: list[int], cache: KVCache) -> Iterator[Node]:
    """All nodes three levels deep after the entry that gave `state` and its scores `row`."""

    def level(state: mx.array, row: np.ndarray, ranks: tuple[int, ...], chance: float, true: bool) -> Iterator[Node]:
        depth = len(ranks)
        sampling = np.exp(row - row.max())
        sampling /= sampling.sum()
        for rank, place in enumerate(np.argsort(-sampling)[:BREADTH]):
            token, here = int(draft.hot[place]), chance * float(sampling[place])
            matches = true and depth < len(truth) and truth[depth] == token
            yield Node((*ranks, rank), here, matches)
            if depth + 1 < DEPTH:
                before = cache.offset
                after, scores, _, _ = draft.step(state, [token], cache)
                yield from level(after, scores.copy(), (*ranks, rank), here, matches)
                cache.trim(cache.offset - before)

    yield from level(state, row, (), 1.0, True)


def trees(engine: EngineCore, draft: HeadDraft, ids: list[int], tokens: int) -> list[list[Node]]:
    """For each token of the target's greedy answer: the tree that would have been proposed for it."""
    session = engine.session(ids, Options(max_tokens=tokens, num_draft_tokens=0, ngram=False))
    while not session.prefill():
        pass
    while session.finish_reason is None:
        session.round()
    text = [*ids, *session.output]
    states = engine.target.prefill(text[:-1], engine.target.new_cache())
    cache, found = KVCache(), []
    for place in range(1, len(text) - 1):
        state, scores, _, _ = draft.step(states[place - 1 : place], [text[place]], cache)
        if place >= len(ids):
            found.append(list(expand(draft, state, scores.copy(), text[place + 1 :], cache)))
    return found


def chosen(nodes: list[Node], shape: tuple[int, ...] | None, chain: bool, threshold: float) -> list[Node]:
    """The nodes that a fixed shape or a threshold proposes."""
    if shape is not None:
        return [
            n for n in nodes if len(n.ranks) <= len(shape) and all(r < b for r, b in zip(n.ranks, shape, strict=False))
        ]
    kept = [n for n in nodes if n.chance >= threshold and not (chain and any(n.ranks))]
    return sorted(kept, key=lambda n: -n.chance)[:MOST_NODES]


def replay(answers: list[list[list[Node]]], costs: Costs, **how) -> dict[str, float]:
    """Rounds over all answers: tokens a round, rows a round, tokens a second."""
    rounds = emitted = rows = 0
    seconds = 0.0
    for answer in answers:
        place = 0
        while place < len(answer):
            nodes = chosen(answer[place], **how)
            stood = sum(node.true for node in nodes)
            seconds += costs.verify_s(len(nodes) + 1) + costs.draft_s(max((len(n.ranks) for n in nodes), default=0))
            rounds, emitted, rows = rounds + 1, emitted + stood + 1, rows + len(nodes) + 1
            place += stood + 1
    return {"tokens_a_round": emitted / rounds, "rows": rows / rounds, "tokens_per_second": emitted / seconds}


def compare(answers: list[list[list[Node]]], costs: Costs) -> dict[str, dict[str, float]]:
    """Every fixed shape, and chain and tree at their best threshold."""
    table = {
        f"fixed {name}": replay(answers, costs, shape=shape, chain=False, threshold=0) for name, shape in SHAPES.items()
    }
    table["plain"] = replay(answers, costs, shape=(), chain=True, threshold=0)
    for name, chain in (("chain by threshold", True), ("tree by threshold", False)):
        tries = {
            t: replay(answers, costs, shape=None, chain=chain, threshold=t)
            for t in np.round(np.arange(0.05, 1.0, 0.05), 2).tolist()
        }
        best = max(tries, key=lambda t: tries[t]["tokens_per_second"])
        table[name] = {**tries[best], "threshold": best}
    return table


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    from specl.shared.loading.costs import load_or_calibrate
    from specl.shared.loading.engine import load_engine

    engine = load_engine(load_settings(), find_paths().models)
    with tempfile.TemporaryDirectory() as folder:
        costs = load_or_calibrate(engine, Path(folder))
    answers = []
    for prompt in prompts.load("heldout")[: args.prompts]:
        _, ids = engine.encode_chat(prompt.messages)
        answers.append(trees(engine, engine.draft, ids, args.tokens))
    flat = Costs({1: costs.verify_s(1)}, costs.draft, costs.ngram)
    report = {"calibrated": compare(answers, costs), "flat": compare(answers, flat)}
    report["verify_ms"] = {w: round(1000 * s, 2) for w, s in costs.verify.items()}
    for name in ("calibrated", "flat"):
        plain = report[name]["plain"]["tokens_per_second"]
        print(f"{name} costs{'':20} rows  tokens/round  against plain")
        for shape, row in report[name].items():
            ratio = row["tokens_per_second"] / plain
            note = f"  (threshold {row['threshold']})" if "threshold" in row else ""
            print(f"  {shape:30} {row['rows']:5.2f} {row['tokens_a_round']:9.2f} {ratio:12.2f}x{note}")
    print("one step by rows, ms:", report["verify_ms"])
    if args.json:
        args.json.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
