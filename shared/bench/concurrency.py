"""Several clients at once: total tokens a second of our daemon against mlx_lm.server without a draft, in turn."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from specl.shared.bench.prompt_sets import BenchPrompt
from specl.shared.bench.scratch import MlxServer, ScratchDaemons
from specl.shared.messaging.messages import Purge
from specl.shared.sampling_params import SamplingParams

Complete = Callable[[BenchPrompt], int]


@dataclass(frozen=True, slots=True)
class CrowdFigures:
    """`clients` at once: all tokens over wall seconds, best of the turns each way and every turn's ratio."""

    clients: int
    ours: float
    theirs: float
    ratios: list[float]


def crowd_rate(connect: Callable[[], Complete], clients: int, items: Sequence[BenchPrompt]) -> float:
    """Total tokens a second when `clients` threads work through `items`. An error in any thread is raised here."""
    work: queue.SimpleQueue[BenchPrompt] = queue.SimpleQueue()
    for item in items:
        work.put(item)
    counts, errors = [0] * clients, []

    def run(place: int) -> None:
        try:
            complete = connect()
            while True:
                counts[place] += complete(work.get_nowait())
        except queue.Empty:
            return
        except Exception as error:  # carried to the caller's thread
            errors.append(error)

    threads = [threading.Thread(target=run, args=(place,)) for place in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return sum(counts) / (time.perf_counter() - start)


def measure_crowds(
    daemons: ScratchDaemons,
    server: MlxServer,
    items: Sequence[BenchPrompt],
    crowds: Sequence[int],
    limit: int,
    sampling: SamplingParams,
    turns: int,
    tell: Callable[[str], None] = lambda note: None,
) -> list[CrowdFigures]:
    """For each number of clients, `turns` times each way in alternating order; ours forgets every time what it answered before."""

    def ours() -> Complete:
        client = daemons.client()
        wish = {"temperature": sampling.temperature, "top_p": sampling.top_p, "max_tokens": limit}
        return lambda item: client.ask(item.messages, **wish).tokens

    def theirs() -> Complete:
        return lambda item: server.complete(item.messages, limit, sampling.temperature, sampling.top_p)

    crowd_rate(ours, 1, items[:1])
    crowd_rate(theirs, 1, items[:1])
    found = []
    for clients in crowds:
        pairs = []
        for turn in range(turns):
            tell(f"{clients} clients, turn {turn + 1} of {turns}")
            order = [ours, theirs] if turn % 2 == 0 else [theirs, ours]
            rates = {}
            for side in order:
                with daemons.client() as client:
                    client.command("inference", Purge([], None, ""))
                rates[side] = crowd_rate(side, clients, items)
            pairs.append((rates[ours], rates[theirs]))
        found.append(
            CrowdFigures(clients, max(a for a, _ in pairs), max(b for _, b in pairs), [a / b for a, b in pairs])
        )
    return found
