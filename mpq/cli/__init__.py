"""The command line: a table of commands, loaded when called, and what a failure looks like.

A command is one file with one click command and no logic. `mpq --help` imports none of them.
"""

from __future__ import annotations

import gc
import importlib
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from typing import NamedTuple

import click
from click.shell_completion import CompletionItem

from mpq import __version__, interrupts, threads
from mpq.allocator import keep_freed
from mpq.cli.everywhere import listen, renamed, with_common
from mpq.errors import MpqError, UsageError, folded, nearest, printable
from mpq.limits import limited, set_limit
from mpq.userimport import trusting


class Entry(NamedTuple):
    """Where a command lies (`module:name`) and its line in the list of commands."""

    where: str
    help: str


COMMANDS = {
    "demo": Entry("mpq.cli.demo:demo", "The whole pipeline on embedded data, in 2 to 3 minutes."),
    "train": Entry("mpq.cli.train:train", "Train a float model: baseline, teacher or student."),
    "ensemble": Entry("mpq.cli.ensemble:ensemble", "Bundle teachers, measured together."),
    "rank": Entry("mpq.cli.rank:command", "Which networks take low precision well."),
    "profile": Entry("mpq.cli.profile:profile", "Measure each layer's latency on this CPU."),
    "analyze": Entry("mpq.cli.analyze:analyze", "Find each layer's bits; write policy.yaml."),
    "diff": Entry("mpq.cli.diff:diff", "What two policies differ in, layer by layer."),
    "ptq": Entry("mpq.cli.ptq:ptq", "Quantize by a policy, without training."),
    "qat": Entry("mpq.cli.qat:qat", "Quantize by a policy, with training and teachers."),
    "export": Entry("mpq.cli.export:export", "Write the ONNX file, verified and certified."),
    "verify": Entry("mpq.cli.verify:verify", "Does a file answer as promised, to the bit?"),
    "certify": Entry("mpq.cli.certify:certify", "What onnxruntime makes of any ONNX file."),
    "portability": Entry(
        "mpq.cli.portability:portability", "One file in every runtime that this computer has."
    ),
    "bench": Entry("mpq.cli.bench:bench", "Accuracy, latency and size of files, side by side."),
    "diagnose": Entry("mpq.cli.diagnose:diagnose", "What is wrong, why, and what to try."),
    "targets": Entry("mpq.cli.targets:targets", "Where a file can be made to run, and how."),
    "schema": Entry("mpq.cli.schema:schema", "The JSON schema of policy.yaml, for editors."),
    "completion": Entry("mpq.cli.completion:completion", "Completion for bash, zsh and fish."),
    "doctor": Entry("mpq.cli.doctor:doctor", "What this computer has, runs, and lacks."),
    "cache": Entry("mpq.cli.cache:cache", "What is kept for the next time; --clear removes it."),
    "report": Entry("mpq.cli.report:report", "One self-contained HTML page of a run."),
}


RESUMABLE = ("train", "rank", "ptq", "qat")
"""Commands that take `--resume`."""


