"""Several concurrent clients: total tokens a second of our daemon and of mlx_lm.server without a
draft, in alternating turns.
"""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from specl.shared.bench.mlx_server import MlxServer
from specl.shared.bench.prompt_sets import BenchPrompt
from specl.shared.bench.scratch_daemons import ScratchDaemons
from specl.shared.messaging.messages import Purge
from specl.shared.sampling_params import SamplingParams

Complete = Callable[[BenchPrompt], int]  # answers a prompt; the tokens of the answer


@dataclass(frozen=True, slots=True)
class ConcurrencyFigures:
    """All tokens over wall seconds by number of clients: the best turn of each server, and the
    ratio of every turn.
    """

    clients: int
    ours: float
    theirs: float
    ratios: list[float]


def concurrent_rate(connect: Callable[[], Complete], clients: int, items: Sequence[BenchPrompt]) -> float:
    """Total tokens a second of `clients` threads that work through `items`. An error in any thread
    is raised here.
    """
    work: queue.SimpleQueue[BenchPrompt] = queue.SimpleQueue()
    for item in items:
        work.put(item)
    counts = [0] * clients
    errors: list[Exception] = []

    def run(index: int) -> None:
        try:
            complete = connect()
            while True:
                counts[index] += complete(work.get_nowait())
        except queue.Empty:
            return
        except Exception as error:  # carried to the caller's thread
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return sum(counts) / (time.perf_counter() - start)


def measure_concurrency(
    daemons: ScratchDaemons,
    server: MlxServer,
    items: Sequence[BenchPrompt],
    client_counts: Sequence[int],
    limit: int,
    sampling: SamplingParams,
    turns: int,
    say: Callable[[str], object] = lambda note: None,
) -> list[ConcurrencyFigures]:
    """For each number of clients `turns` turns of each server, in alternating order. The daemon's
    caches are emptied every time.
    """

    def ours() -> Complete:
        client = daemons.client()
        options: dict[str, Any] = {"temperature": sampling.temperature, "top_p": sampling.top_p, "max_tokens": limit}
        return lambda item: client.ask(item.messages, **options).tokens

    def theirs() -> Complete:
        return lambda item: server.complete(item.messages, limit, sampling.temperature, sampling.top_p)

    concurrent_rate(ours, 1, items[:1])
    concurrent_rate(theirs, 1, items[:1])
    figures = []
    for clients in client_counts:
        pairs = []
        for turn in range(turns):
            say(f"{clients} clients, turn {turn + 1} of {turns}")
            order = (("ours", ours), ("theirs", theirs))
            rates = {}
            for name, connect in order if turn % 2 == 0 else reversed(order):
                with daemons.client() as client:
                    client.command("inference", Purge([], None, ""))
                rates[name] = concurrent_rate(connect, clients, items)
            pairs.append((rates["ours"], rates["theirs"]))
        figures.append(
            ConcurrencyFigures(clients, max(a for a, _ in pairs), max(b for _, b in pairs), [a / b for a, b in pairs])
        )
    return figures
