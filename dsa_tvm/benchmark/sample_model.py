"""The model that is shipped, run in ONNX Runtime with the library and without it, and its tokens checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..models import sample
from ..terminal.text import digits, duration
from .check import CheckError

if TYPE_CHECKING:
    from ..models.onnx import Timing

#: Tokens of the prompt at a time. Standard operators gather the selected rows of all of them: 40 MB for as many.
_CHUNK = 64


@dataclass(frozen=True)
class Run:
    """What the model took, with right tokens.

    Parameters
    ----------
    ours, plain : Timing
        With the library, and with the bodies of standard operators.
    expected : Expected
    """

    ours: Timing
    plain: Timing
    expected: sample.Expected

    def cells(self) -> list[list[str]]:
        """Rows of a table: phase, tokens, time, tokens a second, and how much longer it takes without the library."""
        rows = []
        for phase in ("prefill", "decode"):
            tokens, ours, plain = (
                getattr(self.ours, f"{phase}_tokens"),
                *(getattr(timing, f"{phase}_seconds") for timing in (self.ours, self.plain)),
            )
            rows.append([phase, str(tokens), duration(ours), digits(tokens / ours), f"{digits(plain / ours)}x"])
        return rows


def run(threads: int, step: Callable[[str], None]) -> Run:
    """Generate with and without the library; the tokens have to be those of Transformers.

    Parameters
    ----------
    threads : int
        Of ONNX Runtime and the library; 0 for all.
    step : callable
        Told what comes next.

    Raises
    ------
    CheckError
        Other tokens.
    ModelError, OSError
        The model cannot be unpacked or loaded.
    """
    from ..models.onnx import Generator

    expected, prompt = sample.expected(), sample.prompt()
    timings = []
    with sample.directory() as directory:
        for library, means in ((True, "with the library"), (False, "with standard operators")):
            step(f"the sample model writes {len(expected.tokens)} tokens {means}")
            generator = Generator(directory, library=library, threads=threads)
            (tokens,) = generator.generate([prompt], len(expected.tokens), chunk=_CHUNK)
            if tuple(tokens) != expected.tokens:
                theirs = f"the tokens of {expected.made_by}, {list(expected.tokens)}"
                raise CheckError(f"sample model {means}: expected {theirs}, got {tokens}")
            timings.append(generator.timing)
    ours, plain = timings
    return Run(ours, plain, expected)
