"""What this machine can do at most, as the library measures it in the run whose times are compared with it."""

from __future__ import annotations

from typing import Any

from ..errors import KernelError
from ..ops.element_types import product_of
from ..runtime import limits, machine

#: Reading more than this tells nothing new: no cache of a machine for one user holds it.
_MOST_READ = 256 << 20


class Ceilings:
    """The limits for one element type, by number of threads; each is the best that was seen so far.

    Parameters
    ----------
    dtype : str
        Of the queries and keys.

    Attributes
    ----------
    product : str
        The type that is multiplied: float32 where the active target has no dot products of `dtype`.
    """

    def __init__(self, dtype: str) -> None:
        self.wanted = product_of(dtype)
        self.product = self.wanted if limits.peak(self.wanted, 1, 0.0) else "float32"
        self._peaks: dict[int, float] = {}
        self._reads: dict[tuple[int, int], float] = {}

    def peak(self, threads: int, seconds: float = 0.03) -> float | None:
        """Floating-point operations per second; None if the library measures nothing."""
        rate = limits.peak(self.product, threads, seconds) or 0.0
        self._peaks[threads] = max(rate, self._peaks.get(threads, 0.0))
        return self._peaks[threads] or None

    def read_rate(self, size: int, threads: int, seconds: float = 0.02) -> float | None:
        """Bytes per second where so many are read again and again; None where there is no memory to try it."""
        size = min(max(size, 1), _MOST_READ)
        if size > machine.available_memory() // 2:
            return None
        try:
            rate = limits.read_rate(size, threads, seconds) or 0.0
        except KernelError:
            return None
        self._reads[size, threads] = max(rate, self._reads.get((size, threads), 0.0))
        return self._reads[size, threads] or None

    def shares(self, operations: int, size: int, threads: int, seconds: float) -> dict[str, Any]:
        """How much of the limits a call takes.

        Parameters
        ----------
        operations : int
            Floating-point operations of the formula; 0 where that says nothing.
        size : int
            Bytes that any implementation must move.
        threads : int
        seconds : float
            What the call took.

        Returns
        -------
        dict
            "of_peak" and "of_read": the least seconds that multiplying, or moving the bytes, could take, over
            `seconds`; None where that is not known. "bound": which of the two is larger, "peak" or "read".
            "peak_gflops" and "read_gbps": what they were compared with.
        """
        peak = self.peak(threads) if operations else None
        rate = self.read_rate(size, threads)
        of_peak = operations / peak / seconds if peak else None
        of_read = size / rate / seconds if rate else None
        known = {name: share for name, share in (("peak", of_peak), ("read", of_read)) if share is not None}
        return {
            "of_peak": of_peak,
            "of_read": of_read,
            "bound": max(known, key=known.__getitem__) if known else None,
            "peak_gflops": peak and peak / 1e9,
            "read_gbps": rate and rate / 1e9,
        }

    def notes(self) -> list[str]:
        """A line for a report where the shares are not of what the type's name says."""
        if self.product == self.wanted:
            return []
        return [f"shares are of the float32 peak: the target in use has no dot products of {self.wanted}"]
