"""Standard output and error as a command needs them: open, able to write any name, and closed without a traceback."""

from __future__ import annotations

import codecs
import io
import os
import sys

_ERRORS = "dsa_tvm.any_name"


def prepare() -> None:
    """Make the standard streams take whatever is printed.

    A closed one is opened on ``/dev/null``: otherwise the next file that is opened would get its number, and what is
    printed. File names are any bytes, and need not fit the encoding of standard output: the bytes of such a name are
    written as they are, and a character that the encoding lacks as its code point.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is taken, which is this one. Programs that are started have it, too.
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
    """Write what is left in the buffers, so that it does not fail at exit, where nobody can catch it.

    Raises
    ------
    OSError
        Standard output cannot be written.
    """
    sys.stdout.flush()
    sys.stderr.flush()


def discard() -> None:
    """Let what is left in the buffers go nowhere: whoever read it is gone, or the disk is full."""
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
