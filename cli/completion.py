"""`specl-ctl completion`: a script with which a shell completes commands and options."""

import click

SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print the completion script for SHELL.

    \b
    bash   in ~/.bashrc:                  eval "$(specl-ctl completion bash)"
    zsh    in ~/.zshrc, after compinit:   eval "$(specl-ctl completion zsh)"
    fish   once:                          specl-ctl completion fish > ~/.config/fish/completions/specl-ctl.fish
    """
    from click.shell_completion import get_completion_class

    from specl.cli.main import cli

    completer = get_completion_class(shell)
    assert completer is not None  # click knows all of SHELLS
    click.echo(completer(cli, {}, "specl-ctl", "_SPECL_CTL_COMPLETE").source())
