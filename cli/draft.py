"""`specl-ctl draft build`: a draft out of the target itself, with progress, resumable, ending in a measured table."""

import json
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from specl.shared import config
from specl.shared.errors import ConfigError
from specl.shared.paths import find_paths

if TYPE_CHECKING:
    from specl.shared.learning.distil import Progress
    from specl.shared.models.head import HeadDraft

_UNITS = {"s": 1, "m": 60, "h": 3600}
MEASURED_PROMPTS = 8
MEASURED_TOKENS = 64


def seconds_of(text: str) -> float:
    """`90s`, `45m`, `2h`. Raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    if not match:
        raise ConfigError(f"a time is written like 90s, 45m or 2h, not {text!r}")
    return float(match[1]) * _UNITS[match[2]]


class _Teller:
    """Progress on stderr: a line that changes on a terminal, a line every 20 s elsewhere."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._said = 0.0
        self._stage = ""

    def __call__(self, progress: "Progress") -> None:
        pause = 0.5 if self._terminal else 20.0
        if progress.stage == self._stage and time.monotonic() - self._said < pause:
            return
        fresh = progress.stage != self._stage
        self._said, self._stage = time.monotonic(), progress.stage
        share = 100 * progress.done / max(progress.total, 1)
        line = f"{progress.stage}: {progress.done} of {progress.total} ({share:.0f}%), {progress.left_s / 60:.1f} min left {progress.note}"
        end = "" if self._terminal else "\n"
        lead = "\n" if self._terminal and fresh else ("\r\033[K" if self._terminal else "")
        click.echo(f"{lead}{line}{end}", err=True, nl=False)


@click.group()
def draft() -> None:
    """Build a draft model out of the target."""


