"""The GPU that is measured, through torch: its clock, its errors and its limits."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable
from typing import Any

from ..errors import DsaError, LibraryError
from ..runtime import library
from .clock import DeviceClock, medians


class Gpu:
    """The current GPU of torch, as a `clock.Device`.

    Attributes
    ----------
    device : str
        The device of tensors.
    capability : int
        Compute capability, 90 for 9.0.
    out_of_memory : type
        The exception that torch raises.
    """

    device = "cuda"

    def __init__(self) -> None:
        import torch

        self._torch, self._cuda = torch, torch.cuda
        self._properties: Any = torch.cuda.get_device_properties(self.device)
        self.capability = 10 * self._properties.major + self._properties.minor
        self.out_of_memory = torch.cuda.OutOfMemoryError
        self._scratch = torch.empty(2 * self._properties.L2_cache_size, dtype=torch.uint8, device=self.device)
        self._cycles = 1e9
        self._cycles = self._cycles_per_second()

    def _cycles_per_second(self) -> float:
        """The clock rate under load. Clocks rise for some tenths of a second."""
        found: list[float] = []
        while len(found) < 50 or (abs(found[-1] / found[-2] - 1) > 0.02 and len(found) < 200):
            begin = self.mark()
            self.hold(0.01)
            end = self.mark()
            self.synchronize()
            found.append(self._cycles * 0.01 / self.elapsed(begin, end))
        return found[-1]

    def now(self) -> float:
        """The host's time in seconds."""
        return time.perf_counter()

    def synchronize(self) -> None:
        """Wait for the GPU."""
        self._cuda.synchronize()

    def hold(self, seconds: float) -> None:
        """Keep the GPU busy for about this long."""
        self._cuda._sleep(int(seconds * self._cycles))

    def flush(self) -> None:
        """Write twice the L2 cache."""
        self._scratch.zero_()

    def mark(self) -> Any:
        """An event on the current stream."""
        event = self._cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed(self, begin: Any, end: Any) -> float:
        """Seconds between two events."""
        return begin.elapsed_time(end) / 1e3

    def free(self) -> None:
        """Free cached memory."""
        gc.collect()
        with contextlib.suppress(RuntimeError):  # the GPU may have stopped working, which the next call reports
            self._cuda.empty_cache()

    def describe(self) -> dict[str, Any]:
        """Name, sizes and versions, as plain values."""
        p = self._properties
        return {
            "name": p.name,
            "compute_capability": f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "memory_gib": round(p.total_memory / 2**30, 1),
            "l2_mib": round(p.L2_cache_size / 2**20, 1),
            "torch": self._torch.__version__,
            "cuda": self._torch.version.cuda,
        }

    def ceilings(self, size: int = 8192, copy_bytes: int = 2**30) -> dict[str, float | None]:
        """The most that the card reaches here, in large products and a large copy.

        Parameters
        ----------
        size : int
            Rows and columns of the square matrices.
        copy_bytes : int

        Returns
        -------
        dict
            ``bf16_tflops``, ``fp8_tflops`` (None where torch has no fp8 product for this card) and ``copy_tbps``, in
            which a byte that is copied counts twice.
        """
        torch = self._torch
        a, b = (torch.randn((size, size), device=self.device).bfloat16() for _ in range(2))
        source, target = (torch.empty(copy_bytes, dtype=torch.uint8, device=self.device) for _ in range(2))
        calls: dict[str, Callable[[], Any]] = {
            "bf16_tflops": lambda: torch.matmul(a, b),
            "copy_tbps": lambda: target.copy_(source),
        }
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        one = torch.ones((), device=self.device)

        def fp8() -> Any:
            return torch._scaled_mm(a8, b8.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)

        try:
            fp8()
            calls["fp8_tflops"] = fp8
        except (RuntimeError, TypeError, NotImplementedError):
            pass  # this card or this torch has no such product
        times = medians(DeviceClock(self), calls, 0.5)
        work = {"bf16_tflops": 2 * size**3, "fp8_tflops": 2 * size**3, "copy_tbps": 2 * copy_bytes}
        return {name: work[name] / times[name] / 1e12 if name in times else None for name in work}


def find() -> Gpu:
    """The GPU to measure.

    Raises
    ------
    DsaError
        There is no torch, no CUDA in it, or no GPU.
    LibraryError
        The library has no CUDA kernels, or `library.load` fails.
    """
    try:
        import torch
    except ImportError as error:
        raise DsaError("bench: suite cuda: expected torch with CUDA, got none; pip install torch") from error
    if torch.version.cuda is None:
        raise DsaError(f"bench: suite cuda: expected torch with CUDA, got {torch.__version__}, which has none")
    if not torch.cuda.is_available():
        raise DsaError("bench: suite cuda: expected a CUDA GPU, got none that torch finds; see `nvidia-smi`")
    if not library.cuda_archs():
        raise LibraryError(
            "bench: suite cuda: expected a library with CUDA kernels, got one without; "
            "dsa-tvm build --target cuda makes one, and DSA_TVM_LIBRARY names it"
        )
    return Gpu()
