"""The code blocks of a page, run as a reader would run them: in order, in one folder.

`make test-docs` and `benchmarks/record.py` share this. A block that has a title is a file of that
name; `sh` goes to bash and `python` to an interpreter, word for word. What costs a command its
first seconds is the import of torch and onnxruntime, so `mpq` and the interpreter are, inside
`quick`, a fork of a process that has them already: the same entry point, arguments, environment
and working directory.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

FENCE = re.compile(r'^```(\w*)(?: title="([^"]+)")?\n(.*?)^```', re.MULTILINE | re.DOTALL)
HEAVY = ("torch", "torch.onnx", "onnx", "onnxscript", "onnxruntime", "scipy.optimize", "pydantic",
         "matplotlib.figure", "sklearn.datasets", "accelerate", "PIL.Image", "jinja2", "rich.table",
         "mpq._torchvision", "mpq.pipeline", "mpq.api", "mpq.report.page")  # fmt: skip
"""What most commands import, `mpq.cli` excepted: its consoles look at the terminal once."""
CLIENT = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({place!r})
    socket.send_fds(server, [b"!"], [0, 1, 2])
    server.sendall(json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode())
    server.shutdown(socket.SHUT_WR)
    sys.exit(int(server.recv(16) or b"1"))
"""


class Block(NamedTuple):
    """A block of code in a page: its language, the file that it is, its text."""

    language: str
    title: str
    text: str

    @property
    def runs(self) -> bool:
        """Whether it is there to be run."""
        return self.language == "sh" or (self.language == "python" and not self.title)


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, from top to bottom."""
    return [Block(*found) for found in FENCE.findall(page.read_text(encoding="utf-8"))]


def run(
    block: Block,
    folder: Path,
    env: dict[str, str] | None = None,
    *,
    stdout: int | IO[str] = subprocess.PIPE,
    stderr: int | IO[str] = subprocess.PIPE,
) -> subprocess.CompletedProcess[str]:
    """Run a block in a folder, or write the file that it is."""
    if block.title:
        (folder / block.title).write_text(block.text, encoding="utf-8")
    if not block.runs:
        return subprocess.CompletedProcess([], 0, "", "")
    env = {**os.environ, **(env or {})}
    shell = block.language == "sh"
    python = env.get("MPQ_PYTHON", sys.executable)
    command = ["bash", "-euo", "pipefail", "-c"] if shell else [python, "-c"]
    return subprocess.run(
        [*command, block.text], cwd=folder, env=env, stdout=stdout, stderr=stderr, text=True,
        check=False,
    )  # fmt: skip


@contextmanager
def quick() -> Iterator[dict[str, str]]:
    """Variables of an environment in which `mpq` starts at once, for as long as this lasts."""
    with tempfile.TemporaryDirectory(prefix="mpq-quick-") as folder:
        place, client = str(Path(folder) / "socket"), Path(folder) / "mpq"
        client.write_text(CLIENT.format(python=sys.executable, place=place), encoding="utf-8")
        client.chmod(0o755)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(place)
            listener.listen()
            server = subprocess.Popen(
                [sys.executable, __file__, str(listener.fileno())], pass_fds=[listener.fileno()]
            )
            try:
                path = os.pathsep.join([folder, os.environ["PATH"]])
                yield {"PATH": path, "MPQ_PYTHON": str(client), "COLUMNS": "80"}
            finally:
                server.send_signal(signal.SIGKILL)
                server.wait()


def _serve(number: int) -> None:
    """Answer each connection with the exit code of a fork that did what it asked for."""
    for name in HEAVY:
        importlib.import_module(name)
    with socket.socket(fileno=number) as listener:
        while True:
            asked, _ = listener.accept()
            with asked:
                _, fds, _, _ = socket.recv_fds(asked, 1, 3)
                text = b"".join(iter(functools.partial(asked.recv, 65536), b""))
                child = os.fork() or _become(fds, *json.loads(text))
                for fd in fds:
                    os.close(fd)
                _, status = os.waitpid(child, 0)
                with suppress(OSError):
                    asked.sendall(str(os.waitstatus_to_exitcode(status)).encode())


def _become(fds: list[int], args: list[str], folder: str, env: dict[str, str]) -> int:
    """This process is now the one that the user started; never returns."""
    code = 1
    try:
        for own, given in enumerate(fds):
            os.dup2(given, own)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(env)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
        code = _python(args[1]) if args[0] == "-c" else _mpq(args)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(code)


def _mpq(args: list[str]) -> int:
    sys.argv = ["mpq", *args]
    return int(importlib.import_module("mpq.cli").main())


def _python(text: str) -> int:
    sys.argv, sys.path[0] = ["-c"], ""
    exec(compile(text, "<string>", "exec"), {"__name__": "__main__"})
    return 0


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
