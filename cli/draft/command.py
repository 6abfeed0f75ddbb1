"""`specl-ctl draft build`: a draft out of the target itself, with progress, resumable, ending in a
measured table.
"""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from specl.cli.progress import ProgressReporter
from specl.shared.errors import ConfigError
from specl.shared.paths import find_paths
from specl.shared.settings.load import load_settings
from specl.shared.settings.schema import Settings

if TYPE_CHECKING:
    from specl.shared.learning.build_draft import BuildSettings
    from specl.shared.models.language_model import LanguageModel
    from specl.shared.training_files.draft_build import BuildTexts, BuiltDraft

_UNITS = {"s": 1, "m": 60, "h": 3600}
MEASURED_PROMPTS = 8
MEASURED_TOKENS = 64
# what a manifest keeps of the manifests of the drafts it goes on from
ANCESTOR_FIELDS = (
    "command", "prompts_sha256", "answers_sha256", "training_prompts", "training_tokens", "hours", "heldout_acceptance_by_depth",
    "heldout_agreement_by_depth", "training",
)  # fmt: skip


def seconds_of(text: str) -> float:
    """`90s`, `45m`, `2h`. Raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    if not match:
        raise ConfigError(f"a time is written like 90s, 45m or 2h, not {text!r}")
    return float(match[1]) * _UNITS[match[2]]


@click.group()
def draft() -> None:
    """Build a draft model out of the target."""


@draft.command()
@click.option("--target", default=None, help="A folder, a hub name or smollm2-135m; the settings' target otherwise.")
@click.option(
    "--kind",
    type=click.Choice(["head", "layers"]),
    default="head",
    show_default=True,
    help="head: one layer that reads the target's states. layers: some of the target's own layers, an ordinary model.",
)
@click.option("--layers", default="5", show_default=True, help="For layers: how many, or which (0,1,2,28,29).")
@click.option(
    "--prompts",
    "file",
    metavar="FILE",
    help="Your own prompts instead of the shipped 4,000; with --from-store a FILE, or the word `shipped`, adds prompts.",
)
@click.option(
    "--answers",
    multiple=True,
    metavar="FILE",
    help="Answers that the target wrote for an earlier build (--keep-answers), read again; may be repeated. --prompts adds more.",
)
@click.option("--keep-answers", "keep", metavar="FILE", help="Write the target's answers there, as token ids (.npz).")
@click.option("--from-store", is_flag=True, help="Learn from your own traffic (held-out conversations left out).")
@click.option(
    "--tokens", type=click.IntRange(1000), default=200_000, show_default=True, help="Tokens that the target writes."
)
@click.option("--time", "limit", default="1h", show_default=True, help="Stop after this long with what there is.")
@click.option(
    "--hot", type=click.IntRange(64), default=8192, show_default=True, help="Size of a head's hot vocabulary."
)
@click.option("--epochs", type=click.IntRange(1), default=6, show_default=True)
@click.option(
    "--depths",
    type=click.IntRange(1, 8),
    default=2,
    show_default=True,
    help="Own steps that a head learns to follow; a third costs half as much time again.",
)
@click.option("--learning-rate", type=click.FloatRange(1e-6, 1e-1), default=1e-3, show_default=True)
@click.option(
    "--loss", type=click.Choice(["acceptance", "kl", "tv", "mixed", "ce"]), default="acceptance", show_default=True
)
@click.option(
    "--begin", type=click.Path(exists=True, file_okay=False), help="A head draft of this target to continue from."
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--out", type=click.Path(file_okay=False), help="Where the draft goes (default: var/models/drafts/NAME-KIND)."
)
@click.option("--work", type=click.Path(file_okay=False), help="Where a stopped build goes on (default: beside --out).")
def build(target: str | None, limit: str, out: str | None, work: str | None, **options: Any) -> None:
    """Build a draft out of the target: the target writes text, the draft learns to predict it.

    A stopped build goes on where it was when the same command is run again. The draft is ready for
    `models.draft.name` in the settings file.
    """
    from specl.cli.memory_check import check_memory, local_path
    from specl.shared.models.head import load_head
    from specl.shared.models.load import load
    from specl.shared.models.report import to_stderr
    from specl.shared.training_files.draft_build import build as build_draft

    seconds = seconds_of(limit)
    settings, paths = load_settings(), find_paths()
    if options["begin"] and options["kind"] != "head":
        raise ConfigError(
            "--begin goes on from a head draft; a layers draft always begins with the target's own layers"
        )
    keep = Path(options["keep"]).expanduser() if options["keep"] else None
    if keep and not keep.parent.is_dir():
        raise ConfigError(f"--keep-answers {keep}: there is no folder {keep.parent}")
    name = target or settings.models.target.name
    check_memory(settings, paths, local_path(name, paths.models), None, "building a draft")
    loaded = load(name, paths.models, settings.models.precision, to_stderr)
    short_name = Path(name).name
    build_settings = _settings(options, loaded, seconds)
    texts, about = _texts(options, loaded, settings, paths.store)
    about = {"command": _command(short_name, limit, options), **about}
    folder = Path(out) if out else paths.models / "drafts" / f"{short_name}-{options['kind']}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    begin = load_head(Path(options["begin"]), options["begin"], loaded) if options["begin"] else None
    about |= {"ancestors": _ancestors(Path(options["begin"]))} if begin else {}
    work_folder = Path(work) if work else folder.with_name(f".{folder.name}.work")
    with ProgressReporter() as report:
        built = build_draft(loaded, texts, work_folder, folder, build_settings, about, report, begin, keep)
    _table(loaded, built, settings, paths.costs)
    click.echo(f"models:\n  draft: {{name: {folder}}}")


def _ancestors(folder: Path) -> list[dict[str, Any]]:
    """How the drafts were built that this build goes on from, the nearest first: a manifest
    describes its own stage only.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        return []
    return [{name: manifest[name] for name in ANCESTOR_FIELDS if name in manifest}, *manifest.get("ancestors", [])]


