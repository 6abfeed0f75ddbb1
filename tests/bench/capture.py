"""What the detailed mode costs: tokens per wall second through the daemon, store included, detailed against fast.

    python -m tests.bench.capture [--requests 50] [--tokens 64] [--block 5]

Requests go back to back, in blocks of one mode that alternate, so that the machine's moods hit both.
"""

import argparse
import time

from specl.shared.bench import prompt_sets
from specl.shared.bench.scratch_daemons import ScratchDaemons, with_models
from specl.shared.loading.engine import draft_folder
from specl.shared.models.find import ensure_model
from specl.shared.paths import find_paths
from specl.shared.settings.load import load_settings


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--block", type=int, default=5)
    parser.add_argument("--draft")
    options = parser.parse_args()
    settings, paths = load_settings(), find_paths()
    target = ensure_model(settings.models.target.name, paths.models)
    name = options.draft or settings.models.draft.name
    draft = str(draft_folder(name, paths.models) or name) if name else None
    items = prompt_sets.pick("general", options.requests)
    seconds, tokens = {"fast": 0.0, "detailed": 0.0}, {"fast": 0, "detailed": 0}
    roles = ("inference", "collector")
    daemons = ScratchDaemons(with_models(settings, target, draft), paths.models, roles, costs=paths.costs)
    with daemons, daemons.client() as client:
        client.ask(items[0].messages, max_tokens=8, temperature=0.0)
        for start in range(0, len(items), options.block):
            order = ["fast", "detailed"] if (start // options.block) % 2 == 0 else ["detailed", "fast"]
            for mode in order:
                begun = time.perf_counter()
                for item in items[start : start + options.block]:
                    tokens[mode] += client.ask(
                        item.messages, max_tokens=options.tokens, temperature=0.0, mode=mode
                    ).tokens
                seconds[mode] += time.perf_counter() - begun
    rates = {mode: tokens[mode] / seconds[mode] for mode in seconds}
    print(
        f"fast {rates['fast']:.2f} tok/s, detailed {rates['detailed']:.2f} tok/s: {rates['detailed'] / rates['fast']:.3f}"
    )


if __name__ == "__main__":
    main()
