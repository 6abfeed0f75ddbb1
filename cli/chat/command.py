"""`specl-ctl chat`: several turns. The whole message list is sent each time; the daemon reuses what it has already read."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import click

from specl.cli.ask import as_json, summary_line
from specl.cli.chat import chat_input
from specl.cli.chat.conversation import Conversation
from specl.cli.files.text import read_lines
from specl.cli.options import sampling_options
from specl.shared.errors import DaemonUnreachable, RequestRejected, SpecLoraError
from specl.shared.messaging.client import Client
from specl.shared.messaging.messages import Delta

SOURCE_COLOURS = (None, "green", "cyan")  # the target itself, the draft model, repeats of the running text
HELP = """\
/help            this list
/stats           the last answer, this conversation, and all of them
/train           train the draft on what is stored
/eval            what training has brought: held-out agreement, acceptance by adapter
/adapters [NAME] list them, or draft with one: an id, best, latest, previous, none
/system [TEXT]   show or set the system message; `/system -` removes it
/draft           colour drafted tokens, or stop it
/reset           forget this conversation
/save FILE       write it down: .json and .jsonl as messages, else Markdown
/quit            leave (also Ctrl-D)
Enter sends; Alt-Enter begins a new line, and so does a message between lines of \"\"\".
Ctrl-C stops an answer. A message that begins with a slash is typed with two."""


@click.command()
@click.option("--system", default="", help="A system message.")
@sampling_options()
@click.option(
    "--show-draft", is_flag=True, help="Colour what was drafted: green by the draft model, cyan from repeats."
)
@click.option("--no-record", is_flag=True, help="Keep nothing of this conversation, no history of messages either.")
@click.option("--no-stats", is_flag=True, help="No line of statistics after each answer.")
@click.option("--json", "as_object", is_flag=True, help="One JSON object an answer instead of streaming text.")
def chat(system: str, show_draft: bool, no_record: bool, no_stats: bool, as_object: bool, **wish: Any) -> None:
    """ChatSession with the model, turn by turn. /help lists what can be typed.

    Without a terminal every line of standard input is a message:

    \b
    printf 'My name is Ada.\\nWhat is my name?\\n' | specl-ctl chat --temperature 0
    """
    with Client() as client:
        talk = ChatSession(
            client, Conversation(system), wish | {"record": not no_record}, Face(show_draft, not no_stats, as_object)
        )
        if chat_input.is_interactive():
            talk.greet()
            source = chat_input.terminal(
                client.paths, client.settings.records, not no_record, [f"/{n}" for n in talk.commands]
            )
            talk.run_terminal(source)
        else:
            talk.run(chat_input.messages(chat_input.piped(line for _, line in read_lines("-"))))


class Face:
    """What is shown, and how."""

    def __init__(self, show_draft: bool = False, show_stats: bool = True, as_object: bool = False) -> None:
        self.show_draft, self.show_stats, self.as_object = show_draft, show_stats, as_object

    def piece(self, delta: Delta) -> None:
        """Text as it comes, each token in the colour of its source."""
        if self.as_object:
            return
        text = delta.text
        if self.show_draft:
            text = coloured(delta)
        click.echo(text, nl=False)  # takes colours away where nobody sees them

    def note(self, text: str) -> None:
        """Something beside the answers, dim."""
        click.echo(click.style(text, dim=True), err=True)

    def trouble(self, error: SpecLoraError) -> None:
        """An error that ends nothing."""
        click.echo(click.style(f"{error}" + (f"; {error.hint}" if error.hint else ""), fg="red"), err=True)


def coloured(delta: Delta) -> str:
    """The text of a delta with ANSI colours by source."""
    out, place = [], 0
    for length, source in zip(delta.lengths, delta.sources, strict=False):
        part = delta.text[place : place + length]
        colour = SOURCE_COLOURS[source] if source < len(SOURCE_COLOURS) else None
        out.append(click.style(part, fg=colour) if colour and part else part)
        place += length
    return "".join(out) + delta.text[place:]


class ChatSession:
    """One sitting: reads messages, answers or obeys."""

    def __init__(self, client: Client, conversation: Conversation, wish: dict[str, Any], face: Face) -> None:
        self.client, self.conversation, self.wish, self.face = client, conversation, wish, face
        self._last = ""
        self.commands: dict[str, Callable[[str], None]] = {
            "help": lambda rest: click.echo(HELP),
            "stats": self._stats,
            "train": self._train,
            "eval": self._eval,
            "adapters": self._adapters,
            "system": self._system,
            "draft": self._draft,
            "reset": self._reset,
            "save": self._save,
            "quit": self._quit,
        }

    # ------------------------------------------------------------------------------------------------ loops
    def greet(self) -> None:
        """Which models answer, and how to find out more. Raises DaemonUnreachable."""
        inference = self.client.status(1.0).inference
        if inference is None:
            raise DaemonUnreachable("the inference daemon does not answer", "start it with `honcho start`")
        target, draft = inference.models.target, inference.models.draft or "nothing"
        adapter = inference.adapter.active or "none"
        self.face.note(f"{target} drafted by {draft}, adapter {adapter}. /help lists commands, Ctrl-D leaves.")
        if self.face.show_draft:
            self.face.note(f"{click.style('drafted', fg='green')}, {click.style('repeated', fg='cyan')}, target's own")

    def run_terminal(self, source: Callable[[str], str]) -> None:
        """Until the end; Ctrl-C clears the line, or stops the answer."""
        while True:
            try:
                for message in chat_input.messages(source):
                    if self._leaves(message):
                        return
                return
            except KeyboardInterrupt:
                self.face.note("Ctrl-D or /quit leaves")

    def run(self, messages: Iterator[str]) -> None:
        """Every message there is. Raises the first error: nobody sits there to try again."""
        for message in messages:
            try:
                if not self._obeys(message):
                    return
            finally:
                sys.stdout.flush()

    def _leaves(self, message: str) -> bool:
        """Handle one message at a terminal, where errors are only told; True when it was the last."""
        try:
            return not self._obeys(message, stoppable=True)
        except SpecLoraError as error:
            self.face.trouble(error)
            return False

    def _obeys(self, message: str, stoppable: bool = False) -> bool:
        """One message or command; False when it says to leave."""
        text = message.strip()
        if not text:
            return True
        if text.startswith("/") and not text.startswith("//"):
            name, _, rest = text[1:].partition(" ")
            name = {"exit": "quit", "bye": "quit"}.get(name, name)
            if name not in self.commands:
                raise RequestRejected(
                    f"there is no command /{name}", "/help lists them; `//` begins a message with a slash"
                )
            try:
                self.commands[name](rest.strip())
            except _Leave:
                return False
            return True
        self.answer(text[1:] if text.startswith("//") else message.rstrip(), stoppable)
        return True

    # ------------------------------------------------------------------------------------------------ answering
    def answer(self, text: str, stoppable: bool = False) -> None:
        """Send the conversation with one more message and show what comes. Where `stoppable`, Ctrl-C ends only the answer."""
        talk = self.conversation
        talk.say(text)
        ask = self.client.request(talk.messages(), conversation_id=talk.id, **self.wish)
        parts: list[str] = []
        try:
            with closing(self.client.deltas(ask, self._place)) as deltas:
                for delta in deltas:
                    parts.append(delta.text)
                    self.face.piece(delta)
        except KeyboardInterrupt:
            talk.answer("".join(parts))
            if not stoppable:
                raise
            click.echo()
            self.face.note("stopped; what came stands in the conversation" if parts else "stopped")
            return
        except BaseException:
            talk.take_back()
            raise
        talk.answer("".join(parts))
        self._finish()

    def _finish(self) -> None:
        done = self.client.last
        self.conversation.totals.add(done)
        self._last = summary_line(done)
        if self.face.as_object:
            click.echo(json.dumps(as_json(done), ensure_ascii=False))
            return
        click.echo()
        if self.face.show_stats:
            if done.finish_reason == "length":
                self.face.note("cut off at the most tokens; --max-tokens allows more")
            reused = done.stats.reused_prompt_tokens
            self.face.note(f"{self._last} | {reused} of {done.stats.prompt_tokens} prompt tokens reused")

    def _place(self, place: int) -> None:
        self.face.note(f"waiting: {place} before you" if place else "waiting: next")

    # ------------------------------------------------------------------------------------------------ commands
    def _stats(self, rest: str) -> None:
        from specl.shared.status import system_status

        status = system_status(self.client)
        click.echo(f"last answer   {self._last or 'none yet'}")
        click.echo(f"conversation  {self.conversation.totals.line()}")
        rolling, speed = status.acceptance.rolling, status.tokens_per_second.rolling
        failures = status.failures
        click.echo(
            f"all           {status.store.generations} generations; of the last 50: acceptance "
            f"{'-' if rolling is None else f'{rolling:.2f}'}, {f'{speed:.1f} tok/s' if speed else '-'}; "
            f"{failures.pending} of {failures.trigger} failures until training"
        )
        training = status.training
        waits = f" (waits: {training.waits})" if training.waits else ""
        click.echo(f"training      {training.state}{waits}; adapter {status.adapter.active or 'none'}")
        for problem in status.problems:
            click.echo(f"problem       {problem}")

    def _train(self, rest: str) -> None:
        try:
            reply = self.client.train(now=True)
        except DaemonUnreachable:
            raise DaemonUnreachable("the trainer does not run", "start it with `honcho start`") from None
        click.echo(reply.message + ("; /stats shows how it goes, /eval what it brought" if reply.ok else ""))

    def _eval(self, rest: str) -> None:
        from specl.shared.status import system_status

        status = system_status(self.client)
        last = status.training.last_verdict
        if last is None:
            click.echo("nothing was trained yet; /train asks for a run")
        else:
            click.echo(f"last run      {last.verdict}: {last.reason} ({last.created})")
        for adapter, value in status.acceptance.by_adapter.items():
            click.echo(f"acceptance    adapter {adapter}: {'-' if value is None else f'{value:.3f}'} (live)")
        click.echo("`specl-ctl eval FILE` measures two adapters on the same prompts")

    def _adapters(self, rest: str) -> None:
        from specl.shared.adapters.registry import Adapters

        if rest:
            reply = self.client.set_adapter("" if rest == "none" else rest)
            if not reply.ok:
                raise SpecLoraError(reply.message)
            click.echo(reply.message)
            return
        known = Adapters(self.client.paths.adapters)
        inference = self.client.status().inference
        active = inference.adapter.active if inference else ""
        for id in known.ids():
            try:
                metrics = known.manifest(id).metrics
                before, after = (metrics.get(f"heldout_{when}", 0) for when in ("before", "after"))
                told = f"held-out agreement {before:.4f} -> {after:.4f}"
            except SpecLoraError as error:
                told = str(error)
            click.echo(f"{id}  {told}{'  (active)' if id == active else ''}")
        if not known.ids():
            click.echo("no adapters yet; /train makes one from what is stored")

    def _system(self, rest: str) -> None:
        if rest:
            self.conversation.system = "" if rest == "-" else rest
        click.echo(self.conversation.system or "no system message")

    def _draft(self, rest: str) -> None:
        self.face.show_draft = not self.face.show_draft
        self.face.note("drafted tokens are green, repeated ones cyan" if self.face.show_draft else "no colours")

    def _reset(self, rest: str) -> None:
        self.conversation.reset()
        self.face.note("forgotten; the system message stays" if self.conversation.system else "forgotten")

    def _save(self, rest: str) -> None:
        if not rest:
            raise RequestRejected("say where to: /save FILE")
        self.conversation.save(Path(rest))
        self.face.note(f"{len(self.conversation.turns)} messages written to {rest}")

    def _quit(self, rest: str) -> None:
        raise _Leave


class _Leave(Exception):
    """The user says goodbye."""
