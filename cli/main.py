"""`specl-ctl`: the command line. Each command's module is imported when it is used, so that
`status` never waits for MLX.

Knows the commands by name, and how errors are printed; nothing of what a command does.
"""

import importlib
import sys
from typing import Any, cast

import click

from specl.cli.options import no_colour
from specl.cli.terminal import echo, tolerate_letters
from specl.shared.errors import SpecLoraError

# command -> (module in specl.cli, attribute, one line for the list)
COMMANDS = {
    "ask": ("ask", "ask", "Ask the model; the answer streams as it is generated."),
    "chat": ("chat.command", "chat", "Chat with the model, turn by turn."),
    "status": ("status", "status", "Daemons, acceptance, failures, training, problems."),
    "collect": ("collect", "collect", "Answer a file of prompts, so that there is something to learn from."),
    "eval": ("eval", "evaluate", "Compare two adapters on a file of prompts: acceptance, agreement, speed."),
    "train": ("train", "train", "Ask the trainer for a run."),
    "adapters": ("adapters.command", "adapters", "List, show, activate, roll back and unload adapters."),
    "store": ("store.command", "store", "Query stored answers; export, import and purge."),
    "demo": ("bench.demo", "demo", "The whole loop in one unattended command, in a scratch run directory."),
    "bench": ("bench.command", "bench", "Measure speed and equality against mlx-lm, interleaved in one run."),
    "draft": ("draft.command", "draft", "Build a draft model out of the target."),
    "models": ("models", "models", "Which models are used and where they are; import GGUF files."),
    "keys": ("keys", "keys", "Keys for clients on other machines."),
    "service": ("service", "service", "Units for systemd and launchd that keep the daemons running."),
    "completion": ("completion", "completion", "Completion for bash, zsh and fish."),
    "doctor": ("doctor", "doctor", "Check this machine and say what to do."),
}


class _LazyGroup(click.Group):
    """The group of all commands; the table above stands for those that are not imported yet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[name]
        return cast(click.Command, getattr(importlib.import_module(f"specl.cli.{module}"), attribute))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Any]:
        """Names and lines from the table, because completing must not import every command."""
        from click.shell_completion import CompletionItem

        items = [CompletionItem(n, help=line) for n, (_, _, line) in COMMANDS.items() if n.startswith(incomplete)]
        return items or super().shell_complete(ctx, incomplete)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, _, line) in COMMANDS.items()])


def _print_version(ctx: click.Context, option: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from specl.cli.version import lines

        click.echo("\n".join(lines()))
        ctx.exit()


@click.command(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Version, commit, libraries.",
)
def cli() -> None:
    """A local model server that gets faster the more it is used and never changes a word of what it
    says.

    Start the daemons with `honcho start`, then `specl-ctl ask "..."`. The run directory is
    SPECL_VAR (default: var/ of the checkout, else ~/.local/share/speclora), the settings file
    SPECL_CONFIG. Exit codes: 0 done, 1 the work failed, 2 bad usage or settings, 3 a daemon is not
    reachable.
    """


def main(arguments: list[str] | None = None) -> Any:
    """Run a command. An error of the user's is one line on stderr; any other is a bug and shows its
    traceback.
    """
    tolerate_letters()
    try:
        return cli(args=arguments, prog_name="specl-ctl", standalone_mode=False, color=False if no_colour() else None)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2 if isinstance(error, click.UsageError) else 1)
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped", err=True)
        sys.exit(130)
    except SpecLoraError as error:
        for line in str(error).split("\n"):
            echo(f"specl-ctl: {line}", err=True)
        if error.hint:
            echo(f"  {error.hint}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)
