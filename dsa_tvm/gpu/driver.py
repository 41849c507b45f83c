"""The CUDA driver through ctypes: memory, streams and events of one GPU, without torch or the CUDA toolkit."""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_char_p, c_float, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_void_p
from types import TracebackType
from typing import Any

import numpy as np

from ..errors import DsaError, LibraryError

_MULTIPROCESSORS, _CLOCK_KHZ, _MEMORY_CLOCK_KHZ, _BUS_BITS, _L2_BYTES = 16, 13, 36, 37, 38
_MAJOR, _MINOR = 75, 76
_OUT = ctypes.POINTER
_BLOCKING = 0

_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuGetErrorString": (c_int, _OUT(c_char_p)),
    "cuDeviceGetCount": (_OUT(c_int),),
    "cuDeviceGet": (_OUT(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (_OUT(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (_OUT(c_void_p), c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (_OUT(c_void_p),),
    "cuMemAlloc_v2": (_OUT(c_uint64), c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemcpyHtoD_v2": (c_uint64, c_void_p, c_size_t),
    "cuMemcpyDtoH_v2": (c_void_p, c_uint64, c_size_t),
    "cuMemsetD8Async": (c_uint64, c_ubyte, c_size_t, c_void_p),
    "cuStreamCreate": (_OUT(c_void_p), c_uint),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuStreamSynchronize": (c_void_p,),
    "cuEventCreate": (_OUT(c_void_p), c_uint),
    "cuEventDestroy_v2": (c_void_p,),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventElapsedTime": (_OUT(c_float), c_void_p, c_void_p),
}


class CudaError(DsaError):
    """A call of the driver failed. If a kernel caused the error, this process cannot use the GPU any more."""


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        words = "no CUDA driver could be loaded"
        raise LibraryError(f"cuda: {words} ({error}); it comes with NVIDIA's GPU driver") from error
    for name, parameters in _SIGNATURES.items():
        try:
            getattr(driver, name).argtypes = parameters
        except AttributeError as error:
            raise LibraryError(f"cuda: the CUDA driver is too old: it has no {name}") from error
    if status := driver.cuInit(0):
        raise LibraryError(f"cuda: the CUDA driver does not start: {_words(driver, status)}")
    count = c_int()
    if driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        raise LibraryError("cuda: the CUDA driver finds no GPU")
    return driver


def _words(driver: ctypes.CDLL, status: int) -> str:
    text = c_char_p()
    driver.cuGetErrorString(status, ctypes.byref(text))
    return text.value.decode(errors="replace") if text.value else f"error {status}"


def _call(name: str, *arguments: Any) -> None:
    driver = _driver()
    if status := getattr(driver, name)(*arguments):
        raise CudaError(f"cuda: {name}: {_words(driver, status)}")


def _made(name: str, kind: Any, *arguments: Any) -> Any:
    """Call a function of the driver that writes its result through its first argument. Returns the result."""
    result = kind()
    _call(name, ctypes.byref(result), *arguments)
    return result.value


class Memory:
    """GPU memory. It is freed with the last reference.

    Parameters
    ----------
    size : int
        Bytes, aligned to 256.

    Raises
    ------
    CudaError
        The GPU has no memory left, or an earlier kernel failed.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.address: int = _made("cuMemAlloc_v2", c_uint64, max(size, 1))

    def __del__(self) -> None:
        if hasattr(self, "address"):
            # Ignore the status: an error here would come from an earlier kernel.
            _driver().cuMemFree_v2(self.address)

    def write(self, array: np.ndarray, offset: int = 0) -> None:
        """Copy a C-contiguous array into it, `offset` bytes from the start."""
        assert array.flags.c_contiguous and offset + array.nbytes <= self.size
        _call("cuMemcpyHtoD_v2", self.address + offset, array.ctypes.data, array.nbytes)

    def read(self, array: np.ndarray, offset: int = 0) -> np.ndarray:
        """Fill a C-contiguous array from it, `offset` bytes from the start, and return the array."""
        assert array.flags.c_contiguous and offset + array.nbytes <= self.size
        _call("cuMemcpyDtoH_v2", array.ctypes.data, self.address + offset, array.nbytes)
        return array


class Event:
    """A point in a stream, with the time at which it was reached."""

    def __init__(self) -> None:
        self.handle: int = _made("cuEventCreate", c_void_p, 0)

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            _driver().cuEventDestroy_v2(self.handle)

    def seconds_since(self, earlier: Event) -> float:
        """Seconds between two events that have been reached, to half a microsecond."""
        return 1e-3 * float(_made("cuEventElapsedTime", c_float, earlier.handle, self.handle))


class Stream:
    """A stream of the current context. Enqueued work sees what `Memory.write` wrote before."""

    def __init__(self) -> None:
        self.handle: int = _made("cuStreamCreate", c_void_p, _BLOCKING)

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            _driver().cuStreamDestroy_v2(self.handle)

    def fill(self, memory: Memory, byte: int) -> None:
        """Enqueue setting every byte of `memory`."""
        _call("cuMemsetD8Async", memory.address, byte, memory.size, self.handle)

    def record(self, event: Event) -> None:
        """Enqueue an event."""
        _call("cuEventRecord", event.handle, self.handle)

    def synchronize(self) -> None:
        """Wait for everything that was enqueued.

        Raises
        ------
        CudaError
            A kernel failed.
        """
        _call("cuStreamSynchronize", self.handle)


class Gpu:
    """One GPU; as a context manager, its primary context is current in this thread.

    Parameters
    ----------
    ordinal : int
        The number of the GPU among those that ``CUDA_VISIBLE_DEVICES`` leaves.

    Raises
    ------
    LibraryError
        There is no driver, or no GPU with this number. The message says what is missing.
    """

    def __init__(self, ordinal: int = 0) -> None:
        _driver()
        try:
            self._device: int = _made("cuDeviceGet", c_int, ordinal)
        except CudaError as error:
            raise LibraryError(f"cuda: expected a GPU with the number {ordinal}, got {error}") from error
        name = ctypes.create_string_buffer(256)
        _call("cuDeviceGetName", name, len(name), self._device)
        self.name = name.value.decode(errors="replace")
        self.capability = 10 * self._attribute(_MAJOR) + self._attribute(_MINOR)
        self.multiprocessors = self._attribute(_MULTIPROCESSORS)
        self.l2_bytes = self._attribute(_L2_BYTES)
        self.clock_hertz = 1e3 * self._attribute(_CLOCK_KHZ)
        #: Memory transfers data twice per cycle. 0 if the driver does not tell the clock.
        self.bytes_per_second = 2e3 * self._attribute(_MEMORY_CLOCK_KHZ) * self._attribute(_BUS_BITS) / 8

    def _attribute(self, number: int) -> int:
        return int(_made("cuDeviceGetAttribute", c_int, number, self._device))

    def __enter__(self) -> Gpu:
        _call("cuCtxPushCurrent_v2", _made("cuDevicePrimaryCtxRetain", c_void_p, self._device))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        driver, context = _driver(), c_void_p()
        driver.cuCtxPopCurrent_v2(ctypes.byref(context))
        driver.cuDevicePrimaryCtxRelease_v2(self._device)
