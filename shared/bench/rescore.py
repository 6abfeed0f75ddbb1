"""Agreement of stream rows, computed afterwards: each text with the adapter that drafted it,
teacher-forced. Asks no daemon.

Every output position counts, whether drafting was parked there or not, so that rows of any draft
length are comparable.
"""

from collections.abc import Sequence

from specl.shared.adapters.registry import Adapters
from specl.shared.adapters.tensors import load_adapter
from specl.shared.bench.compare_adapters import capture_example
from specl.shared.bench.stream import StreamRow
from specl.shared.engine.core import EngineCore
from specl.shared.errors import AdapterRejected
from specl.shared.learning.examples import Example
from specl.shared.learning.learner import Learner, agreement
from specl.shared.runtime.progress import OnProgress, ProgressMeter, ignore_progress
from specl.shared.sampling_params import SamplingParams

CHUNK = 16  # rows between two reports of progress


class Rescorer:
    """Scores rows; a text that occurs in several passes is read by the target once."""

    def __init__(self, engine: EngineCore) -> None:
        if engine.draft is None:
            raise ValueError("there is no draft whose agreement could be computed")
        self.engine, self._draft = engine, engine.draft
        self._read: dict[tuple[str, bytes], Example] = {}

    def score(self, rows: Sequence[StreamRow], adapters: Adapters, report: OnProgress = ignore_progress) -> int:
        """Fill in hits and positions; returns how many rows could not be scored because their
        adapter is gone from the folder.
        """
        missing = 0
        rows = [row for row in rows if row.output]
        meter = ProgressMeter("agreement", len(rows), report)
        for id in dict.fromkeys(row.adapter_id for row in rows):
            drafted = [row for row in rows if row.adapter_id == id]
            try:
                adapter = load_adapter(adapters, adapters.folder / id, self.engine)[0] if id else None
            except AdapterRejected:
                missing += len(drafted)
                continue
            self.engine.use_adapter(adapter)
            for start in range(0, len(drafted), CHUNK):
                chunk = drafted[start : start + CHUNK]
                self._score_chunk(chunk)
                meter.advance(len(chunk))
        return missing

    def _score_chunk(self, rows: Sequence[StreamRow]) -> None:
        score = agreement(Learner(self._draft), [self._example(row) for row in rows])
        for row, hits, positions in zip(rows, score.hits, score.positions, strict=True):
            row.hits, row.positions = float(hits), int(positions)

    def _example(self, row: StreamRow) -> Example:
        key = row.prompt, str(row.output).encode()
        if key not in self._read:
            prompt = self.engine.encode_chat([{"role": "user", "content": row.prompt}])[1]
            self._read[key] = capture_example(self.engine, str(row.n), prompt, row.output, SamplingParams())
        return self._read[key]
