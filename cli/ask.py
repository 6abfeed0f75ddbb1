"""`specl-ctl ask`: one question. The text goes to stdout as it is generated, a line of statistics
to stderr; or one JSON object.
"""

from dataclasses import asdict
from typing import Any

import click

from specl.cli.files.text import read_text
from specl.cli.options import sampling_options
from specl.cli.terminal import echo_answer, json_line
from specl.shared.errors import RequestRejected
from specl.shared.messaging.client import Client
from specl.shared.messaging.messages import Done
from specl.shared.runtime.terminal import visible


def summary_line(done: Done) -> str:
    """The statistics of an answer in one line, for people."""
    stats = done.stats
    parts = [f"{done.tokens} tokens", f"{stats.tokens_per_second:.1f} tok/s"]
    if plain := stats.plain_tokens_per_second_estimate:
        parts.append(f"{stats.tokens_per_second / plain:.2f}x plain")
    parts.append(f"{stats.accepted} of {stats.drafted} drafted accepted")
    if stats.acceptance_rate is not None:
        parts.append(f"acceptance {stats.acceptance_rate:.2f}")
    if stats.mean_accepted_length:
        parts.append(f"{stats.mean_accepted_length:.2f} tokens a round")
    parts.append(f"adapter {done.adapter_id or 'none'}")
    parts.append(f"first token {stats.ttft_ms:.0f} ms")
    if not done.recorded and done.record_note:
        parts.append(f"NOT RECORDED: {done.record_note}")
    return " | ".join(parts)


def as_json(done: Done) -> dict[str, Any]:
    """The object that `--json` prints for an answer."""
    fields = asdict(done)
    order = ("text", "tokens", "finish_reason", "adapter_id", "recorded")
    return {"id": done.generation_id} | {name: fields[name] for name in order} | {"stats": fields["stats"]}


@click.command()
@click.argument("prompt")
@sampling_options()
@click.option(
    "--mode", type=click.Choice(["detailed", "fast"]), help="fast: nothing is recorded that the draft could learn from."
)
@click.option("--system", help="A system message.")
@click.option("--stop", multiple=True, help="End the answer before this text; may be given several times.")
@click.option(
    "--num-draft-tokens", type=click.IntRange(0, 16), help="Draft exactly this many tokens each round; 0: none."
)
@click.option("--ngram/--no-ngram", default=None, help="Also draft from repeats of the running text.")
@click.option("--no-record", is_flag=True, help="Record nothing of this request.")
@click.option("--json", "as_object", is_flag=True, help="One JSON object instead of streaming text.")
def ask(prompt: str, as_object: bool, no_record: bool, stop: tuple[str, ...], **options: Any) -> None:
    """Ask the model. PROMPT is the user's message; `-` reads it from standard input.

    \b
    specl-ctl ask "Why is the sky blue?"
    specl-ctl ask --temperature 0 --max-tokens 64 --json "List three rivers."
    """
    if prompt == "-":
        prompt = read_text("-")
    if not prompt.strip():
        raise RequestRejected("the prompt is empty")
    with Client() as client:
        pieces = client.stream(prompt, on_position=_report_position, stop=list(stop), record=not no_record, **options)
        for text in pieces:
            if not as_object:
                echo_answer(text)
        done = client.last
        assert done is not None  # a stream that ends has set it
        if as_object:
            click.echo(json_line(as_json(done)))
        else:
            click.echo()
            click.echo(click.style(visible(summary_line(done)), dim=True), err=True)


def position_text(position: int) -> str:
    """How many requests are served before this one, for people."""
    return f"waiting: {position} before this request" if position else "waiting: next"


def _report_position(position: int) -> None:
    click.echo(click.style(position_text(position), dim=True), err=True)
