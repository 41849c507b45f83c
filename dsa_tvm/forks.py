"""Whether this process was forked from one that had imported this package.

What the parent loaded of OpenMP may have threads that the child has not, and waits for them for ever. The library sees
a fork only if it was loaded before.
"""

from __future__ import annotations

import os

_in_child = False


def _note() -> None:
    global _in_child
    _in_child = True


os.register_at_fork(after_in_child=_note)


def in_child() -> bool:
    """Whether it was: calls compute on the calling thread alone then."""
    return _in_child
