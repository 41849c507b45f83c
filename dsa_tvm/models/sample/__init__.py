"""A small model of the DeepSeek-V3.2 family, exported, with the tokens that Transformers makes of its prompt.

It is shipped so that the demo needs neither torch nor Transformers: to export it takes both, several GB and a minute.
Its weights are seeded and not trained. They are rounded to bfloat16, as models of this family are published, so that
``model.zip`` stays below a megabyte. In a checkout, ``python -P -m dsa_tvm.models.sample.make dsa_tvm/models/sample``
makes the files again; -P takes the installed package, which has the library.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ...runtime.files import scratch

_HERE = Path(__file__).parent
PROMPT, MODEL, EXPECTED = (_HERE / name for name in ("prompt.txt", "model.zip", "expected.json"))


@dataclass(frozen=True)
class Expected:
    """What Transformers made of the prompt, greedily, with its eager attention.

    Parameters
    ----------
    seed : int
        Of the weights.
    tokens : tuple of int
        The new tokens.
    made_by : str
        Version of Transformers.
    margin : float
        The least distance, over all steps, between the largest logit and the next.
    error : float
        The largest difference between any logit and the same with the attention of this package, when it was made.
    """

    seed: int
    tokens: tuple[int, ...]
    made_by: str
    margin: float
    error: float


def prompt() -> list[int]:
    """The tokens of the prompt, which are the bytes of its text."""
    return list(PROMPT.read_bytes())


def expected() -> Expected:
    """The tokens that a right program makes of `prompt`."""
    found = json.loads(EXPECTED.read_text(encoding="utf-8"))
    return Expected(**found | {"tokens": tuple(found["tokens"])})


@contextmanager
def directory() -> Iterator[Path]:
    """The exported model, unpacked into a directory that is removed afterwards.

    Yields
    ------
    path : Path
        As `dsa_tvm.models.onnx.Generator` takes it.

    Raises
    ------
    OSError
        There is no room for 5 MB of files.
    """
    with scratch() as path, zipfile.ZipFile(MODEL) as files:
        files.extractall(path)
        yield path
