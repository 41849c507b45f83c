"""Tuning records for tests, and processes that die while they write them."""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Callable
from typing import Any

from dsa_tvm.records import Record, spec_hash

LENGTHS = {"h_idx": 64, "d_idx": 128, "topk": 2048, "h_q": 128, "d_qk": 576, "d_v": 512, "d_packed": 656}
_OWN = {
    "lightning_indexer": (("float32", "float32"), ("h_idx", "d_idx")),
    "topk": ((), ("topk",)),
    "sparse_mla": (("float32",), ("h_q", "d_qk", "topk", "d_v")),
    "sparse_mla_fp8": (("bfloat16",), ("h_q", "d_qk", "d_packed", "topk", "d_v")),
}


def make(op: str = "topk", bucket=(1, 4096), speedups=(1.25, 1.25), **changes: Any) -> Record:
    """A record whose candidate is `speedups` times as fast as DEFAULT with 1, 2, ... threads."""
    types, own = _OWN[op]
    default = {n: (2e-3 / n, 2.5e-3 / n, 3e-3 / n) for n in range(1, len(speedups) + 1)}
    fields: dict[str, Any] = {
        "kind": "trial",
        "op": op,
        "spec": spec_hash(op),
        "types": types,
        "target": "x86-64-v4",
        "shape": {"s_q": bucket[0], "s_kv": bucket[1]} | {name: LENGTHS[name] for name in own},
        "decisions": {"slack": 2048, "scan": 64},
        "seconds": {n: tuple(t / speedups[n - 1] for t in times) for n, times in default.items()},
        "default_seconds": default,
        "roof": {n: 1e-4 / n for n in default},
        "error": None,
        "machine": "Xeon \xae, 2 CPUs",
        "versions": {"dsa_tvm": "0.1.0", "tvm": "0.27.0"},
        "date": "2026-11-23T10:00:00Z",
    }
    return Record(**fields | changes)


def number(n: int) -> Record:
    """One of many records that differ."""
    return make(decisions={"slack": n, "scan": 64})


_CALLS = [(os, name) for name in ("mkdir", "open", "pread", "write", "fsync", "chmod", "replace", "close")]
_CALLS.append((fcntl, "flock"))


def start(work: Callable[[], Any]) -> int:
    """Run `work` in a process of its own; its id. It ends with status 1 where `work` raises."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    finally:
        os._exit(status)


def finish(child: int) -> bool:
    """Wait for a process; whether it was killed. Any other failure is an AssertionError."""
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert killed or status == 0
    return killed


def killed_before_call(index: int, work: Callable[[], Any], torn: bool = False) -> bool:
    """Run `work` in a process that kills itself instead of its system call number `index`; whether it came to that.

    With `torn`, the first half of the bytes is written when that call is a write.
    """
    calls = 0

    def dying(call):
        def wrapped(*arguments, **named):
            nonlocal calls
            if calls == index:
                if torn and call.__name__ == "write":
                    call(arguments[0], arguments[1][: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            calls += 1
            return call(*arguments, **named)

        return wrapped

    def doomed():
        for module, name in _CALLS:
            setattr(module, name, dying(getattr(module, name)))
        work()

    return finish(start(doomed))