def _settings(options: dict[str, Any], target: "LanguageModel", seconds: float) -> "BuildSettings":
    """The options as BuildSettings. Raises ConfigError for layers that the target does not have."""
    from specl.shared.learning.build_draft import BuildSettings
    from specl.shared.learning.losses import LossSettings
    from specl.shared.models.layers import pick_layers

    kind = options["kind"]
    total = int(target.config["num_hidden_layers"])
    return BuildSettings(
        kind=kind,
        layers=pick_layers(options["layers"], total) if kind == "layers" else (),
        tokens=options["tokens"],
        seconds=seconds,
        hot_size=options["hot"],
        epochs=options["epochs"],
        depths=options["depths"] if kind == "head" else 1,
        learning_rate=options["learning_rate"],
        loss=LossSettings(options["loss"]),
        seed=options["seed"],
    )


def _texts(
    options: dict[str, Any], target: "LanguageModel", settings: Settings, store: Path
) -> tuple["BuildTexts", dict[str, Any]]:
    """The texts to learn from, and what the manifest says of them."""
    from specl.cli.draft.texts import SHIPPED, answers_of, prompts_of, texts_of_store
    from specl.shared import prompts
    from specl.shared.training_files.draft_build import BuildTexts

    user_texts = texts_of_store(store, settings, target.fingerprint, target.name) if options["from_store"] else []
    written, digests = answers_of(options["answers"], target.fingerprint)
    file = options["file"] or (None if user_texts or written else SHIPPED)
    items, digest = prompts_of(file) if file else ([], None)
    about = {
        "prompts_sha256": digest,
        "prompt_kinds": sorted({prompt.kind for prompt in items} | ({"user traffic"} if user_texts else set())),
        "heldout_sha256": prompts.sha256("heldout"),
        "answers_sha256": digests,
    }
    if written:
        click.echo(f"{len(written)} answers of earlier builds to learn from", err=True)
    if user_texts:
        click.echo(f"{len(user_texts)} answers of your own traffic to learn from", err=True)
    return BuildTexts(items, prompts.load("heldout"), user_texts, written, prompts.may_train), about


def _command(target: str, limit: str, options: dict[str, Any]) -> str:
    """The command line that makes the same draft again; no path of this machine is in it."""
    parts = [f"specl-ctl draft build --target {target} --kind {options['kind']}"]
    parts += (
        [f"--layers {options['layers']}"]
        if options["kind"] == "layers"
        else [f"--hot {options['hot']} --depths {options['depths']}"]
    )
    parts += [f"--prompts {Path(options['file']).name}"] if options["file"] else []
    parts += ["--from-store"] if options["from_store"] else []
    parts += [f"--answers {Path(file).name}" for file in options["answers"]]
    parts += [f"--tokens {options['tokens']} --time {limit} --epochs {options['epochs']} --loss {options['loss']}"]
    parts += [f"--learning-rate {options['learning_rate']:g} --seed {options['seed']}"]
    parts += [f"--begin {Path(options['begin']).name}"] if options["begin"] else []
    return " ".join(parts)


def _table(target: "LanguageModel", built: "BuiltDraft", settings: Settings, costs: Path) -> None:
    """Print what was built and its speed on this machine: held-out prompts, plain and drafted in
    turn.
    """
    from specl.shared import prompts
    from specl.shared.engine.core import EngineCore
    from specl.shared.engine.request_options import RequestOptions
    from specl.shared.learning.judge import expected_rate
    from specl.shared.loading.costs import load_or_calibrate
    from specl.shared.loading.engine import engine_options

    engine = EngineCore(target, built.draft, engine_options(settings))
    measured = load_or_calibrate(engine, costs)
    seconds, tokens = {0: 0.0, None: 0.0}, {0: 0, None: 0}
    for prompt in prompts.load("heldout")[-MEASURED_PROMPTS:]:
        _, ids = engine.encode_chat(prompt.messages)
        for k in (0, None):
            engine.prefixes.purge()
            session = engine.session(ids, RequestOptions(max_tokens=MEASURED_TOKENS, num_draft_tokens=k, ngram=False))
            while not session.prefill():
                pass
            while session.finish_reason is None:
                session.round()
            seconds[k] += session.stats.decode_s
            tokens[k] += len(session.output)
    plain, drafted = tokens[0] / seconds[0], tokens[None] / seconds[None]
    expected = expected_rate(measured, built.by_depth.acceptance, settings.speculative.max_draft_tokens)
    promised = "?" if expected is None else f"{expected * measured.verify_s(1):.2f}"
    manifest = built.manifest
    figures = manifest["training"]
    click.echo(
        f"{figures['steps']} steps over {figures['tokens_seen']} tokens; there are {manifest['training_tokens']}"
        f" of {manifest['training_prompts']} answers"
    )
    click.echo(
        "held-out acceptance by depth, each given the one before: "
        + ", ".join(f"{v:.3f}" for v in built.by_depth.acceptance)
    )
    click.echo(
        f"one draft token {1000 * measured.draft_s(1):.1f} ms, one plain step {1000 * measured.verify_s(1):.1f} ms; "
        f"expected speed {promised}x plain"
    )
    click.echo(
        f"plain {plain:.1f} tok/s, drafted {drafted:.1f} tok/s: {drafted / plain:.2f}x ({MEASURED_PROMPTS} held-out prompts, greedy)"
    )
