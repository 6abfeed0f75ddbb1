"""Agreement of rows after the fact: each text under the adapter that drafted it, teacher-forced. Loads no daemon, asks none.

Every output position counts, whether drafting was parked there or not, which is what makes rows of any k comparable.
"""

from collections.abc import Sequence

from specl.shared.adapters.registry import Adapters
from specl.shared.adapters.tensors import load_adapter
from specl.shared.bench.compare_adapters import example_of
from specl.shared.bench.stream import StreamRow
from specl.shared.engine.core import EngineCore
from specl.shared.errors import AdapterRejected
from specl.shared.learning.examples import Example
from specl.shared.learning.learner import Learner, agreement
from specl.shared.runtime.progress import OnProgress, ProgressMeter, ignore_progress
from specl.shared.sampling_params import SamplingParams

PIECE = 16  # rows between two words of progress


class Teacher:
    """Scores rows; a text that occurs in several passes is read by the target once."""

    def __init__(self, engine: EngineCore) -> None:
        self.engine = engine
        self._read: dict[tuple[str, bytes], Example] = {}

    def score(self, rows: Sequence[StreamRow], adapters: Adapters, report: OnProgress = ignore_progress) -> int:
        """Fill in hits and positions. How many rows could not be scored: their adapter is gone from the folder."""
        missing = 0
        rows = [row for row in rows if row.output]
        meter = ProgressMeter("agreement", len(rows), report)
        for id in dict.fromkeys(row.adapter_id for row in rows):
            own = [row for row in rows if row.adapter_id == id]
            try:
                adapter = load_adapter(adapters, adapters.folder / id, self.engine)[0] if id else None
            except AdapterRejected:
                missing += len(own)
                continue
            self.engine.use_adapter(adapter)
            for place in range(0, len(own), PIECE):
                piece = own[place : place + PIECE]
                self._piece(piece)
                meter.advance(len(piece))
        return missing

    def _piece(self, rows: Sequence[StreamRow]) -> None:
        found = agreement(Learner(self.engine.draft), [self._example(row) for row in rows])
        for row, hits, positions in zip(rows, found.hits, found.positions, strict=True):
            row.hits, row.positions = float(hits), int(positions)

    def _example(self, row: StreamRow) -> Example:
        key = row.prompt, str(row.output).encode()
        if key not in self._read:
            prompt = self.engine.encode_chat([{"role": "user", "content": row.prompt}])[1]
            self._read[key] = example_of(self.engine, str(row.n), prompt, row.output, SamplingParams())
        return self._read[key]
