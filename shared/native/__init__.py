"""Linux CPU at the machine's own speed: few-row products and whole decoder steps in C++, behind the
model's modules.

`accelerate(model)` gives a loaded model the fast path where the extension is built, fits this MLX
and passes its self-test; otherwise nothing changes and `reason()` says why. Does not know tokens,
files, settings. Promises: a row's result is the same bits whatever rows are computed with it (width
1 or k+1) and whatever instruction set runs, so greedy verification never flips a tie; training,
long inputs and unusual models take MLX's own path.
"""

from specl.shared.native.accelerate import Acceleration, accelerate
from specl.shared.native.extension import (
    MAX_WIDTH,
    available,
    instruction_set,
    instruction_sets,
    reason,
    set_threads,
    threads,
    use_instruction_set,
)
from specl.shared.native.packing import Affine, affine_from_gguf, affine_from_mlx
from specl.shared.native.rows import RowStats, row_stats

__all__ = [
    "MAX_WIDTH",
    "Acceleration",
    "Affine",
    "RowStats",
    "accelerate",
    "affine_from_gguf",
    "affine_from_mlx",
    "available",
    "instruction_set",
    "instruction_sets",
    "reason",
    "row_stats",
    "set_threads",
    "threads",
    "use_instruction_set",
]
