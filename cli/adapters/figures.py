"""Adapters and the trainer's runs as text: cells of `adapters list`, lines of `adapters show`.

Knows manifests and rows of the store. A manifest may hold anything where a number should be; that
is shown as a dash.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from specl.shared.adapters.manifest import Manifest
from specl.shared.adapters.registry import Adapters
from specl.shared.messaging.codes import ActivationReason

Row = dict[str, Any]  # a row of the store
Line = tuple[str, str]  # label and value
COLUMNS = ("id", "made (UTC)", "from", "held-out", "gain (95%)", "general", "state")
# for these reasons `who` in the view `adapter_activations` says as much as the note
WITHOUT_NOTE = {
    ActivationReason.ANNOUNCED,
    ActivationReason.RESTART,
    ActivationReason.BY_HAND,
    ActivationReason.BY_HAND_AGAIN,
    ActivationReason.ROLLED_BACK_BY_HAND,
    ActivationReason.REINSTATED,
}


# ------------------------------------------------------------------------------------------ numbers
def _date(timestamp: float) -> str:
    return datetime.fromtimestamp(timestamp, UTC).strftime("%Y-%m-%d %H:%M")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(value: Any, digits: int = 4) -> str:
    return f"{value:.{digits}f}" if _is_number(value) else "-"


def _interval(low: Any, high: Any) -> str:
    return f"{low:+.2f} to {high:+.2f}" if _is_number(low) and _is_number(high) else "-"


def _difference(before: Any, after: Any) -> str:
    return f"{after - before:+.4f}" if _is_number(before) and _is_number(after) else "-"


def _judged(manifest: Manifest) -> dict[str, Any]:
    """What the judge measured; empty where the manifest has no such object."""
    judged = manifest.metrics.get("gate")
    return judged if isinstance(judged, dict) else {}


# ------------------------------------------------------------------------------------ adapters list
def adapter_cells(adapters: Adapters, manifest: Manifest) -> list[str]:
    """A published adapter as a row of COLUMNS."""
    metrics, judged, id = manifest.metrics, _judged(manifest), manifest.id
    names = {"current": adapters.current(), "best": adapters.resolve("best"), "latest": adapters.resolve("latest")}
    state = [name for name, named in names.items() if named == id]
    state += ["rolled back"] if id in adapters.rolled_back() else []
    return [
        id,
        _date(manifest.created_at)[5:],
        manifest.parent_id or "none",
        f"{_number(metrics.get('heldout_before'), 3)} > {_number(metrics.get('heldout_after'), 3)}",
        _interval(judged.get("low"), judged.get("high")),
        _difference(judged.get("regression_before"), judged.get("regression_after")),
        ", ".join(state),
    ]


def unreadable_cells(id: str, reason: str) -> list[str]:
    """An adapter whose manifest cannot be read as a row of COLUMNS."""
    return [id, "-", "-", "-", "-", "-", f"[red]{reason}[/]"]


def run_cells(run: Row) -> list[str]:
    """A run that published no adapter as a row of COLUMNS."""
    return [
        "-",
        run["created"][5:16].replace("T", " "),
        run["parent_id"] or "none",
        f"{_number(run['heldout_before'], 3)} > {_number(run['heldout_after'], 3)}",
        _interval(run["gain_low"], run["gain_high"]),
        _difference(run["regression_before"], run["regression_after"]),
        run["verdict"].replace("_", " "),
    ]


# ------------------------------------------------------------------------------------ adapters show
def manifest_lines(manifest: Manifest, path: str, current: bool) -> list[Line]:
    """The lines of `adapters show` that come from the manifest."""
    metrics, training = manifest.metrics, manifest.training
    by_depth = metrics.get("heldout_after_by_depth")
    depths = ", ".join(_number(value, 3) for value in by_depth) if isinstance(by_depth, list) else "-"
    generations, positions = metrics.get("heldout_generations", 0), metrics.get("heldout_positions", 0)
    source = ("imported from", training["imported"]) if "imported" in training else ("trained on", _data(training))
    return [
        ("adapter", manifest.id + (" (current)" if current else "")),
        ("made (UTC)", _date(manifest.created_at)),
        ("path", path),
        ("draft it changes", f"{manifest.base_model} ({manifest.base_fingerprint})"),
        ("parent", manifest.parent_id or "none"),
        ("LoRA", f"rank {manifest.rank}, alpha {manifest.alpha:g}, on {', '.join(manifest.modules)}"),
        ("weight change, norm", f"{manifest.change_norm:.4f}"),
        ("held-out agreement", _change(metrics, "heldout_before", "heldout_after")),
        ("", f"{generations} generations, {positions} positions; by depth {depths}"),
        source,
        ("loss", _change(training, "loss_first", "loss_last")),
        ("training run", manifest.training_run_id),
    ]


def _change(figures: Mapping[str, Any], before: str, after: str) -> str:
    return f"{_number(figures.get(before))} -> {_number(figures.get(after))}"


def _data(training: Mapping[str, Any]) -> str:
    """The data that the adapter learned from. Runs before schema 2 did not count failures, successes and
    replay.
    """
    kinds = [f"{training[name]} {name}" for name in ("failures", "successes", "replay") if name in training]
    generations = f"{len(training.get('generations', []))} generations"
    return ", ".join([generations, *kinds, f"{training.get('tokens', 0)} tokens", f"{training.get('steps', 0)} steps"])


def history_lines(manifest: Manifest, run: Row | None, activations: list[Row]) -> list[Line]:
    """What the judge measured, its verdict, and when the adapter was used."""
    judged = _judged(manifest)
    lines: list[Line] = []
    if judged:
        lines.append(("gain, 95% interval", _interval(judged.get("low"), judged.get("high"))))
        lines.append(("general text", _change(judged, "regression_before", "regression_after")))
    if run is not None:
        lines.append(("verdict", f"{run['verdict']} ({run['caused_by']})"))
    for index, event in enumerate(activations):
        note = "" if event["reason"] in WITHOUT_NOTE else f": {event['note']}"
        lines.append(("used" if index == 0 else "", f"{event['created']}  {event['event']}, {event['who']}{note}"))
    return lines
