"""Does a request that runs beside training keep its tokens a second? The same prompts with the trainer halted and training, in turn.

    python -m tests.bench.politeness [--requests 20] [--tokens 64] [--json FILE]

All three daemons under their keepers in a scratch run directory, SmolLM2 and the shipped head without its replay set (capturing it
is another kind of work). A long run trains all the while. Before every request there is a pause in which training resumes; for the
halted half the trainer is stopped with SIGSTOP in that pause. Tokens over wall seconds as the client sees them, from the question
to the last token. Exit code 0: at least 0.9 of the speed is kept, and steps were made meanwhile.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from specl.shared.bench import prompt_sets
from specl.shared.bench.learning_report import estimate
from specl.shared.bench.scratch_daemons import ScratchDaemons
from specl.shared.bench.stream import conversation
from specl.shared.loading.engine import SHIPPED
from specl.shared.messaging.client import Client
from specl.shared.paths import find_paths
from specl.shared.runtime.locks import holder_of
from specl.shared.settings.load import load_settings
from specl.shared.settings.schema import Settings

COLLECTED, HELD_OUT = 12, 0.34
IDLE_S, WORK_S = 0.5, 2.0  # quiet before the trainer resumes, and what it then has before the next request
BAR = 0.9
BEGUN_S = 300.0


@dataclass
class Figures:
    """Of one half: tokens and seconds of each request."""

    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def rate(self, picks: np.ndarray) -> float:
        """Tokens a second of these requests together."""
        return float(np.array(self.tokens)[picks].sum() / np.array(self.seconds)[picks].sum())


def settings_with(draft: Path) -> Settings:
    """A run that does not end by itself, on little traffic."""
    document = load_settings().model_dump(mode="json")
    document["models"]["draft"]["name"] = str(draft)
    document["speculative"] |= {"temperature": 0.0, "ngram": False}
    document["training"] |= {
        "enabled": False, "heldout_share": HELD_OUT, "min_heldout_generations": 2, "regression_prompts": 0,
        "idle_seconds": IDLE_S, "max_minutes": 600.0, "num_epochs": 10**6,
    }  # fmt: skip
    return Settings.model_validate(document)


def training(client: Client) -> dict:
    """What the trainer says of its run."""
    trainer = client.status(2.0).trainer
    return asdict(trainer.training) if trainer else {}


def begin(client: Client, options: argparse.Namespace) -> None:
    """Collect a little, and have the run make its first steps."""
    for n, item in enumerate(prompt_sets.pick("code", COLLECTED)):
        client.ask(item.messages, max_tokens=options.tokens, conversation_id=conversation(n, HELD_OUT))
    time.sleep(1.0)
    reply = client.train(now=True)
    end = time.monotonic() + BEGUN_S
    while training(client).get("step", 0) < 2:
        if not reply.ok or time.monotonic() > end:
            raise SystemExit(f"no run began: {reply.message} {training(client)}")
        time.sleep(0.2)


def ask(client: Client, item: prompt_sets.BenchPrompt, tokens: int, into: Figures, wait_s: float) -> None:
    """One request after a pause."""
    time.sleep(wait_s)
    start = time.perf_counter()
    done = client.ask(item.messages, max_tokens=tokens, record=False)
    into.seconds.append(time.perf_counter() - start)
    into.tokens.append(done.tokens)


def compare(client: Client, options: argparse.Namespace) -> dict:
    """Every prompt twice, each way first in turn."""
    pid = holder_of(client.paths.run, "trainer")
    alone, beside = Figures(), Figures()
    steps, first = 0, training(client)["step"]
    for number, item in enumerate(prompt_sets.pick("general", options.requests)):
        for halted in (True, False) if number % 2 else (False, True):
            if halted:
                os.kill(pid, signal.SIGSTOP)
            try:
                ask(client, item, options.tokens, alone if halted else beside, IDLE_S + WORK_S)
            finally:
                os.kill(pid, signal.SIGCONT)
    steps = training(client)["step"] - first
    kept = estimate(lambda picks: beside.rate(picks) / alone.rate(picks), options.requests)
    whole = np.arange(options.requests)
    return {
        "requests": options.requests, "tokens": options.tokens, "steps_meanwhile": steps,
        "alone": round(alone.rate(whole), 2), "beside": round(beside.rate(whole), 2),
        "kept": round(kept.value, 3), "interval": [round(kept.low, 3), round(kept.high, 3)],
    }  # fmt: skip


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sp-") as folder:
        draft = Path(folder) / "head"
        shutil.copytree(SHIPPED / "smollm2-135m-head", draft, ignore=shutil.ignore_patterns("replay.npz"))
        daemons = ScratchDaemons(settings_with(draft), find_paths().models)
        with daemons, daemons.client() as client:
            begin(client, options)
            found = compare(client, options)
    print(json.dumps(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    return 0 if found["kept"] >= BAR and found["steps_meanwhile"] > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
