"""The running daemons from Python: `honcho start` elsewhere, then `python examples/ask_daemons.py`."""

from specl import Client

with Client() as client:
    for piece in client.stream("Name three rivers.", max_tokens=32, temperature=0):
        print(piece, end="", flush=True)
    print(f"\n{client.last.tokens} tokens, recorded: {client.last.recorded}")
    daemons = client.status()
    print({role: str(daemons.get(role).state) for role in daemons.answering()})
