"""Streaming clients through the gateway for some minutes: does any fail, does any starve?

Needs `honcho start` with its gateway. `SPECL_VAR=... python -m tests.bench.clients --streams 8 --minutes 5`. Prints one JSON object;
exit code 1 where an answer failed or a client starved: no text for `--gap` seconds inside an answer, or less than half of the
tokens that the median client had.
"""

import argparse
import json
import statistics
import sys
import threading
import time
from dataclasses import asdict, dataclass, field

import httpx2 as httpx

from specl.shared.messaging.client import Client
from specl.shared.status import system_status

PROMPT = "Write a few sentences about the number {n} and what it is used for."


@dataclass(slots=True)
class Seen:
    """What one client saw. Seconds; `gap_s` is the longest wait between two pieces of text of one answer."""

    answers: int = 0
    tokens: int = 0
    gap_s: float = 0.0
    first_s: float = 0.0
    errors: list[str] = field(default_factory=list)


def one_answer(http: httpx.Client, n: int, tokens: int, seen: Seen) -> None:
    """Stream one; raises httpx.HTTPError, or ValueError for a stream that did not end as it should."""
    ask = {
        "messages": [{"role": "user", "content": PROMPT.format(n=n)}], "max_tokens": tokens, "temperature": 0.7, "stream": True,
        "stream_options": {"include_usage": True}, "speclora": {"record": False},
    }  # fmt: skip
    start, last, usage = time.monotonic(), None, None
    with http.stream("POST", "/v1/chat/completions", json=ask) as answer:
        if answer.status_code != 200:
            raise ValueError(f"{answer.status_code} {answer.read().decode()[:200]}")
        for line in answer.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise ValueError(chunk["error"]["message"])
            usage = chunk.get("usage") or usage
            if any(choice["delta"].get("content") for choice in chunk["choices"]):
                now = time.monotonic()
                if last is None:
                    seen.first_s = max(seen.first_s, now - start)
                else:
                    seen.gap_s = max(seen.gap_s, now - last)
                last = now
    if usage is None:
        raise ValueError("the stream ended without its usage")
    seen.answers += 1
    seen.tokens += usage["completion_tokens"]


def work(url: str, number: int, streams: int, end: float, tokens: int, seen: Seen) -> None:
    """One client: ask again and again until `end`."""
    with httpx.Client(base_url=url, timeout=120) as http:
        n = number
        while time.monotonic() < end:
            try:
                one_answer(http, n, tokens, seen)
            except (httpx.HTTPError, ValueError) as error:
                seen.errors.append(f"{type(error).__name__}: {error}")
                time.sleep(0.5)
            n += streams


def main() -> int:
    """Run, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--gap", type=float, default=10.0, help="seconds without text that count as starving")
    options = parser.parse_args()
    with Client() as client:
        url = system_status(client).gateway.address
    clients, start = [Seen() for _ in range(options.streams)], time.monotonic()
    threads = [
        threading.Thread(
            target=work, args=(url, n, options.streams, start + 60 * options.minutes, options.tokens, seen)
        )
        for n, seen in enumerate(clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds, tokens = time.monotonic() - start, [seen.tokens for seen in clients]
    errors = [error for seen in clients for error in seen.errors]
    longest = max(seen.gap_s for seen in clients)
    starved = longest > options.gap or min(tokens) < 0.5 * statistics.median(tokens)
    found = {
        "streams": options.streams,
        "seconds": round(seconds, 1),
        "answers": sum(seen.answers for seen in clients),
        "failed": len(errors),
        "tokens_per_second": round(sum(tokens) / seconds, 1),
        "tokens_of_a_client": {"least": min(tokens), "median": statistics.median(tokens), "most": max(tokens)},
        "longest_gap_s": round(longest, 2),
        "longest_wait_for_the_first_s": round(max(seen.first_s for seen in clients), 2),
        "starved": starved,
        "errors": errors[:5],
    }
    print(json.dumps(found | {"clients": [asdict(seen) for seen in clients]}, indent=1))
    return int(bool(errors) or starved or not sum(tokens))


if __name__ == "__main__":
    sys.exit(main())
