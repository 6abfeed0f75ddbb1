"""How fast a backlog drains: real collector and inference, real files, synchronous=FULL. `python -m tests.bench.drain --help`.

Large: generations of 200 tokens with the target's top-32, about 50 KB each. Small: 1.5 KB of text and no distributions. One process
on each side, one exchange in flight, as always. The figures per CPU second (both processes together) are those of one core that
nobody else uses, disk waits left out.
"""

import argparse
import json
import os
import time
import uuid
from pathlib import Path

from specl.shared.messaging.outbox import Outbox
from tests.harness.figures import process_figures
from tests.harness.forkserver import Forkserver
from tests.harness.instance import Instance
from tests.harness.records import fill


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has used: what a crowded machine does not change."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def drain(forkserver: Forkserver, megabytes: float, tokens: int) -> dict[str, float]:
    """Fill an outbox with `megabytes` of records, start the daemons, and wait until it is empty."""
    instance = Instance(forkserver)
    try:
        outbox = Outbox(instance.paths.outbox("inference"), limit_bytes=1 << 40)
        size, ids = 0, []
        while size < megabytes * 1e6:
            part = [uuid.uuid4().hex for _ in range(200)]
            size += fill(outbox, part, size=tokens, text="words" if tokens else "x" * 1500)
            ids += part
        outbox.close()
        inference = instance.start("inference")
        instance.ready("inference", 120)
        before, _ = process_figures(inference.pid)
        used, began = cpu_seconds(inference.pid), time.monotonic()
        collector = instance.start("collector")
        peak = before
        while instance.status("inference").get("outbox", {}).get("pending", 1):
            peak = max(peak, process_figures(inference.pid)[0])
            time.sleep(0.25)
        seconds = time.monotonic() - began
        used = cpu_seconds(inference.pid) - used + cpu_seconds(collector.pid)
        instance.acknowledged = ids
        instance.settle(60)
        instance.check()
        lost = len(set(ids) - set(instance.stored()))
        return {
            "records": len(ids), "KB_each": size / len(ids) / 1000, "MB": size / 1e6, "seconds": seconds,
            "records_per_s": len(ids) / seconds, "MB_per_s": size / 1e6 / seconds,
            "cpu_seconds": used, "records_per_cpu_s": len(ids) / used, "MB_per_cpu_s": size / 1e6 / used,
            "inference_grew_MiB": peak - before, "collector_MiB": process_figures(collector.pid)[0], "lost": lost,
        }  # fmt: skip
    finally:
        instance.close()


def main() -> None:
    """Measure and print one JSON line a size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--large-mb", type=float, default=1074, help="backlog of large records; 0: skip (default 1 GiB)"
    )
    parser.add_argument("--small-mb", type=float, default=200, help="backlog of small records; 0: skip")
    wanted = parser.parse_args()
    forkserver = Forkserver()
    try:
        for megabytes, tokens in ((wanted.small_mb, 0), (wanted.large_mb, 200)):
            if megabytes:
                found = drain(forkserver, megabytes, tokens)
                print(json.dumps({name: round(value, 2) for name, value in found.items()}), flush=True)
    finally:
        forkserver.close()


if __name__ == "__main__":
    main()
