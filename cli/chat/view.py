"""What a chat shows: answers on stdout, with the source of each token in colour if wanted;
everything else dim on stderr.

Knows messages of the daemon and the terminal, nothing of conversations or commands.
"""

import click

from specl.cli.ask import as_json
from specl.cli.terminal import echo_answer, json_line
from specl.shared.errors import SpecLoraError
from specl.shared.messaging.messages import Delta, Done
from specl.shared.runtime.terminal import visible

SOURCE_COLOURS = (None, "green", "cyan")  # by Delta.sources: the target, the draft model, repeats of the running text


class ChatView:
    """Prints the parts of a chat. With `as_object` an answer is one JSON object instead of
    streaming text.
    """

    def __init__(self, show_draft: bool = False, show_stats: bool = True, as_object: bool = False) -> None:
        self.show_draft, self.show_stats, self.as_object = show_draft, show_stats, as_object

    def delta(self, delta: Delta) -> None:
        """A piece of an answer as it arrives."""
        if not self.as_object:
            if self.show_draft:  # click removes the colours where stdout is no terminal
                click.echo(coloured(delta), nl=False)
            else:
                echo_answer(delta.text)

    def answer_end(self, done: Done, summary: str) -> None:
        """The end of an answer: its statistics, or the JSON object of all of it."""
        if self.as_object:
            click.echo(json_line(as_json(done)))
            return
        click.echo()
        if not self.show_stats:
            return
        if done.finish_reason == "length":
            self.note("cut off at the token limit; --max-tokens allows more")
        self.note(f"{summary} | {done.stats.reused_prompt_tokens} of {done.stats.prompt_tokens} prompt tokens reused")

    def note(self, text: str) -> None:
        """A remark beside the answers."""
        click.echo(click.style(visible(text), dim=True), err=True)

    def warn(self, error: SpecLoraError) -> None:
        """An error after which the chat goes on."""
        click.echo(click.style(visible(f"{error}" + (f"; {error.hint}" if error.hint else "")), fg="red"), err=True)


def coloured(delta: Delta) -> str:
    """The text of a delta with ANSI colours by the source of each token."""
    parts, start = [], 0
    for length, source in zip(delta.lengths, delta.sources, strict=False):
        text = visible(delta.text[start : start + length])
        colour = SOURCE_COLOURS[source] if source < len(SOURCE_COLOURS) else None
        parts.append(click.style(text, fg=colour) if colour and text else text)
        start += length
    return "".join(parts) + visible(delta.text[start:])
