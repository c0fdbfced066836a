"""What every command takes: `--threads`, `--quiet`, `--verbose`, and options by older names."""

from __future__ import annotations

import logging

import click

from mpq import threads

RENAMED = {
    "analyze": {"--num-score": "--num-calib"},
    "rank": {"--num-val": "--num-test"},
    "export": {"--verify": "--num-test", "--num-verify": "--num-test"},
    "verify": {"--images": "--num-test", "--num-verify": "--num-test", "--quantized": "--from"},
    "bench": {"--limit": "--num-test"},
    "portability": {"--images": "--num-test"},
}
"""Options that were called otherwise in 0.1; they go in 0.3."""


def with_common(command: click.Command) -> click.Command:
    """A command with what every command takes; `--threads` only where it has none of its own."""
    known = {param.name for param in command.params}
    command.params += [option for option in _options() if option.name not in known]
    return command


def renamed(name: str, args: list[str]) -> list[str]:
    """The arguments of a command, options by the names that they have now."""
    names, found = RENAMED.get(name, {}), []
    for arg in args:
        option, equals, value = arg.partition("=")
        if option in names:
            click.echo(f"note: {option} is called {names[option]} now", err=True)
        found.append(f"{names.get(option, option)}{equals}{value}")
    return found


def listen(*, quiet: bool, verbose: bool) -> None:
    """Say everything on stderr, the usual, or nothing but errors."""
    from mpq.cli import terminal  # rich, which the list of commands need not wait for

    logging.basicConfig(format="%(message)s", handlers=[terminal.Notes()])
    terminal.stderr.quiet = quiet
    level = logging.ERROR if quiet else logging.INFO if verbose else logging.WARNING
    logging.getLogger("mpq").setLevel(level)


def _options() -> list[click.Option]:
    return [
        click.Option(
            ["--threads"],
            type=click.IntRange(min=1),
            metavar="N",
            expose_value=False,
            callback=_use_threads,
            help="Threads to compute with.  [all that this process may use]",
        ),
        click.Option(["-q", "--quiet"], is_flag=True, expose_value=False, callback=_listen,
                     help="Say nothing on stderr but errors."),
        click.Option(["-v", "--verbose"], is_flag=True, expose_value=False, callback=_listen,
                     help="Say on stderr what is being done."),
    ]  # fmt: skip


def _use_threads(ctx: click.Context, param: click.Parameter, value: int | None) -> None:
    if value is not None:
        threads.use(value)


def _listen(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        listen(quiet=param.name == "quiet", verbose=param.name == "verbose")
