"""Time to the first token of a second turn against the first, through the daemon: does the prefix cache hold?

    python -m tests.bench.second_turn [--pairs 5] [--first 1000] [--draft NAME]

The first turn is a long paste of indented code with emoji which the model is asked to go on with, so that its answer has
code, emoji and leading spaces, whose tokens are cut anew when the chat is rendered again; the second adds about 32 tokens.
"""

import argparse
import statistics
import time

from specl.shared.bench.scratch_daemons import ScratchDaemons, with_models
from specl.shared.loading.engine import draft_folder
from specl.shared.messaging.messages import Purge
from specl.shared.models.find import ensure_model
from specl.shared.models.load import load
from specl.shared.paths import find_paths
from specl.shared.settings.load import load_settings

LINES = (
    '    print("👩‍💻  step {n}: naïve café ☕")\n',
    "        return [x ** {n} for x in values if x % {m}]\n",
    "\tif ready:   # 🚀 {n} spaces matter\n",
    "    totals[{n}] = sum(weights[: {m}]) / len(weights)\n",
)
SECOND = "Thank you. Now say in one short sentence what the function above does, and name the emoji that it prints most often, please."


def paste(tokenizer, count, seed):
    """About `count` tokens of code that no other seed has."""
    text, n = "Go on with this Python code in the same style, emoji and indentation included:\n\n", seed * 1000
    while len(tokenizer.encode(text, add_special_tokens=False)) < count:
        text += "".join(line.format(n=n + i, m=7 + (n + i) % 13) for i, line in enumerate(LINES))
        n += len(LINES)
    return text


def timed(client, messages, limit):
    """Seconds to the first delta, the text, and the statistics."""
    ask = client.request(messages, max_tokens=limit, temperature=0.0)
    begun, first, text = time.perf_counter(), None, ""
    for delta in client.deltas(ask):
        first = first if first is not None else time.perf_counter() - begun
        text += delta.text
    return first, text, client.last.stats


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--first", type=int, default=1000, help="tokens of the first turn's prompt")
    parser.add_argument("--draft")
    options = parser.parse_args()
    settings, paths = load_settings(), find_paths()
    target = ensure_model(settings.models.target.name, paths.models)
    tokenizer = load(settings.models.target.name, paths.models, settings.models.precision).tokenizer
    name = options.draft or settings.models.draft.name
    draft = str(draft_folder(name, paths.models) or name) if name else None
    ratios = []
    roles = ("inference", "collector")
    daemons = ScratchDaemons(with_models(settings, target, draft), paths.models, roles, costs=paths.costs)
    with daemons, daemons.client() as client:
        client.ask([{"role": "user", "content": "hello"}], max_tokens=8, temperature=0.0)
        for pair in range(options.pairs):
            client.command("inference", Purge([], None, ""))
            messages = [{"role": "user", "content": paste(tokenizer, options.first, pair)}]
            first, answer, before = timed(client, messages, 64)
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": SECOND}]
            second, _, after = timed(client, messages, 8)
            ratios.append(second / first)
            print(
                f"first {1000 * first:.0f} ms ({before.prompt_tokens} tokens), second {1000 * second:.0f} ms"
                f" ({after.reused_prompt_tokens} of {after.prompt_tokens} reused): {second / first:.3f}"
            )
    print(f"median {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
