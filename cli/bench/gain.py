"""`specl-ctl bench learning --gain`: unseen prompts before and after one training run on a day's worth of one kind of work."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specl.cli.bench.learning import FIGURES, WAIT_FACTOR, WAIT_S, Learning, cells, one, spread
from specl.cli.progress import ProgressReporter
from specl.shared.errors import SpecLoraError
from specl.shared.messaging.client import Client
from specl.shared.messaging.codes import RunVerdict
from specl.shared.runtime.progress import ProgressMeter

if TYPE_CHECKING:
    from specl.shared.bench.stream import Item, StreamRow

FOLDER = "gain"
WAYS = ("fixed", "auto")


class Gain(Learning):
    """Before, collect, train, after."""

    def __init__(self, wish: dict[str, Any], out: Path) -> None:
        from specl.shared.bench.stream import scaled

        super().__init__(wish, out)
        share = self.settings.training.heldout_share
        self.small = scaled(self.settings, wish["requests"], share, wish["train_minutes"], 1.0, False, False)
        self.passes: dict[str, dict[str, list[StreamRow]]] = {}
        self.run_of_training: dict[str, Any] = {}

    def measure(self) -> None:
        """See Learning."""
        from specl.shared.bench import stream

        wish, say = self.wish, self.console.print
        unseen = stream.items(wish["kinds"], wish["unseen"], split="unseen")
        with self.daemons(FOLDER, self.small) as client:
            say(f"{wish['unseen']} unseen prompts, before learning")
            self._pass(client, "before", unseen)
            say(f"{wish['requests']} generations to learn from")
            self._collect(client, stream.items(wish["kinds"], wish["requests"]))
            stream.wait_stored(client, wish["requests"])
            failures = stream.count_failures(client)
            say(f"training on {failures} failures, at most {wish['train_minutes']} min of steps")
            start = time.monotonic()
            last = stream.train(client, say, WAIT_FACTOR * 60 * wish["train_minutes"] + WAIT_S)
            took = round(time.monotonic() - start, 1)
            self.run_of_training = asdict(last) | {"failures": failures, "seconds_with_all_waits": took}
            say(f"{last.verdict} after {took:.0f} s: {last.reason}")
            if last.verdict != RunVerdict.PROMOTED:
                return
            stream.wait_adapter(client, last.adapter_id)
            say(f"the same unseen prompts with adapter {last.adapter_id}")
            self._pass(client, "after", unseen)

    def _collect(self, client: Client, wanted: "Sequence[Item]") -> None:
        from specl.shared.bench.stream import ask, conversation

        share = self.small.training.heldout_share
        with ProgressReporter() as report:
            meter = ProgressMeter("requests", len(wanted), report)
            for item in wanted:
                ask(client, item, self.wish["tokens"], conversation_id=conversation(item.n, share))
                meter.advance(note=item.kind)

    def _pass(self, client: Client, name: str, wanted: "Sequence[Item]") -> None:
        """Each prompt three times: automatic k, plain beside it, fixed k. Nothing is recorded."""
        from specl.shared.bench.stream import FIXED_K, ask, plain_speed

        tokens = self.wish["tokens"]
        found = self.passes[name] = {way: [] for way in WAYS}
        with ProgressReporter() as report:
            meter = ProgressMeter("prompts", len(wanted), report)
            for item in wanted:
                row = ask(client, item, tokens, record=False)
                row.plain = plain_speed(client, item, tokens)
                found["fixed"].append(ask(client, item, tokens, num_draft_tokens=FIXED_K, record=False))
                found["auto"].append(row)
                meter.advance(note=f"{row.tokens_per_second:.1f} tok/s")

    def score(self) -> None:
        """See Learning."""
        self.teacher([(FOLDER, rows) for sides in self.passes.values() for rows in sides.values()])

    def has_rows(self) -> bool:
        """See Learning."""
        return any(rows for sides in self.passes.values() for rows in sides.values())

    def tell(self) -> None:
        """See Learning. Raises SpecLoraError where nothing was promoted, after writing what there is."""
        from specl.shared.bench.learning_report import Side, gain

        before, after = self.passes["before"], self.passes.get("after")
        report: dict[str, Any] = {"training": self.run_of_training}
        if after and len(after["auto"]) == len(before["auto"]):
            report |= gain((before["fixed"], after["fixed"]), (before["auto"], after["auto"]))
            for line in gain_lines(report):
                self.console.print(line)
        else:
            report |= {"before": {way: Side(rows).figures() for way, rows in before.items()}}
            figures = report["before"]
            for label, figure, _, form in FIGURES:
                self.console.print(f"  before, {label:34}" + one(figures[_way(figure)].get(figure), form).rjust(9))
        passes = {
            name: {way: [asdict(row) for row in rows] for way, rows in p.items()} for name, p in self.passes.items()
        }
        self.write(passes, report, self.small)
        if not self.cut and not after:
            raise SpecLoraError("no adapter was promoted, so there is no after to compare with")


def gain_lines(report: dict[str, Any]) -> Iterator[str]:
    """The report for a person."""
    yield f"{report['prompts']} unseen prompts{'':26}" + cells("before", "after", "change (95%)")
    which = {"agreement": "agreement_gain", "acceptance": "acceptance_gain"}
    which |= {"speed": "speed_ratio", "speed_to_plain": "speed_ratio_to_plain"}
    for label, figure, change, form in FIGURES:
        way = _way(figure)
        note = f"{label} ({'k chosen by costs' if way == 'auto' else 'k = 4'})"
        sides = [one(report[side][way].get(figure), form) for side in ("before", "after")]
        yield f"  {note:42}" + cells(*sides, spread(report.get(which.get(change, "")), change))
    yield f"texts that differ between before and after: {report['words']['different']} of {report['words']['compared']}"


def _way(figure: str) -> str:
    """Speeds are of the automatic k, the draft's own figures of the fixed one."""
    return "fixed" if figure in ("agreement", "acceptance") else "auto"
