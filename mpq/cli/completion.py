"""`mpq completion`: completion of commands and options in a shell."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_MPQ_COMPLETE"


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print what makes SHELL complete commands and options of mpq.

    \b
    eval "$(mpq completion bash)"                      in ~/.bashrc
    eval "$(mpq completion zsh)"                       in ~/.zshrc
    mpq completion fish | source                       in config.fish
    """
    root = click.get_current_context().find_root().command
    made = get_completion_class(shell)
    assert made is not None
    click.echo(made(root, {}, "mpq", VARIABLE).source())
