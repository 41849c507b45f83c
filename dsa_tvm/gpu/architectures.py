"""NVIDIA's GPU architectures: which GPUs run code for each, and their limits."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

#: The target that stands for every GPU: the one of this machine, or all that a library is built for.
ANY_GPU = "cuda"

#: The architecture with dedicated kernels.
HOPPER = "sm_90a"

#: Rows of one tensor-core product of a warp. Attention in 16 bits has a dedicated kernel for up to this many heads.
FEW_HEADS = 16

#: Shared memory that a block can have, in KiB, by compute capability. Others are assumed to have the least.
_SHARED_KIB = {80: 163, 87: 163, 90: 227, 100: 227, 101: 227, 103: 227, 110: 227}
_LEAST_SHARED_KIB = 99
#: Bytes of shared memory that the system takes for every block; the registers of a multiprocessor, of which warps
#: get multiples of 256; and the threads that it can hold.
SYSTEM_SHARED = 1 << 10
_REGISTERS, _REGISTER_UNIT = 65536, 256
_THREADS = {80: 2048, 90: 2048, 100: 2048, 103: 2048}
_LEAST_THREADS = 1536
_WARP = 32
#: Floating-point operations that the tensor cores of a multiprocessor do per clock cycle on elements of 16 bits.
_TENSOR_FLOPS = {
    80: 2048,
    86: 1024,
    87: 1024,
    89: 1024,
    90: 4096,
    100: 8192,
    103: 8192,
    110: 4096,
    120: 1024,
    121: 1024,
}
_MOST_TENSOR_FLOPS = 8192
#: Tegra GPUs. They run only machine code for their own architecture, and no other GPU runs theirs.
TEGRA = (87, 101)
#: The first capability with fp8: elements of 8 bits are twice as fast from here on.
_HAS_FP8 = 89


def is_arch(name: str) -> bool:
    """Whether `name` is the name of an architecture, such as ``sm_90a``."""
    return re.fullmatch(r"sm_\d{2,3}a?", name) is not None


def number_of(arch: str) -> int:
    """90 for ``sm_90``, ``sm_90a`` and ``compute_90``."""
    return int(arch.partition("_")[2].removesuffix("a"))


def is_exact(arch: str) -> bool:
    """Whether code for `arch` runs on that architecture only, as for ``sm_90a``."""
    return arch.endswith("a")


def runs_on(arch: str, capability: int) -> bool:
    """Whether a GPU of this compute capability (90 for 9.0) runs machine code for `arch`. This is the driver's rule."""
    number = number_of(arch)
    if is_exact(arch) or capability in TEGRA or number in TEGRA:
        return number == capability
    return number // 10 == capability // 10 and number <= capability


def best_for(capability: int, archs: Iterable[str]) -> str | None:
    """The architecture among `archs` whose code a library would use on a GPU of this compute capability."""
    running: Sequence[str] = [arch for arch in archs if runs_on(arch, capability)]
    return max(running, key=lambda arch: (number_of(arch), is_exact(arch)), default=None)


def shared_bytes(arch: str) -> int:
    """Shared memory that a block can have on every GPU that runs code for `arch`. `ANY_GPU` has what all have."""
    number = number_of(arch) if is_arch(arch) else 0
    return _SHARED_KIB.get(number, _LEAST_SHARED_KIB) << 10


def shared_bytes_of_each(arch: str, blocks: int) -> int:
    """Shared memory that a block can have if a multiprocessor is to hold `blocks` of them at a time."""
    return (shared_bytes(arch) + SYSTEM_SHARED) // blocks - SYSTEM_SHARED


def resident_blocks(arch: str, threads: int, registers: int, shared: int) -> int:
    """How many blocks of a kernel a multiprocessor holds at a time.

    Parameters
    ----------
    arch : str
    threads : int
        Of a block.
    registers : int
        Of a thread, at the launch.
    shared : int
        Bytes of shared memory of a block.
    """
    number, warps = number_of(arch), -(-threads // _WARP)
    of_a_warp = -(-registers * _WARP // _REGISTER_UNIT) * _REGISTER_UNIT
    return min(
        _REGISTERS // of_a_warp // warps,
        (shared_bytes(arch) + SYSTEM_SHARED) // (shared + SYSTEM_SHARED),
        _THREADS.get(number, _LEAST_THREADS) // threads,
    )


def tensor_flops(capability: int, bits: int) -> int:
    """The most operations that the tensor cores of a multiprocessor do per clock cycle on elements of `bits` bits."""
    flops = _TENSOR_FLOPS.get(capability, _MOST_TENSOR_FLOPS)
    return 2 * flops if bits == 8 and capability >= _HAS_FP8 else flops