class LazyGroup(click.Group):
    """A click group over `COMMANDS`: help comes from the table, a command is imported on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the table, which is the order of use."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command; None for an unknown name."""
        return with_common(load_command(cmd_name)) if cmd_name in COMMANDS else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's, with the nearest names for one that is unknown."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"no command {args[0]!r}{nearest(args[0], COMMANDS)}")
        name, command, rest = super().resolve_command(ctx, args)
        return name, command, renamed(name or "", rest)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Names of commands from the table: none is imported to complete its name."""
        if incomplete.startswith("-"):
            return super().shell_complete(ctx, incomplete)
        return [
            CompletionItem(name, help=entry.help)
            for name, entry in COMMANDS.items()
            if name.startswith(incomplete)
        ]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, from the table alone."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in COMMANDS.items()])


def load_command(name: str) -> click.Command:
    """Import the command of that name.

    Raises:
        UsageError: it needs a package that is not installed.
    """
    module, _, attribute = COMMANDS[name].where.partition(":")
    try:
        command: click.Command = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "mpq" and error.name != module:
            raise  # a mistake of ours, worth its traceback
        raise UsageError(f"mpq {name} needs {error.name}, which is not installed.") from error
    return command


@click.group(
    cls=LazyGroup,
    epilog="Exit codes: 0 done; 1 with diff --exit-code, the policies differ; 2 a mistake that "
    "one message explains; 130 stopped by Ctrl-C, 143 by SIGTERM.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
)
@click.option("-q", "--quiet", is_flag=True, help="Say nothing on stderr but errors.")
@click.option("-v", "--verbose", is_flag=True, help="Say on stderr what is being done.")
@click.option("--limit", "limits", multiple=True, metavar="NAME=VALUE",
              help="Change a limit on what is read, as messages name it; repeatable.")  # fmt: skip
@click.version_option(__version__, message="mpq %(version)s")
def cli(quiet: bool, verbose: bool, limits: tuple[str, ...]) -> None:
    """Mixed-precision quantization of PyTorch vision models, down to one ONNX file.

    \b
    mpq demo                                 see the whole pipeline
    mpq analyze model.pth                    which layer gets how many bits
    mpq qat --policy p.yaml --teacher t.pth  retrain at those bits
    mpq export                               the file, and the proof of it
    """
    for limit in limits:
        set_limit(limit)
    listen(quiet=quiet, verbose=verbose)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return the exit code.

    0: done. 2: a mistake that the user can mend, explained in one message on stderr. 130: stopped
    by Ctrl-C; 143: by SIGTERM. Whatever else goes wrong is a defect and keeps its traceback.
    """
    threads.settle()
    keep_freed()
    gc.set_threshold(50_000)  # after 700 new objects, an export is searched for garbage 1,700 times
    with interrupts.watching(), trusting(), limited():
        try:
            return _run(argv)
        except (Exception, KeyboardInterrupt) as error:
            # After a signal, whatever was raised came of it.
            if interrupts.seen() is None and not isinstance(error, KeyboardInterrupt):
                raise
            return _stopped(argv)


def _run(argv: Sequence[str] | None) -> int:
    try:
        code = cli.main(args=argv, prog_name="mpq", standalone_mode=False)
        sys.stdout.flush()
        interrupts.check()
        return code if isinstance(code, int) else 0
    except click.Abort:
        return _stopped(argv)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except click.ClickException as error:
        return _fail(_usage(error))
    except MpqError as error:
        interrupts.check()
        return _fail(str(error))
    except BrokenPipeError:
        # The reader has gone (`| head`). Python would complain while it flushes on exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        interrupts.check()
        return _fail(_explain(error))


def _usage(error: click.ClickException) -> str:
    """What is wrong with the command line, and where to read what is right."""
    message = error.format_message()
    context = getattr(error, "ctx", None)
    if context is None:
        return message
    stop = "" if message.endswith((".", "?")) else "."
    return f"{message}{stop} See `{context.command_path} --help`."


def _stopped(argv: Sequence[str] | None) -> int:
    """Say that the command was stopped, and give the exit code that shells give."""
    argv = sys.argv[1:] if argv is None else argv
    name = next((arg for arg in argv if arg in COMMANDS), "")
    number = interrupts.seen() or signal.SIGINT
    how = "interrupted" if number == signal.SIGINT else "terminated"
    more = f". mpq {name} ... --resume goes on from what was saved, or starts if nothing was"
    _tell(f"{how}; no file is half-written{more if name in RESUMABLE else ''}")
    return 128 + number


def _explain(error: OSError) -> str:
    """A message for what the system refuses: what, where, why."""
    reason = error.strerror or str(error) or type(error).__name__
    return f"{error.filename}: {reason}" if error.filename else reason


def _fail(message: str) -> int:
    _tell(f"error: {message}")
    return 2


def _tell(message: str) -> None:
    """A message on stderr, on a terminal broken between words where that ends."""
    message = printable(message)
    if sys.stderr.isatty():
        message = folded(message, shutil.get_terminal_size().columns)
    click.echo(message, err=True)
