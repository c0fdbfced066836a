"""Network architectures by name, and the name of an architecture from its weights."""

from mpq.zoo.builder import build, input_size, names
from mpq.zoo.detection import detect, recognize
from mpq.zoo.fitting import Recognized

__all__ = ["Recognized", "build", "detect", "input_size", "names", "recognize"]
