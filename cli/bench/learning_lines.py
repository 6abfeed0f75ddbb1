"""The reports of `bench learning` as lines for a person."""

from collections.abc import Iterator
from typing import Any

# label, figure, estimate of its change, form
FIGURES = (
    ("tokens a second", "tokens_per_second", "speed", "{:.1f}"),
    ("against plain decoding", "speed_to_plain", "speed_to_plain", "{:.2f}x"),
    ("agreement", "agreement", "agreement", "{:.3f}"),
    ("acceptance", "acceptance", "acceptance", "{:.3f}"),
    ("tokens a round", "tokens_a_round", "", "{:.2f}"),
)


def stream_lines(report: dict[str, Any]) -> Iterator[str]:
    """The report of streams, one column after the other."""
    for column, row in report.items():
        yield from column_lines(column, row)


def column_lines(column: str, row: dict[str, Any]) -> Iterator[str]:
    """The report of one column: its windows, texts, adapters and training runs."""
    for name, window in row["windows"].items():
        start, stop = window["requests"]
        if start == stop:
            continue
        yield f"{f'{column}, {name} ({start} to {stop - 1})':44}" + _cells("on", "off", "on / off, on - off (95%)")
        changes = window.get("on_against_off", {})
        for label, figure, change, form in FIGURES:
            on, off = (_figure(window.get(side, {}).get(figure), form) for side in ("on", "off"))
            yield f"  {label:42}" + _cells(on, off, _change(changes.get(change), change))
    if row["words"]:
        yield f"texts that differ between on and off: {row['words']['different']} of {row['words']['compared']}"
    for item in row["adapters"]:
        yield f"adapter {item['adapter'] or 'none'}: from request {item['from_request']}, {item['requests']} requests"
    for event in row["training"]:
        yield f"training run, by request {event['n']}: {event['verdict']}: {event['reason']}"


def gain_lines(report: dict[str, Any]) -> Iterator[str]:
    """The report of `--gain`; figures before training alone where nothing was promoted."""
    if "after" not in report:
        for label, figure, _, form in FIGURES:
            value = report["before"][_mode(figure)].get(figure)
            yield f"  before, {label:34}" + _figure(value, form).rjust(9)
        return
    yield f"{report['prompts']} unseen prompts{'':26}" + _cells("before", "after", "change (95%)")
    which = {"agreement": "agreement_gain", "acceptance": "acceptance_gain"}
    which |= {"speed": "speed_ratio", "speed_to_plain": "speed_ratio_to_plain"}
    for label, figure, change, form in FIGURES:
        mode = _mode(figure)
        note = f"{label} ({'k chosen by costs' if mode == 'auto' else 'k = 4'})"
        before, after = (_figure(report[side][mode].get(figure), form) for side in ("before", "after"))
        yield f"  {note:42}" + _cells(before, after, _change(report.get(which.get(change, "")), change))
    yield f"texts that differ between before and after: {report['words']['different']} of {report['words']['compared']}"


def _mode(figure: str) -> str:
    """Speeds are those of the automatic draft length, acceptance and agreement those of the fixed
    one.
    """
    return "fixed" if figure in ("agreement", "acceptance") else "auto"


def _cells(first: str, second: str, change: str) -> str:
    """Three columns behind a label."""
    return f"{first:>9}{second:>9}  {change}"


def _figure(value: float | None, form: str) -> str:
    """A figure, or a dash where there is none."""
    return "-" if value is None else form.format(value)


def _change(change: dict[str, Any] | None, name: str) -> str:
    """An estimate with its interval; speeds are ratios, the rest differences."""
    if not change or change["value"] is None:
        return ""
    form = "{:.2f}x ({:.2f} to {:.2f})" if name.startswith("speed") else "{:+.3f} ({:+.3f} to {:+.3f})"
    return form.format(change["value"], change["low"], change["high"])
