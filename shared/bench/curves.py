"""A stream as a picture: acceptance, agreement and speed over time, learning on and off, adapters
as vertical lines.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

from specl.shared.bench.learning_report import ROLLING, StreamFigures, curve
from specl.shared.bench.plot import require_matplotlib
from specl.shared.bench.stream import StreamPass, StreamRow

PANELS = (
    ("acceptance", StreamFigures.acceptance),
    ("agreement", StreamFigures.agreement),
    ("tokens a second", StreamFigures.speed),
    ("speed / plain decoding", StreamFigures.to_plain),
)
COLOURS = {"on": "tab:green", "off": "tab:gray"}


def draw_stream(passes: dict[str, dict[str, StreamPass]], shift_at: int | None, file: Path) -> None:
    """`passes` by column ("n-gram off", ...) and by side ("on", "off"); `shift_at` is the request
    where the kind changes.
    """
    pyplot = require_matplotlib()
    passes = {name: sides for name, sides in passes.items() if any(part.rows for part in sides.values())}
    size = (max(7, 6.5 * len(passes)), 2.3 * len(PANELS))
    figure, grid = pyplot.subplots(
        len(PANELS), len(passes), figsize=size, sharex="col", squeeze=False, layout="constrained"
    )
    for column, (name, sides) in enumerate(passes.items()):
        for axes, (label, statistic) in zip(grid[:, column], PANELS, strict=True):
            for side, part in sides.items():
                axes.plot(*curve(part.rows, statistic), color=COLOURS[side], label=f"learning {side}")
            _mark(axes, sides.get("on", StreamPass()).rows, shift_at)
            axes.set_ylabel(label)
            axes.grid(alpha=0.25)
        grid[0, column].set_title(f"{name} (the last {ROLLING} requests, pooled)", fontsize="medium")
        grid[0, column].legend(fontsize="small")
        grid[-1, column].set_xlabel("minutes since the stream began")
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def _mark(axes: Any, rows: list[StreamRow], shift_at: int | None) -> None:
    """Vertical lines where another adapter came in, and where the kind of request changed."""
    top = axes.get_ylim()[1]
    for before, row in pairwise(rows):
        if row.adapter_id != before.adapter_id:
            axes.axvline(row.at_s / 60, color="tab:blue", lw=0.9)
            axes.text(
                row.at_s / 60, top, f" {row.adapter_id or 'none'}", fontsize="x-small", va="top", color="tab:blue"
            )
        if row.n == shift_at:
            axes.axvline(row.at_s / 60, color="tab:red", lw=0.9, ls=":")
            axes.text(row.at_s / 60, top, " other kind ", fontsize="x-small", va="top", ha="right", color="tab:red")
