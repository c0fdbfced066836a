"""Say what cannot be captured in the user's own words: file, line, condition, remedy."""

from __future__ import annotations

import linecache
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

_MACHINERY = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
VALUE = (
    "Replace a branch on values by torch.where, or move it into a submodule of its own (it is then "
    "kept as it is, with its Conv and Linear layers quantized)."
)
SECOND_NAME = "Give the result of the step that overwrites it a name of its own."


@dataclass(frozen=True, slots=True)
class Place:
    """A line of the user's code."""

    file: str
    line: int

    def __str__(self) -> str:
        text = linecache.getline(self.file, self.line).strip()
        return f"{self.file}:{self.line}: `{text}`" if text else f"{self.file}:{self.line}"


class Refused(Exception):
    """Recording met something that one run cannot show.

    Args:
        why: the condition, with its place.
        remedy: what to write instead.
        module: path of the innermost module whose forward was running; empty for the network's own.
    """

    def __init__(self, why: str, remedy: str = "", module: str = "") -> None:
        super().__init__(why)
        self.why, self.remedy, self.module = why, remedy, module


def here() -> Place:
    """The innermost line that is neither torch's nor this package's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_MACHINERY):
        frame = frame.f_back
    return Place("?", 0) if frame is None else Place(frame.f_code.co_filename, frame.f_lineno)


def raised_at(error: BaseException) -> Place:
    """The innermost line of the user's code in a traceback."""
    place, step = Place("?", 0), error.__traceback__
    while step is not None:
        file = step.tb_frame.f_code.co_filename
        if not file.startswith(_MACHINERY):
            place = Place(file, step.tb_lineno)
        step = step.tb_next
    return place
