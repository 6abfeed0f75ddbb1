"""A chat session: reads messages, has them answered, and runs the commands that begin with a slash.

Knows the client, the conversation and the view; nothing of terminals (`chat_input.py`) or of how
text is shown (`view.py`).
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import click

from specl.cli.ask import position_text, summary_line
from specl.cli.chat import chat_input
from specl.cli.chat.conversation import Conversation, totals_line
from specl.cli.chat.view import ChatView
from specl.cli.terminal import echo
from specl.shared.errors import DaemonUnreachable, RequestRejected, SpecLoraError
from specl.shared.messaging.client import Client

HELP = """\
/help            this list
/stats           the last answer, this conversation, and all of them
/train           train the draft on what is stored
/eval            what training has brought: held-out agreement, acceptance by adapter
/adapters [NAME] list them, or draft with one: an id, best, latest, previous, none
/system [TEXT]   show or set the system message; `/system -` removes it
/draft           switch the colours of drafted tokens on or off
/reset           forget this conversation
/save FILE       write the conversation: .json and .jsonl as messages, else Markdown
/quit            leave (also Ctrl-D)
Enter sends; Alt-Enter begins a new line, and so does a message between lines of \"\"\".
Ctrl-C stops an answer. A message that begins with a slash is typed with two."""
ALIASES = {"exit": "quit", "bye": "quit"}


class ChatSession:
    """One conversation from the first message to the last. `options` are those of every request
    (see Client.request).
    """

    def __init__(self, client: Client, conversation: Conversation, options: dict[str, Any], view: ChatView) -> None:
        self.client, self.conversation, self.options, self.view = client, conversation, options, view
        self._last = ""
        self.commands: dict[str, Callable[[str], None]] = {
            "help": lambda argument: echo(HELP),
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

    # ---------------------------------------------------------------------------------------- loops
    def show_welcome(self) -> None:
        """Which models answer, and how to find help. Raises DaemonUnreachable."""
        inference = self.client.status(1.0).inference
        if inference is None:
            raise DaemonUnreachable("the inference daemon does not answer", "start it with `honcho start`")
        target, draft = inference.models.target, inference.models.draft or "nothing"
        adapter = inference.adapter.active or "none"
        self.view.note(f"{target} drafted by {draft}, adapter {adapter}. /help lists commands, Ctrl-D leaves.")
        if self.view.show_draft:
            self.view.note(f"{click.style('drafted', fg='green')}, {click.style('repeated', fg='cyan')}, target's own")

    def run_terminal(self, lines: Callable[[str], str]) -> None:
        """Answer until the user leaves. Errors are shown and the chat goes on; Ctrl-C clears the
        line or stops the answer.
        """
        while True:
            try:
                for message in chat_input.messages(lines):
                    if not self._handle_or_warn(message):
                        return
                return
            except KeyboardInterrupt:
                self.view.note("Ctrl-D or /quit leaves")

    def run(self, messages: Iterator[str]) -> None:
        """Answer all messages. Raises the first error, because nobody is there to try again."""
        for message in messages:
            try:
                if not self._handle(message):
                    return
            finally:
                sys.stdout.flush()

    def _handle_or_warn(self, message: str) -> bool:
        try:
            return self._handle(message, stoppable=True)
        except SpecLoraError as error:
            self.view.warn(error)
            return True

    def _handle(self, message: str, stoppable: bool = False) -> bool:
        """Answer one message or run one command; False if it ends the chat."""
        text = message.strip()
        if not text:
            return True
        if text.startswith("/") and not text.startswith("//"):
            return self._run_command(text)
        self.answer(text[1:] if text.startswith("//") else message.rstrip(), stoppable)
        return True

    def _run_command(self, text: str) -> bool:
        name, _, argument = text[1:].partition(" ")
        name = ALIASES.get(name, name)
        if name not in self.commands:
            raise RequestRejected(
                f"there is no command /{name}", "/help lists them; `//` begins a message with a slash"
            )
        try:
            self.commands[name](argument.strip())
        except _Quit:
            return False
        return True

    # -------------------------------------------------------------------------------------- answers
    def answer(self, text: str, stoppable: bool = False) -> None:
        """Send the conversation with one more message and show the answer. If `stoppable`, Ctrl-C
        ends only the answer.
        """
        conversation = self.conversation
        conversation.add_question(text)
        ask = self.client.request(conversation.messages(), conversation_id=conversation.id, **self.options)
        parts: list[str] = []
        try:
            with closing(self.client.deltas(ask, self._show_position)) as deltas:
                for delta in deltas:
                    parts.append(delta.text)
                    self.view.delta(delta)
        except KeyboardInterrupt:
            conversation.add_answer("".join(parts))
            if not stoppable:
                raise
            click.echo()
            self.view.note("stopped; the conversation keeps the text so far" if parts else "stopped")
            return
        except BaseException:
            conversation.remove_question()
            raise
        conversation.add_answer("".join(parts))
        self._finish()

    def _finish(self) -> None:
        done = self.client.last
        assert done is not None  # a stream that ends has set it
        self.conversation.totals.add(done.tokens, done.stats)
        self._last = summary_line(done)
        self.view.answer_end(done, self._last)

    def _show_position(self, position: int) -> None:
        self.view.note(position_text(position))

    # ------------------------------------------------------------------------------------- commands
    def _stats(self, argument: str) -> None:
        from specl.shared.status import system_status

        status = system_status(self.client)
        echo(f"last answer   {self._last or 'none yet'}")
        echo(f"conversation  {totals_line(self.conversation.totals)}")
        rolling, speed = status.acceptance.rolling, status.tokens_per_second.rolling
        failures = status.failures
        click.echo(
            f"all           {status.store.generations} generations; of the last 50: acceptance "
            f"{'-' if rolling is None else f'{rolling:.2f}'}, {f'{speed:.1f} tok/s' if speed else '-'}; "
            f"{failures.pending} of {failures.trigger} failures until training"
        )
        training = status.training
        waits = f" (waits: {training.waits})" if training.waits else ""
        echo(f"training      {training.state}{waits}; adapter {status.adapter.active or 'none'}")
        for problem in status.problems:
            echo(f"problem       {problem}")

    def _train(self, argument: str) -> None:
        try:
            reply = self.client.train(now=True)
        except DaemonUnreachable:
            raise DaemonUnreachable("the trainer does not run", "start it with `honcho start`") from None
        echo(reply.message + ("; /stats shows how it goes, /eval what it brought" if reply.ok else ""))

    def _eval(self, argument: str) -> None:
        from specl.shared.status import system_status

        status = system_status(self.client)
        last = status.training.last_verdict
        if last is None:
            echo("nothing was trained yet; /train asks for a run")
        else:
            echo(f"last run      {last.verdict}: {last.reason} ({last.created})")
        for adapter, value in status.acceptance.by_adapter.items():
            echo(f"acceptance    adapter {adapter}: {'-' if value is None else f'{value:.3f}'} (live)")
        echo("`specl-ctl eval FILE` measures two adapters on the same prompts")

    def _adapters(self, argument: str) -> None:
        from specl.shared.adapters.registry import Adapters

        if argument:
            reply = self.client.set_adapter("" if argument == "none" else argument)
            if not reply.ok:
                raise SpecLoraError(reply.message)
            echo(reply.message)
            return
        adapters = Adapters(self.client.paths.adapters)
        inference = self.client.status().inference
        active = inference.adapter.active if inference else ""
        for id in adapters.ids():
            try:
                metrics = adapters.manifest(id).metrics
                before, after = (metrics.get(f"heldout_{when}", 0) for when in ("before", "after"))
                text = f"held-out agreement {before:.4f} -> {after:.4f}"
            except SpecLoraError as error:
                text = str(error)
            echo(f"{id}  {text}{'  (active)' if id == active else ''}")
        if not adapters.ids():
            echo("no adapters yet; /train makes one from what is stored")

    def _system(self, argument: str) -> None:
        if argument:
            self.conversation.system = "" if argument == "-" else argument
        echo(self.conversation.system or "no system message")

    def _draft(self, argument: str) -> None:
        self.view.show_draft = not self.view.show_draft
        self.view.note("drafted tokens are green, repeated ones cyan" if self.view.show_draft else "no colours")

    def _reset(self, argument: str) -> None:
        self.conversation.reset()
        self.view.note("forgotten; the system message stays" if self.conversation.system else "forgotten")

    def _save(self, argument: str) -> None:
        if not argument:
            raise RequestRejected("name a file: /save FILE")
        self.conversation.save(Path(argument))
        self.view.note(f"{len(self.conversation.turns)} messages written to {argument}")

    def _quit(self, argument: str) -> None:
        raise _Quit


class _Quit(Exception):
    """The user ends the chat."""
