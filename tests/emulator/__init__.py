"""Runs generated CUDA kernels on the CPU. Every access out of bounds is an error, and missing barriers show."""

from __future__ import annotations

import ctypes
import mmap
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent

#: What its driver can say that the GPU is: with the least shared memory among those served, and with instructions of
#: its own.
EMULATED = ("sm_86", "sm_90a")

_SIGNATURE = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\((\d+)(?:, (\d+))?\) )?(\w+)\(([^)]*)\) \{')

_SCALARS = {
    "int": ctypes.c_int32,
    "uint": ctypes.c_uint32,
    "int64_t": ctypes.c_int64,
    "float": ctypes.c_float,
}

_MAP_BYTES = 128

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


class KernelError(Exception):
    """A kernel did something undefined. The message names the block, the thread and the operation."""


class Guarded:
    """A copy of an array between pages without access.

    Parameters
    ----------
    array : ndarray
    at_end : bool
        Whether the array ends where the next page begins. Otherwise it begins where the previous page ends.
    """

    def __init__(self, array: np.ndarray, at_end: bool) -> None:
        page = mmap.PAGESIZE
        room = -(-array.nbytes // page) * page
        self.size = room + 2 * page
        self.base = _libc.mmap(None, self.size, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        if room and _libc.mprotect(self.base + page, room, mmap.PROT_READ | mmap.PROT_WRITE):
            raise OSError(ctypes.get_errno(), "mprotect")
        self.address = self.base + page + (room - array.nbytes if at_end else 0)
        self.array = array
        ctypes.memmove(self.address, np.ascontiguousarray(array).ctypes.data, array.nbytes)

    def take_back(self) -> None:
        """Copy the memory back to the array if that is writable, and free it."""
        if self.array.flags.writeable and self.array.nbytes:
            raw = (ctypes.c_char * self.array.nbytes).from_address(self.address)
            self.array[...] = np.frombuffer(raw, self.array.dtype).reshape(self.array.shape)
            del raw
        _libc.munmap(self.base, self.size)


@dataclass(frozen=True)
class TensorMap:
    """An argument for a ``CUtensorMap`` parameter.

    Parameters
    ----------
    array : ndarray
        An array of two or three dimensions, with elements of 1, 2 or 4 bytes.
    box : tuple of int
        The numbers of rows and of elements in a row that one copy loads.
    swizzle : int
        Bytes in a row of the pattern in shared memory: 128, 64, 32, or 0 for none.
    """

    array: np.ndarray
    box: tuple[int, ...]
    swizzle: int = 128


class Emulator:
    """The kernels of one translation unit, compiled for the CPU.

    Parameters
    ----------
    source : str
        Source from `schedules.cuda.source.cuda_source`.
    headers : Path
        `schedules.cuda.source.DEVICE_HEADERS`. The emulator's model of the primitives is found first.
    directory : Path
        Where to compile.
    """

    def __init__(self, source: str, headers: Path, directory: Path) -> None:
        found = _SIGNATURE.findall(source)
        self.kernels = {name: (int(threads or 0), _types(parameters)) for threads, _, name, parameters in found}
        thunks = [_thunk(name, self.kernels[name][1], int(blocks or 1)) for _, blocks, name, _ in found]
        text = directory / "kernels.cc"
        text.write_text("\n".join((source, *thunks, "#include <driver.h>\n")))
        #: By this name, the library also serves as a CUDA driver.
        self.path = directory / "libcuda.so.1"
        # CUDA code reads memory as any type. NaN and infinities behave as in the C library.
        flags = ("-std=c++20", "-O1", "-ftree-vectorize", "-march=native", "-fno-strict-aliasing", "-fwrapv", "-w")
        # Several of these may be loaded at once and must share nothing.
        shared = ("-fPIC", "-fno-gnu-unique", "-shared", "-Wl,-Bsymbolic", "-o", str(self.path))
        include = ("-I", str(HERE), "-I", str(headers))
        done = subprocess.run(("g++", *flags, *include, str(text), *shared, "-ldl"), capture_output=True, text=True)
        if done.returncode:
            raise KernelError(done.stderr)
        self.library = ctypes.CDLL(str(self.path))
        self.library.emulator_launch.restype = ctypes.c_char_p
        self.library.emulator_conflicts.restype = ctypes.c_ulong
        #: Of the last launch's loads for tensor cores.
        self.bank_conflicts = 0
        self._sum_bits = 0

    @contextmanager
    def narrow_sums(self, bits: int) -> Iterator[None]:
        """Launches whose tensor cores cut off their sums so many binary places behind the leading one.

        Otherwise these are sums of float32, rounded to the nearest.
        """
        self._sum_bits = bits
        try:
            yield
        finally:
            self._sum_bits = 0

    def launch(
        self,
        name: str,
        grid: Sequence[int],
        *args,
        shared_bytes: int = 0,
        order: int = 0,
        eager: bool = False,
    ) -> None:
        """Run a kernel until it ends.

        Parameters
        ----------
        name : str
        grid : sequence of int
            The number of blocks in one to three dimensions.
        *args : ndarray, TensorMap, number or None
            The arguments in order. While the kernel runs, arrays are in guarded memory.
        shared_bytes : int
        order : int
            The order in which threads run: 0 ascending, 1 descending, otherwise the seed of a random order.
        eager : bool
            Whether asynchronous copies finish at once, instead of when the kernel waits for them.

        Raises
        ------
        KernelError
        """
        threads, types = self.kernels[name]
        if len(args) != len(types):
            raise TypeError(f"{name}: expected {len(types)} arguments, got {len(args)}")
        guarded: list[Guarded] = []
        cells = []
        for value, kind in zip(args, types, strict=True):
            if isinstance(value, TensorMap):
                guarded.append(Guarded(value.array, at_end=order % 2 == 0))
                cells.append(self._encode(value, guarded[-1].address))
            elif kind.endswith("*"):
                if value is not None:
                    guarded.append(Guarded(value, at_end=order % 2 == 0))
                cells.append(ctypes.c_void_p(None if value is None else guarded[-1].address))
            else:
                cells.append(_SCALARS[kind](value))
        pointers = (ctypes.c_void_p * len(cells))(*(ctypes.addressof(cell) for cell in cells))
        extents = (ctypes.c_uint * 3)(*grid, *[1] * (3 - len(grid)))
        try:
            message = self.library.emulator_launch(
                getattr(self.library, f"thunk_{name}"),
                pointers,
                extents,
                (ctypes.c_uint * 3)(threads, 1, 1),
                ctypes.c_size_t(shared_bytes),
                ctypes.c_uint(order),
                ctypes.c_int(eager),
                ctypes.c_int(self._sum_bits),
            )
        finally:
            for memory in guarded:
                memory.take_back()
        self.bank_conflicts = self.library.emulator_conflicts()
        if message is not None:
            raise KernelError(f"{name}: {message.decode()}")

    def _encode(self, tensor: TensorMap, address: int) -> ctypes.Array:
        rank = tensor.array.ndim
        raw = ctypes.create_string_buffer(_MAP_BYTES + 64)
        aligned = (ctypes.c_char * _MAP_BYTES).from_buffer(raw, -ctypes.addressof(raw) % 64)
        error = self.library.cuTensorMapEncodeTiled(
            aligned,
            {1: 0, 2: 1, 4: 2}[tensor.array.itemsize],  # CU_TENSOR_MAP_DATA_TYPE_UINT8, _UINT16, _UINT32
            rank,
            ctypes.c_void_p(address),
            (ctypes.c_uint64 * rank)(*tensor.array.shape[::-1]),
            (ctypes.c_uint64 * (rank - 1))(*tensor.array.strides[-2::-1]),
            (ctypes.c_uint32 * rank)(*tensor.box[::-1]),
            (ctypes.c_uint32 * rank)(*[1] * rank),
            0,
            {0: 0, 32: 1, 64: 2, 128: 3}[tensor.swizzle],
            0,
            0,
        )
        if error:
            raise ValueError(f"cuTensorMapEncodeTiled: error {error} for {tensor.array.shape} in boxes of {tensor.box}")
        return aligned


def _types(parameters: str) -> list[str]:
    words = re.compile(r"__restrict__|__grid_constant__|\bconst\b")
    return ["".join(words.sub("", p).split()[:-1]) for p in parameters.split(",")]


def _thunk(name: str, types: Sequence[str], resident: int) -> str:
    args = ", ".join(f"*({kind}*)args[{i}]" for i, kind in enumerate(types))
    return f'extern "C" void thunk_{name}(void** args) {{ emulator::m.resident = {resident}; {name}({args}); }}'
