"""The ratios as a picture, with matplotlib (`pip install 'speclora[bench]'`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specl.shared.bench.arms import PLAIN
from specl.shared.bench.measure import Run
from specl.shared.bench.report import figures, groups
from specl.shared.errors import ConfigError


def require_matplotlib() -> Any:
    """matplotlib.pyplot without a display. Raises ConfigError where it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(
            "a picture needs matplotlib, which is not installed", "pip install 'speclora[bench]'"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw(runs: Sequence[Run], file: Path) -> None:
    """Median ratio to mlx-lm plain, an arm a colour, a group of prompts a cluster; whiskers are the
    smallest and largest.
    """
    pyplot = require_matplotlib()
    clusters = {
        name: {item.arm: item.ratio for item in figures(group) if item.ratio.n} for name, group in groups(runs).items()
    }
    arms = list(dict.fromkeys(arm for cluster in clusters.values() for arm in cluster if arm != PLAIN))
    figure, axes = pyplot.subplots(figsize=(max(7, 1.9 * len(clusters)), 4.5), layout="constrained")
    width = 0.84 / max(len(arms), 1)
    for index, arm in enumerate(arms):
        rows = [(x, cluster[arm]) for x, cluster in enumerate(clusters.values()) if arm in cluster]
        medians = [ratio.median or 0.0 for _, ratio in rows]
        below = [(ratio.median or 0.0) - (ratio.low or 0.0) for _, ratio in rows]
        above = [(ratio.high or 0.0) - (ratio.median or 0.0) for _, ratio in rows]
        at = [x + (index - (len(arms) - 1) / 2) * width for x, _ in rows]
        axes.bar(at, medians, width, yerr=(below, above), label=arm, error_kw={"lw": 0.7, "alpha": 0.6})
    axes.axhline(1.0, color="black", lw=0.8)
    axes.set_xticks(range(len(clusters)), list(clusters), rotation=15)
    axes.set_ylabel(f"tokens a second / {PLAIN}")
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
