"""A stand-in for a GPU with tensors on the CPU and made-up times, and small cases of its suite."""

from __future__ import annotations

import torch

from dsa_tvm import presets

SMALL = presets.Preset(h_idx=3, d_idx=32, topk=16, h_q=2, d_qk=576, d_v=512, sm_scale=0.06)
CASES = [
    *(("lightning_indexer", dtype) for dtype in ("bfloat16", "float8_e4m3fn")),
    *(("topk", "float32"), ("sparse_mla", "bfloat16"), ("dsa_attention", "bfloat16")),
    ("sparse_mla_fp8", "float8_e4m3fn"),
    *(("indexer_topk", dtype) for dtype in ("bfloat16", "float8_e4m3fn")),
]


#: The limits of a very slow GPU, so that small cases reach some percent of them.
CEILINGS = {"bf16_tflops": 1e-4, "fp8_tflops": 2e-4, "copy_tbps": 1e-5}


class FakeGpu:
    """The CPU with its own clock. Enqueued work is done when somebody waits for it."""

    device, capability = "cpu", 90

    class out_of_memory(RuntimeError):
        pass

    def __init__(self):
        self.host, self.gpu, self.log, self.dead = 0.0, 0.0, [], False

    def now(self):
        return self.host

    def synchronize(self):
        if self.dead:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        self.host = max(self.host, self.gpu)
        self.log.append("synchronize")

    def enqueue(self, seconds, launch=0.0):
        self.host += launch
        self.gpu = max(self.gpu, self.host) + seconds

    def taking(self, seconds, call, launch=1e-4):
        """A call that is computed at once and takes the given time on this GPU."""

        def taken(*args, **kwargs):
            self.enqueue(0, launch)
            self.enqueue(seconds)
            return call(*args, **kwargs)

        return taken

    def hold(self, seconds):
        self.enqueue(seconds)

    def flush(self):
        self.log.append("flush")

    def mark(self):
        self.gpu = max(self.gpu, self.host)
        return self.gpu

    def elapsed(self, begin, end):
        return end - begin

    def free(self):
        pass

    def describe(self):
        return {"name": "Fake", "torch": torch.__version__, "cuda": "none"}

    def ceilings(self):
        return CEILINGS
