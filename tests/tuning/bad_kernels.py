"""A kernel module whose candidates go wrong in every way, for the tests of the tuning job: top-k with a `fault`."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass

from dsa_tvm.schedules.cpu import topk
from tvm import tirx
from tvm.script import tirx as T

NONE, CRASH_COMPILING, HANG_COMPILING, REFUSED, WRONG, CRASH_RUNNING, HANG_RUNNING = range(7)


@dataclass(frozen=True)
class Decisions:
    """Those of top-k that matter here, and what goes wrong."""

    scan: int
    fault: int


DEFAULT = {target: Decisions(scan=64, fault=NONE) for target in topk.DEFAULT}


def choices(target):
    """A space in which most candidates are bad."""
    return {"scan": (64,), "fault": tuple(range(7))}


def tensor_ir(variant, c):
    """Top-k, or not."""
    if c.fault == CRASH_COMPILING:
        os.kill(os.getpid(), signal.SIGSEGV)
    if c.fault == HANG_COMPILING:
        time.sleep(3600)
    if c.fault == REFUSED:
        raise RuntimeError("no such kernel")
    if c.fault == NONE:
        return topk.tensor_ir(variant, topk.Decisions(slack=2048, scan=c.scan, sample=2048))
    return _broken(c.fault)


def _broken(fault):
    s_rows, s_kv, s_q, s_out, width = (tirx.Var(n, "int64") for n in ("s_rows", "s_kv", "s_q", "s_out", "topk"))
    far = 2**31 if fault == CRASH_RUNNING else 0
    stop = 1 if fault == HANG_RUNNING else 0

    @T.prim_func(s_tir=True)
    def broken(
        logits: T.handle,
        ks: T.handle,
        ke: T.handle,
        indices: T.handle,
        m0: T.int64,
        m1: T.int64,
        row0: T.int64,
        out0: T.int64,
    ):
        T.func_attr({"tirx.noalias": True})
        T.match_buffer(logits, (s_rows, s_kv), "float32", align=4)
        T.match_buffer(ks, (s_q,), "int32", align=4)
        T.match_buffer(ke, (s_q,), "int32", align=4)
        OUT = T.match_buffer(indices, (s_out, width), "int32", align=4)
        with T.sblock("task"):
            T.reads()
            T.writes()
            for j in T.serial(width):
                OUT[out0 + far, j] = T.Cast("int32", j)
            while OUT[out0, 0] < stop:
                OUT[out0, 0] = T.min(OUT[out0, 0], 0)

    return broken
