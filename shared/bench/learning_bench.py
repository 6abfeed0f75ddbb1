"""Does learning from live traffic help? Streams with learning on and off, or unseen prompts before
and after one training run.

Runs daemons in scratch run directories only; the user's store and adapters are not touched.
Calibrations (costs, the regression slice, states of replayed texts) are copied from the user's run
directory and from one pass to the next, so that all passes choose draft lengths by the same costs.
Measures; prints nothing and writes no report.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from specl.shared.bench import stream
from specl.shared.bench.scratch_daemons import ScratchDaemons
from specl.shared.bench.stream import StreamItem, StreamPass, StreamRow, StreamSchedule
from specl.shared.messaging.client import Client
from specl.shared.messaging.codes import RunVerdict
from specl.shared.paths import Paths
from specl.shared.runtime.progress import OnProgress, ProgressMeter
from specl.shared.settings.schema import Settings

COPIED = ("costs", "regression")  # folders of calibrations
STREAM_HELD_OUT = 0.3  # at least: a short stream has few conversations to judge by
WAIT_FACTOR, WAIT_S = 6, 1800  # a run waits for others, and makes the regression slice first
GAIN_NAME = "gain"
MODES = ("fixed", "auto")  # draft length fixed, and chosen by costs


@dataclass(frozen=True, slots=True)
class LearningOptions:
    """What to measure; as the options of `bench learning`."""

    kinds: Sequence[str]
    requests: int
    gap_s: float
    tokens: int
    minutes: float | None
    train_minutes: float
    trigger: int
    shift: bool
    ngram: bool
    with_off: bool
    unseen: int
    plain_every: int


class LearningBench:
    """What both measurements share. `folder` holds the run directories; `say` gets a sentence about
    each stage.
    """

    def __init__(
        self,
        settings: Settings,
        user_paths: Paths,
        folder: Path,
        options: LearningOptions,
        say: Callable[[str], object],
        report: OnProgress,
    ) -> None:
        self.settings, self.options, self.folder = settings, options, folder
        self._models, self._say, self._report = user_paths.models, say, report
        self._calibrated = user_paths.root

    @contextmanager
    def daemons(self, name: str, settings: Settings) -> Iterator[Client]:
        """A client of three daemons in the run directory `name`, which begin with the calibrations
        known so far.
        """
        folder = self.folder / name
        folder.mkdir()
        for part in COPIED:
            if (self._calibrated / part).is_dir():
                shutil.copytree(self._calibrated / part, folder / part)
        (folder / "training").mkdir(parents=True, exist_ok=True)
        for path in (self._calibrated / "training").glob("replay-*.npz"):
            shutil.copy(path, folder / "training")
        with ScratchDaemons(settings, self._models, folder=folder) as daemons, daemons.client() as client:
            self._calibrated = folder
            yield client

    def rescore(self, parts: Sequence[tuple[str, Sequence[StreamRow]]]) -> None:
        """Fill in the agreement of rows; each part is a run directory's name and the rows that its
        adapters drafted.
        """
        from specl.shared.adapters.registry import Adapters
        from specl.shared.bench.rescore import Rescorer
        from specl.shared.loading.engine import load_engine
        from specl.shared.models import blas  # noqa: F401 - binds the BLAS before mlx loads

        self._say("agreement, teacher-forced")
        rescorer = Rescorer(load_engine(self.settings, self._models))
        missing = 0
        for name, rows in parts:
            adapters = Adapters(Paths(self.folder / name, self._models).adapters)
            missing += rescorer.score(rows, adapters, self._report)
        if missing:
            self._say(f"{missing} answers have no agreement: their adapters were pruned meanwhile")


class StreamBench(LearningBench):
    """One stream, with learning on and off, without n-gram drafting and, if asked for, with it:
    `passes[column][side]`.
    """

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.columns = ("n-gram off", "n-gram on") if self.options.ngram else ("n-gram off",)
        self.sides = ("on", "off") if self.options.with_off else ("on",)
        self.passes: dict[str, dict[str, StreamPass]] = {column: {} for column in self.columns}

    @property
    def shift_at(self) -> int | None:
        """The request from which on the kind is another."""
        return self.options.requests // 2 if self.options.shift else None

    @property
    def small_settings(self) -> Settings:
        """The settings of the first pass."""
        return self._settings_of(self.columns[0], "on")

    def _settings_of(self, column: str, side: str) -> Settings:
        options = self.options
        share = max(self.settings.training.heldout_share, STREAM_HELD_OUT)
        learning, ngram = side == "on", column == "n-gram on"
        return stream.scaled_settings(
            self.settings, options.trigger, share, options.train_minutes, options.gap_s, learning, ngram
        )

    def measure(self) -> None:
        """Send every stream. A pass without learning answers what the pass with learning had time
        for.
        """
        options = self.options
        schedule = StreamSchedule(options.gap_s, options.tokens, options.plain_every, options.minutes)
        for column in self.columns:
            items = stream.stream_items(options.kinds, options.requests, options.shift)
            for side in self.sides:
                self._say(f"{column}, learning {side}: {len(items)} requests")
                result = self.passes[column][side] = StreamPass()
                with self.daemons(self._name(column, side), self._settings_of(column, side)) as client:
                    stream.send_stream(client, items, schedule, result, self._report)
                items = items[: len(result.rows)]

    def _name(self, column: str, side: str) -> str:
        return f"{self.columns.index(column)}-{side}"

    def score(self) -> None:
        """Fill in agreement."""
        self.rescore(
            [(self._name(c, side), part.rows) for c, sides in self.passes.items() for side, part in sides.items()]
        )

    def has_rows(self) -> bool:
        """Whether there is anything to report."""
        return any(part.rows for sides in self.passes.values() for part in sides.values())

    def report(self) -> dict[str, Any]:
        """The figures of each column."""
        from specl.shared.bench.learning_report import report

        return {
            column: report(sides["on"], sides.get("off"), self.shift_at)
            for column, sides in self.passes.items()
            if "on" in sides and sides["on"].rows
        }

    def rows_as_json(self) -> dict[str, Any]:
        """Every request."""
        return {column: {side: asdict(part) for side, part in sides.items()} for column, sides in self.passes.items()}

    def problem(self) -> str:
        """Why there is no result, or nothing."""
        return ""


class GainBench(LearningBench):
    """Unseen prompts, traffic to learn from, one training run, the same unseen prompts:
    `passes[before or after][mode]`.
    """

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        options, share = self.options, self.settings.training.heldout_share
        self.small_settings = stream.scaled_settings(
            self.settings, options.requests, share, options.train_minutes, 1.0, learning=False, ngram=False
        )
        self.passes: dict[str, dict[str, list[StreamRow]]] = {}
        self._training: dict[str, Any] = {}

    def measure(self) -> None:
        """Before, collect, train, after."""
        options, say = self.options, self._say
        unseen = stream.stream_items(options.kinds, options.unseen, split="unseen")
        with self.daemons(GAIN_NAME, self.small_settings) as client:
            say(f"{options.unseen} unseen prompts, before learning")
            self._measure_unseen(client, "before", unseen)
            say(f"{options.requests} generations to learn from")
            self._collect(client, stream.stream_items(options.kinds, options.requests))
            stream.wait_stored(client, options.requests)
            failures = stream.count_failures(client)
            say(f"training on {failures} failures, at most {options.train_minutes} min of steps")
            start = time.monotonic()
            last = stream.run_training(client, say, WAIT_FACTOR * 60 * options.train_minutes + WAIT_S)
            took = round(time.monotonic() - start, 1)
            self._training = asdict(last) | {"failures": failures, "seconds_with_all_waits": took}
            say(f"{last.verdict} after {took:.0f} s: {last.reason}")
            if last.verdict != RunVerdict.PROMOTED:
                return
            stream.wait_adapter(client, last.adapter_id)
            say(f"the same unseen prompts with adapter {last.adapter_id}")
            self._measure_unseen(client, "after", unseen)

    def _collect(self, client: Client, items: Sequence[StreamItem]) -> None:
        share = self.small_settings.training.heldout_share
        meter = ProgressMeter("requests", len(items), self._report)
        for item in items:
            stream.ask(client, item, self.options.tokens, conversation_id=stream.conversation(item.n, share))
            meter.advance(note=item.kind)

    def _measure_unseen(self, client: Client, name: str, items: Sequence[StreamItem]) -> None:
        """Each prompt three times: automatic draft length, plain beside it, fixed draft length.
        Nothing is recorded.
        """
        tokens = self.options.tokens
        rows = self.passes[name] = {mode: [] for mode in MODES}
        meter = ProgressMeter("prompts", len(items), self._report)
        for item in items:
            row = stream.ask(client, item, tokens, record=False)
            row.plain = stream.plain_speed(client, item, tokens)
            rows["fixed"].append(stream.ask(client, item, tokens, num_draft_tokens=stream.FIXED_K, record=False))
            rows["auto"].append(row)
            meter.advance(note=f"{row.tokens_per_second:.1f} tok/s")

    def score(self) -> None:
        """Fill in agreement."""
        self.rescore([(GAIN_NAME, rows) for modes in self.passes.values() for rows in modes.values()])

    def has_rows(self) -> bool:
        """Whether there is anything to report."""
        return any(rows for modes in self.passes.values() for rows in modes.values())

    def report(self) -> dict[str, Any]:
        """The gain, or the figures before training where nothing was promoted."""
        from specl.shared.bench.learning_report import StreamFigures, gain

        before, after = self.passes["before"], self.passes.get("after")
        report: dict[str, Any] = {"training": self._training}
        if after and len(after["auto"]) == len(before["auto"]):
            return report | gain((before["fixed"], after["fixed"]), (before["auto"], after["auto"]))
        return report | {"before": {mode: StreamFigures(rows).figures() for mode, rows in before.items()}}

    def rows_as_json(self) -> dict[str, Any]:
        """Every request."""
        return {
            name: {mode: [asdict(row) for row in rows] for mode, rows in modes.items()}
            for name, modes in self.passes.items()
        }

    def problem(self) -> str:
        """Why there is no result, or nothing."""
        return "" if "after" in self.passes else "no adapter was promoted, so there is no after to compare with"
