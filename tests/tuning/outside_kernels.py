"""A kernel module whose candidates meet their surroundings while they are compiled: top-k with an `accident`."""

from __future__ import annotations

import errno
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from dsa_tvm.schedules.cpu import topk

NONE, KILLED_ONCE, FULL_ONCE, ABORTED_ONCE, KILLED, NO_MEMORY = range(6)
ALWAYS = (KILLED, NO_MEMORY)


@dataclass(frozen=True)
class Decisions:
    """Those of top-k that matter here, and what happens."""

    scan: int
    accident: int


DEFAULT = {target: Decisions(scan=64, accident=NONE) for target in topk.DEFAULT}


def choices(target):
    """Nothing is wrong with any of them."""
    return {"scan": (64,), "accident": tuple(range(6))}


def tensor_ir(variant, c):
    """Top-k, unless the disk is full, memory runs out or somebody kills the worker."""
    first = not (mark := Path(os.environ["DSA_TVM_TEST_STATE"]) / str(c.accident)).exists()
    mark.touch()
    if c.accident == KILLED or (c.accident == KILLED_ONCE and first):
        os.kill(os.getpid(), signal.SIGKILL)
    if c.accident == FULL_ONCE and first:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if c.accident == ABORTED_ONCE and first:
        # As LLVM does it.
        print("LLVM ERROR: IO failure on output stream: No space left on device\nStack dump:", file=sys.stderr)
        os.abort()
    if c.accident == NO_MEMORY:
        raise MemoryError
    return topk.tensor_ir(variant, topk.Decisions(slack=2048, scan=c.scan, sample=2048))
