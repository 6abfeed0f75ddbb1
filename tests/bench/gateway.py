"""What the gateway costs: the same answers over the bus and over HTTP, in turn; then streams at once for some minutes.

Needs `honcho start` with its gateway. `SPECL_VAR=... python -m tests.bench.gateway --rounds 10 --minutes 5`. The aim: at most 3 %
of tokens per second and 10 ms to the first token. Processor time is the gateway's own (Linux), which noise touches least.
"""

import argparse
import json
import statistics
import threading
import time
from collections import Counter
from pathlib import Path

import httpx2 as httpx

from specl.shared.messaging.client import Client
from specl.shared.status import system_status

PROCESSES = Path("/proc")
PROMPT = "Explain in a few sentences why the sky is blue, and number {n} in words."


def processor_us(pid: int) -> float | None:
    """Microseconds of processor that a process has had, kernel included; None where this system does not say."""
    try:
        threads = list((PROCESSES / str(pid) / "task").iterdir())
        return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1000
    except OSError:
        return None


def over_bus(client: Client, n: int, tokens: int) -> tuple[float, float, int]:
    """(ms to the first text, seconds in all, tokens)."""
    start = time.monotonic()
    pieces = client.stream(PROMPT.format(n=n), max_tokens=tokens, temperature=0.0, record=False)
    next(pieces)
    first = time.monotonic() - start
    for _ in pieces:
        pass
    return 1000 * first, time.monotonic() - start, client.last.tokens


def over_http(http: httpx.Client, n: int, tokens: int) -> tuple[float, float, int]:
    """The same through the gateway."""
    ask = {
        "messages": [{"role": "user", "content": PROMPT.format(n=n)}], "max_tokens": tokens, "temperature": 0,
        "stream": True, "speclora": {"record": False},
    }  # fmt: skip
    start, first, count = time.monotonic(), None, 0
    with http.stream("POST", "/v1/chat/completions", json=ask) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if not line or line == "data: [DONE]":
                continue
            first = first or time.monotonic() - start
            chunk = json.loads(line.removeprefix("data: "))
            count = sum(chunk.get("speclora", {}).get("tokens_by_source", {}).values()) or count
    return 1000 * first, time.monotonic() - start, count


def compare(client: Client, http: httpx.Client, rounds: int, tokens: int, pid: int) -> dict[str, float | None]:
    """Medians of pairs; which goes first alternates, so that neither has the warmer machine."""
    ways = {"bus": lambda n: over_bus(client, n, tokens), "http": lambda n: over_http(http, n, tokens)}
    for way in ways.values():
        way(0)
    seen, before = {name: [] for name in ways}, processor_us(pid)
    for n in range(rounds):
        for name in list(ways)[:: 1 if n % 2 else -1]:
            seen[name].append(ways[name](n))
    pairs, after = list(zip(seen["bus"], seen["http"], strict=True)), processor_us(pid)
    return {
        "gateway_cpu_us_per_token": after and (after - before) / sum(t for _, _, t in seen["http"]),
        "bus_tokens_per_second": statistics.median(t / s for _, s, t in seen["bus"]),
        "http_tokens_per_second": statistics.median(t / s for _, s, t in seen["http"]),
        "slower_percent": 100 * statistics.median(1 - (h[2] / h[1]) / (b[2] / b[1]) for b, h in pairs),
        "ttft_added_ms": statistics.median(h[0] - b[0] for b, h in pairs),
    }


def crowd(url: str, streams: int, minutes: float, tokens: int) -> dict[str, float]:
    """`streams` clients, each asking again and again."""
    end, counts, lock = time.monotonic() + 60 * minutes, Counter(), threading.Lock()
    firsts: list[float] = []

    def work(number: int) -> None:
        with httpx.Client(base_url=url, timeout=120) as http:
            n = number
            while time.monotonic() < end:
                n += streams
                try:
                    first, _, count = over_http(http, n, tokens)
                except httpx.HTTPError as error:
                    with lock:
                        counts[f"error {type(error).__name__}"] += 1
                    continue
                with lock:
                    firsts.append(first)
                    counts["answers"] += 1
                    counts["tokens"] += count

    threads = [threading.Thread(target=work, args=(n,)) for n in range(streams)]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.monotonic() - start
    return dict(counts) | {"tokens_per_second": counts["tokens"] / seconds, "ttft_median_ms": statistics.median(firsts)}


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=5.0)
    options = parser.parse_args()
    with Client() as client:
        gateway = system_status(client).gateway
        url = gateway.address
        with httpx.Client(base_url=url, timeout=120) as http:
            found = {"alone": compare(client, http, options.rounds, options.tokens, gateway.pid)}
    if options.minutes:
        found["crowd"] = crowd(url, options.streams, options.minutes, options.tokens)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
