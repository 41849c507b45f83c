"""NVIDIA's architectures: which GPUs run the code for one, and the most that a GPU of one can do."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

#: The one that some kernels use the own instructions of.
HOPPER = "sm_90a"

#: Rows of a product of a warp's tensor cores. For at most so many heads the attention in 16 bits has its own kernel.
FEW_HEADS = 16

#: Shared memory that a block can have, in KiB, by compute capability; others are taken to have the least of it.
_SHARED_KIB = {80: 163, 87: 163, 90: 227, 100: 227, 101: 227, 103: 227, 110: 227}
_LEAST_SHARED_KIB = 99
#: What a multiprocessor has beside: bytes that the system takes for every block, registers, which warps get by 256,
#: and places for threads.
SYSTEM_SHARED = 1 << 10
_REGISTERS, _REGISTER_UNIT = 65536, 256
_THREADS = {80: 2048, 90: 2048, 100: 2048, 103: 2048}
_LEAST_THREADS = 1536
_WARP = 32
#: Floating-point operations of a multiprocessor's tensor cores in a clock cycle, on elements of 16 bits.
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
#: GPUs of Tegra: they run machine code of their own architecture only, and no others run theirs.
TEGRA = (87, 101)
#: From this capability on, elements of 8 bits are twice as fast.
_HAS_FP8 = 89


def is_arch(name: str) -> bool:
    """Whether `name` is that of an architecture, such as ``sm_90a``."""
    return re.fullmatch(r"sm_\d{2,3}a?", name) is not None


def number_of(arch: str) -> int:
    """90 for ``sm_90``, ``sm_90a`` and ``compute_90``."""
    return int(arch.partition("_")[2].removesuffix("a"))


def is_exact(arch: str) -> bool:
    """Whether code for `arch`, such as ``sm_90a``, runs on that architecture and no other."""
    return arch.endswith("a")


def runs_on(arch: str, capability: int) -> bool:
    """Whether a GPU of that compute capability, 90 for 9.0, runs machine code for `arch`: the driver's own rule."""
    number = number_of(arch)
    if is_exact(arch) or capability in TEGRA or number in TEGRA:
        return number == capability
    return number // 10 == capability // 10 and number <= capability


def best_for(capability: int, archs: Iterable[str]) -> str | None:
    """The one of `archs` whose code a library would take on a GPU of that compute capability."""
    running: Sequence[str] = [arch for arch in archs if runs_on(arch, capability)]
    return max(running, key=lambda arch: (number_of(arch), is_exact(arch)), default=None)


def shared_bytes(arch: str) -> int:
    """Shared memory that a block can have on every GPU that runs code for `arch`; ``"cuda"`` stands for any GPU."""
    number = number_of(arch) if is_arch(arch) else 0
    return _SHARED_KIB.get(number, _LEAST_SHARED_KIB) << 10


def shared_bytes_of_each(arch: str, blocks: int) -> int:
    """Shared memory that a block can have where a multiprocessor is to have so many of them at a time."""
    return (shared_bytes(arch) + SYSTEM_SHARED) // blocks - SYSTEM_SHARED


def resident_blocks(arch: str, threads: int, registers: int, shared: int) -> int:
    """How many blocks of a kernel a multiprocessor has at a time.

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
    """The most operations that a multiprocessor's tensor cores do in a clock cycle on elements of `bits` bits."""
    flops = _TENSOR_FLOPS.get(capability, _MOST_TENSOR_FLOPS)
    return 2 * flops if bits == 8 and capability >= _HAS_FP8 else flops
