"""Prepare standard output and error: make sure they are open, can write any name, and end without a traceback."""

from __future__ import annotations

import codecs
import io
import os
import sys

_ERRORS = "dsa_tvm.any_name"


def prepare() -> None:
    """Make the standard streams take whatever is printed.

    A closed stream is opened on ``/dev/null``. Otherwise the next file that is opened would get its number, and
    everything that is printed. A file name may be any bytes, whatever the encoding of standard output: such bytes are
    written unchanged, and a character that the encoding lacks is written as its code point.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # open takes the lowest free number, which is this one. Programs that are started inherit it.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    codecs.register_error(_ERRORS, _encoded)
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, for the rest of the process
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, for the rest of the process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ERRORS)


def finish() -> None:
    """Flush the buffers now. An error at exit could not be caught.

    Raises
    ------
    OSError
        Standard output cannot be written.
    """
    sys.stdout.flush()
    sys.stderr.flush()


def discard() -> None:
    """Throw away what is left in the buffers: the reader is gone, or the disk is full."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            try:
                os.dup2(null, stream.fileno())
            except (OSError, ValueError):  # not a file, or closed
                continue
    os.close(null)


def _encoded(error: UnicodeError) -> tuple[bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = b""
    for character in error.object[error.start : error.end]:
        try:
            found += character.encode(error.encoding, "surrogateescape")
        except UnicodeEncodeError:
            found += character.encode("ascii", "backslashreplace")
    return found, error.end
