"""CUDA kernels whose candidates go wrong in every way: top-k by one thread of each block, with a `fault`."""

from __future__ import annotations

import functools
import os
import signal
import time
from dataclasses import dataclass

from dsa_tvm.schedules.cuda.topk.keys import key_of
from tvm.script import tirx as T

from dsa_tvm.build.cuda import kernels as cuda_kernels

NONE, CRASH_COMPILING, HANG_COMPILING, REFUSED, WRONG, CRASH_RUNNING, HANG_RUNNING, OVERRUN = range(8)


@dataclass(frozen=True)
class Decisions:
    """Threads of a block, and what goes wrong."""

    threads: int
    fault: int


DEFAULT = Decisions(threads=32, fault=NONE)


def choices(target):
    """A space in which most candidates are bad."""
    return {"threads": (32,), "fault": tuple(range(8))}


def tensor_ir(c):
    """Top-k, or not; parameters and grid are those of schedules.cuda.topk."""
    if c.fault == CRASH_COMPILING:
        os.kill(os.getpid(), signal.SIGSEGV)
    if c.fault == HANG_COMPILING:
        time.sleep(3600)
    if c.fault == REFUSED:
        raise RuntimeError("no such kernel")
    THREADS, FAULT = c.threads, c.fault

    @T.prim_func(s_tir=True)
    def select(
        logits: T.handle("float32"),
        ks: T.handle("int32"),
        ke: T.handle("int32"),
        positions: T.handle("int32"),
        values: T.handle("float32"),
        indices: T.handle("int32"),
        s_kv: T.int64,
        topk: T.int64,
        capacity: T.int32,
        rows: T.int64,
        parts: T.int64,
    ):
        row = T.launch_thread("blockIdx.x", rows)
        tx = T.launch_thread("threadIdx.x", THREADS)
        X = T.decl_buffer((rows, s_kv), "float32", data=logits)
        KS = T.decl_buffer((rows,), "int32", data=ks)
        KE = T.decl_buffer((rows,), "int32", data=ke)
        OUT = T.decl_buffer((rows * topk,), "int32", data=indices)
        bound = T.local_scalar("uint32")
        count = T.local_scalar("int64")
        place = T.local_scalar("int64")
        if tx == 0:
            start: T.let = T.max(T.Cast("int64", KS[row]), T.int64(0))
            length: T.let = T.max(T.min(T.Cast("int64", KE[row]), s_kv) - start, T.int64(0))
            # The largest bound that topk keys reach, bit by bit; 0 where there are not as many.
            bound = T.uint32(0)
            for b in T.serial(32):
                tried: T.let = bound | (T.uint32(1) << T.Cast("uint32", 31 - b))
                count = T.int64(0)
                for j in T.serial(length):
                    if key_of(T.reinterpret("uint32", X[row, start + j])) >= tried:
                        count = count + T.int64(1)
                if count >= topk:
                    bound = tried
            count = T.int64(0)
            for j in T.serial(length):
                if key_of(T.reinterpret("uint32", X[row, start + j])) > bound:
                    count = count + T.int64(1)
            place = T.int64(0)
            for j in T.serial(length):
                key: T.let = key_of(T.reinterpret("uint32", X[row, start + j]))
                if key > bound or (bound > T.uint32(0) and key == bound and count < topk):
                    OUT[row * topk + place] = T.Cast("int32", start + j)
                    place = place + T.int64(1)
                if bound > T.uint32(0) and key == bound and count < topk:
                    count = count + T.int64(1)
            for j in T.serial(topk - place):
                OUT[row * topk + place + j] = -1
            if FAULT == WRONG:
                OUT[row * topk] = 0
                OUT[row * topk + 1] = 1
            if FAULT == CRASH_RUNNING:
                OUT[T.int64(1) << 40] = 0
            if FAULT == OVERRUN:
                OUT[rows * topk] = 0
            if FAULT == HANG_RUNNING:
                while OUT[row * topk] < 2**30:
                    OUT[row * topk] = T.min(OUT[row * topk], 0)

    return select


def _topk(arch, dims, chosen):
    c = chosen("rows", {}, {}, DEFAULT)
    facts = {"list_factor": 1, "list_min": 4, "list_max": 4096, "selector_bytes": 0}
    for stage in ("rows", "parts", "merge"):
        yield cuda_kernels.Kernel(stage, c, functools.partial(tensor_ir, c), 8 * 4096, facts)


OPERATORS = {**cuda_kernels.OPERATORS, "topk": _topk}
