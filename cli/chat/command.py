"""`specl-ctl chat`: several turns. All messages are sent each time; the daemon reuses what it has
read before.
"""

from typing import Any

import click

from specl.cli.chat import chat_input
from specl.cli.chat.conversation import Conversation
from specl.cli.chat.session import ChatSession
from specl.cli.chat.view import ChatView
from specl.cli.files.text import STDIN, read_lines
from specl.cli.options import sampling_options
from specl.shared.messaging.client import Client


@click.command()
@click.option("--system", default="", help="A system message.")
@sampling_options()
@click.option(
    "--show-draft", is_flag=True, help="Colour drafted tokens: green by the draft model, cyan from repeats of the text."
)
@click.option("--no-record", is_flag=True, help="Record nothing of this conversation, and keep no history of messages.")
@click.option("--no-stats", is_flag=True, help="No line of statistics after each answer.")
@click.option("--json", "as_object", is_flag=True, help="One JSON object an answer instead of streaming text.")
def chat(system: str, show_draft: bool, no_record: bool, no_stats: bool, as_object: bool, **options: Any) -> None:
    """Chat with the model, turn by turn. /help lists what can be typed.

    Without a terminal every line of standard input is a message:

    \b
    printf 'My name is Ada.\\nWhat is my name?\\n' | specl-ctl chat --temperature 0
    """
    with Client() as client:
        view = ChatView(show_draft, not no_stats, as_object)
        session = ChatSession(client, Conversation(system), options | {"record": not no_record}, view)
        if chat_input.is_interactive():
            session.show_welcome()
            commands = [f"/{name}" for name in session.commands]
            session.run_terminal(
                chat_input.from_terminal(client.paths, client.settings.records, not no_record, commands)
            )
        else:
            session.run(chat_input.messages(chat_input.from_pipe(line for _, line in read_lines(STDIN))))
