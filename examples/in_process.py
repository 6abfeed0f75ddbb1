"""The engine in this process, no daemons: `python examples/in_process.py [TARGET [DRAFT]]`."""

import sys

from specl import Engine

models = dict(zip(("target", "draft"), sys.argv[1:], strict=False))
with Engine.load(**models) as engine:
    answer = engine.generate("Name three rivers.", max_tokens=32, temperature=0)
    print(answer.text)
    print(f"{len(answer.tokens)} tokens in {answer.stats.rounds} rounds, ended by {answer.finish_reason}")

    talk = [
        {"role": "user", "content": "Name three rivers."},
        {"role": "assistant", "content": answer.text},
        {"role": "user", "content": "And three lakes."},
    ]
    for piece in engine.stream(talk, max_tokens=32, temperature=0.7, seed=7, stop=["\n\n"]):
        print(piece, end="", flush=True)
    print(f"\n{engine.last.stats.reused_prompt_tokens} prompt tokens were still in the cache")
    print(engine.stats())
