"""Checks the prompt files and prints their sha256 sums; leaves with status 1 when
something is wrong.

Looked at: counts, form, ids, repeated prompts, templates and runs of eight words shared between
files, and traces of the reserved kinds (see ``reserved.py``), both by tell-tale words and by runs
of eight words of generated instances.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

from specl.shared.prompts import reserved

HERE = Path(__file__).resolve().parent
GRAM = 8
COUNTS = {
    "train.jsonl": 4000,
    "heldout.jsonl": 240,
    "regression.jsonl": 200,
    "bench/general.jsonl": 60,
    "bench/code.jsonl": 40,
    "bench/copy.jsonl": 40,
    "bench/adversarial.jsonl": 40,
}


def text_of(prompt: dict[str, Any]) -> str:
    """All turns of a prompt as one text."""
    return "\n".join(message["content"] for message in prompt["messages"])


def runs(text: str) -> set[tuple[str, ...]]:
    """All runs of eight words of a text."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)}


def well_formed(prompt: dict[str, Any]) -> bool:
    """Whether a prompt has the agreed fields and turns that alternate and end with the user's."""
    if set(prompt) != {"id", "kind", "template", "messages"}:
        return False
    roles = [message["role"] for message in prompt["messages"]]
    if roles[:1] == ["system"]:
        roles = roles[1:]
    expected = ["assistant" if place % 2 else "user" for place in range(len(roles))]
    filled = all(set(m) == {"role", "content"} and m["content"].strip() for m in prompt["messages"])
    return bool(filled and roles == expected and len(roles) % 2 == 1)


def main() -> int:
    """Run every check and report."""
    problems: list[str] = []
    files: dict[str, list[dict[str, Any]]] = {}
    for name, count in COUNTS.items():
        raw = (HERE / name).read_bytes()
        if b"\r" in raw or not raw.endswith(b"\n"):
            problems.append(f"{name}: line ends")
        files[name] = [json.loads(line) for line in raw.decode("utf-8").splitlines()]
        if len(files[name]) != count:
            problems.append(f"{name}: {len(files[name])} prompts, not {count}")
        problems += [f"{name}: {prompt.get('id')} is malformed" for prompt in files[name] if not well_formed(prompt)]

    everything = [prompt for prompts in files.values() for prompt in prompts]
    for what, values in (
        ("id", Counter(prompt["id"] for prompt in everything)),
        ("prompt", Counter(" ".join(re.findall(r"\w+|[^\w\s]", text_of(p).lower())) for p in everything)),
    ):
        problems += [f"{what} repeated: {value[:80]}" for value, count in values.items() if count > 1]
    for name, prompts in files.items():
        for prompt in prompts:
            found = reserved.TRACES.search(text_of(prompt))
            if found:
                problems.append(f"{name}: {prompt['id']} says {found[0]!r}")
            if prompt["kind"] in reserved.KINDS:
                problems.append(f"{name}: {prompt['id']} is of a reserved kind")

    grams = {name: set().union(*(runs(text_of(prompt)) for prompt in prompts)) for name, prompts in files.items()}
    templates = {name: {prompt["template"] for prompt in prompts} for name, prompts in files.items()}
    for one, other in combinations(files, 2):
        problems += [f"{one}, {other}: both use template {name}" for name in sorted(templates[one] & templates[other])]
        problems += [f"{one}, {other}: both say {' '.join(run)!r}" for run in sorted(grams[one] & grams[other])]

    for kind in reserved.KINDS:
        live = reserved.prompts(kind, 2000)
        unseen = reserved.prompts(kind, 2000, split="unseen")
        if set(live) & set(unseen):
            problems.append(f"{kind}: the splits share a prompt")
        kept = set().union(*(runs(text) for text in live + unseen))
        problems += [f"{name}: shares words with {kind}" for name in files if grams[name] & kept]

    for name, prompts in files.items():
        lengths = sorted(len(text_of(prompt).split()) for prompt in prompts)
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(Counter(p["kind"] for p in prompts).items()))
        middle, high = lengths[len(lengths) // 2], lengths[len(lengths) * 95 // 100]
        print(f"{name}: {len(prompts)} prompts from {len(templates[name])} templates ({kinds})")
        print(f"  words: {lengths[0]} at least, {middle} median, {high} at 95 %, {lengths[-1]} at most")
        print(f"  sha256 {hashlib.sha256((HERE / name).read_bytes()).hexdigest()}")
    for name in ("reserved.py", "source/reserved_values.json"):
        print(f"{name}: sha256 {hashlib.sha256((HERE / name).read_bytes()).hexdigest()}")
    for problem in problems[:50]:
        print("PROBLEM", problem)
    print("failed" if problems else "passed", f"({len(problems)} problems)")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