def _prompts(file: str | None) -> tuple[list[Any], str]:
    """The shipped training prompts, or a file's: one prompt a line, or JSONL with `messages` or `prompt`."""
    from specl.shared import prompts

    if file is None:
        return prompts.load("train"), prompts.sha256("train")
    import hashlib

    data = Path(file).read_bytes()
    items = []
    for number, line in enumerate(data.decode("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line) if line.lstrip().startswith("{") else {"prompt": line}
            messages = entry.get("messages") or [{"role": "user", "content": entry["prompt"]}]
        except (ValueError, KeyError) as error:
            raise ConfigError(f"{file}:{number}: neither a prompt nor JSON with `messages` or `prompt`") from error
        items.append(prompts.ShippedPrompt(f"line-{number}", "own", messages))
    return items, hashlib.sha256(data).hexdigest()


@draft.command()
@click.option("--target", default=None, help="A folder, a hub name or smollm2-135m; the settings' target otherwise.")
@click.option(
    "--prompts",
    "file",
    type=click.Path(exists=True, dir_okay=False),
    help="Your own prompts instead of the shipped 4,000.",
)
@click.option(
    "--tokens", type=click.IntRange(1000), default=200_000, show_default=True, help="Tokens that the target writes."
)
@click.option("--time", "limit", default="1h", show_default=True, help="Stop after this long with what there is.")
@click.option("--hot", type=click.IntRange(64), default=6144, show_default=True, help="Size of the hot vocabulary.")
@click.option("--epochs", type=click.IntRange(1), default=6, show_default=True)
@click.option(
    "--depths",
    type=click.IntRange(1, 8),
    default=2,
    show_default=True,
    help="Its own steps it learns to follow; a third costs half as much time again.",
)
@click.option("--learning-rate", type=click.FloatRange(1e-6, 1e-1), default=1e-3, show_default=True)
@click.option("--begin", type=click.Path(exists=True, file_okay=False), help="A head draft of this target to go on from.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--out", type=click.Path(file_okay=False), help="Where the draft goes (default: var/models/drafts/NAME-head)."
)
@click.option("--work", type=click.Path(file_okay=False), help="Where a stopped build goes on (default: beside --out).")
def build(
    target: str | None,
    file: str | None,
    tokens: int,
    limit: str,
    hot: int,
    epochs: int,
    depths: int,
    learning_rate: float,
    begin: str | None,
    seed: int,
    out: str | None,
    work: str | None,
) -> None:
    """Distil a one-layer `head` draft out of the target: it writes text, the draft learns to guess it.

    A stopped build goes on where it was when the same command is run again. The draft is ready for
    `models.draft.name` in the settings file.
    """
    from specl.shared import prompts
    from specl.shared.learning.distil import BuildSettings, build_head
    from specl.shared.models.head import load_head
    from specl.shared.models.load import load, to_stderr

    seconds = seconds_of(limit)
    settings, paths = config.load(), find_paths()
    name = target or settings.models.target.name
    loaded = load(name, paths.models, settings.models.precision, to_stderr)
    short = Path(name).name
    folder = Path(out) if out else paths.models / "drafts" / f"{short}-head"
    folder.parent.mkdir(parents=True, exist_ok=True)
    training, digest = _prompts(file)
    about = {
        "command": f"specl-ctl draft build --target {short} --tokens {tokens} --time {limit} --hot {hot}"
        f" --epochs {epochs} --depths {depths} --learning-rate {learning_rate:g} --seed {seed}"
        + (f" --begin {Path(begin).name}" if begin else ""),
        "prompts_sha256": digest,
        "prompt_kinds": sorted({prompt.kind for prompt in training}),
        "heldout_sha256": prompts.sha256("heldout"),
    }
    build_settings = BuildSettings(
        tokens=tokens,
        seconds=seconds,
        hot_size=hot,
        epochs=epochs,
        depths=depths,
        learning_rate=learning_rate,
        seed=seed,
    )
    started = load_head(Path(begin), begin, loaded) if begin else None
    workshop = Path(work) if work else folder.with_name(f".{folder.name}.work")
    made, score, manifest = build_head(
        loaded, training, prompts.load("heldout"), workshop, folder, build_settings, about, _Teller(), started
    )
    click.echo("", err=True)
    _table(made, score.by_depth, manifest, settings, paths.costs)
    click.echo(f"models:\n  draft: {{name: {folder}}}")


def _table(
    made: "HeadDraft", by_depth: tuple[float, ...], manifest: dict[str, Any], settings: config.Settings, costs: Path
) -> None:
    """What was made, and what it does here: measured on held-out prompts, plain and drafted in turn."""
    from specl.shared import prompts
    from specl.shared.engine.decode import Options
    from specl.shared.engine.engine import Engine

    engine = Engine(made.target, made, settings)
    costs.mkdir(parents=True, exist_ok=True)
    measured = engine.calibrate(costs)
    seconds, tokens = {0: 0.0, None: 0.0}, {0: 0, None: 0}
    for prompt in prompts.load("heldout")[-MEASURED_PROMPTS:]:
        _, ids = engine.encode_chat(prompt.messages)
        for k in (0, None):
            engine.prefixes.purge()
            session = engine.session(ids, Options(max_tokens=MEASURED_TOKENS, num_draft_tokens=k, ngram=False))
            while not session.prefill():
                pass
            while session.finish_reason is None:
                session.round()
            seconds[k] += session.tally.decode_s
            tokens[k] += len(session.output)
    plain, drafted = tokens[0] / seconds[0], tokens[None] / seconds[None]
    click.echo(f"trained on {manifest['training_tokens']} tokens of {manifest['training_prompts']} answers")
    click.echo("held-out agreement by depth: " + ", ".join(f"{value:.3f}" for value in by_depth))
    click.echo(
        f"one draft token {1000 * measured.draft_s(1):.1f} ms, one plain step {1000 * measured.verify_s(1):.1f} ms"
    )
    click.echo(
        f"plain {plain:.1f} tok/s, drafted {drafted:.1f} tok/s: {drafted / plain:.2f}x ({MEASURED_PROMPTS} held-out prompts, greedy)"
    )
