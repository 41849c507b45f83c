"""The decisions of the sm_90a indexer, and the registers and shared memory that they need."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .....gpu.architectures import HOPPER, shared_bytes_of_each
from .....spec import ELEMENT_BYTES

#: Element types that wgmma multiplies.
_MULTIPLIED = ("bfloat16", "float16", "float8_e4m3fn")

#: By number of consumer warpgroups: registers of a producer thread and of a consumer thread. All together take no more
#: registers than the block is given at its launch.
_REGISTERS = {1: (24, 232), 2: (40, 232), 3: (32, 160), 4: (32, 112)}

#: The most heads that each kernel serves.
HEADS = (32, 64)


def serves(variant: dict[str, str]) -> bool:
    """Whether there is such a kernel for these types."""
    return variant["T"] == variant["K"] and variant["T"] in _MULTIPLIED


def padded_heads(h_idx: int) -> int:
    """The `heads` of the kernel that serves this many heads."""
    return next(heads for heads in HEADS if h_idx <= heads)


def span(variant: dict[str, str], d_idx: int) -> int:
    """Bytes of a row that lie together in shared memory: those of a swizzle's row, and of a row of a copied box."""
    row = d_idx * ELEMENT_BYTES[variant["K"]]
    return next(bytes_ for bytes_ in (128, 64, 32) if row % bytes_ == 0)


@dataclass(frozen=True)
class Decisions:
    """The decisions of a search.

    Parameters
    ----------
    warpgroups : int
        Consumers, 1 to 4. Each takes 64 keys of a tile. With one consumer, a multiprocessor holds two blocks at a
        time, so that one computes while the other begins.
    columns : int
        Heads, of one or more queries, in one product: 64, 128 or 256.
    parts : int
        Products in a block, 1 or 2. With 2, one is computed while the other is summed.
    stages : int
        Key tiles in shared memory, 2 to 16.

    Raises
    ------
    ValueError
        A decision is out of bounds.
    """

    warpgroups: int
    columns: int
    parts: int
    stages: int

    def __post_init__(self) -> None:
        if self.warpgroups not in _REGISTERS or self.columns not in (64, 128, 256) or self.parts not in (1, 2):
            raise ValueError(f"lightning_indexer: warpgroups, columns or parts out of bounds: {self}")
        # Sums and weights.
        if self.parts * self.columns * 3 // 4 + 16 > self.registers[1]:
            raise ValueError(f"lightning_indexer: more sums and weights than registers: {self}")
        # The assembler refuses an instruction that uses more registers than a thread has at the launch.
        if self.warpgroups == 1 and self.columns > 128:
            raise ValueError(f"lightning_indexer: warpgroups: expected at least 2 for so many columns: {self}")
        if not 2 <= self.stages <= 16:
            raise ValueError(f"lightning_indexer: stages out of bounds: {self}")

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread of the producer, and of the consumers."""
        return _REGISTERS[self.warpgroups]

    @property
    def blocks(self) -> int:
        """Blocks that a multiprocessor holds at a time."""
        return 2 if self.warpgroups == 1 else 1

    @property
    def shared_limit(self) -> int:
        """Shared memory that each of them can have, in bytes."""
        return shared_bytes_of_each(HOPPER, self.blocks)

    @property
    def block_keys(self) -> int:
        """Keys of a tile."""
        return 64 * self.warpgroups

    def queries(self, heads: int) -> int:
        """Queries of a block."""
        return self.parts * self.columns // heads

    def k_box(self, variant: dict[str, str], d_idx: int) -> tuple[int, int]:
        """Rows and elements of the boxes that k's tensor map, [s_kv, d_idx], is made for; `span` is their swizzle."""
        return self.block_keys, span(variant, d_idx) // ELEMENT_BYTES[variant["K"]]

    def q_box(self, variant: dict[str, str], d_idx: int, heads: int) -> tuple[int, int, int]:
        """The same of q's, [s_q, h_idx, d_idx]."""
        return self.columns // heads, heads, span(variant, d_idx) // ELEMENT_BYTES[variant["T"]]

    def shared_bytes(self, variant: dict[str, str], d_idx: int) -> int:
        """Shared memory of a launch."""
        rows = self.stages * self.block_keys + self.parts * self.columns
        return rows * d_idx * ELEMENT_BYTES[variant["K"]] + 8 * (2 * self.stages + 1)


DEFAULT = {"sm_90a": Decisions(warpgroups=1, columns=128, parts=2, stages=8)}

#: For few queries: only as many columns as they need, and many keys in flight.
FEW_QUERIES = Decisions(warpgroups=4, columns=64, parts=1, stages=5)


def default(variant: dict[str, str], d_idx: int, few_queries: bool) -> Decisions:
    """DEFAULT or FEW_QUERIES, with as many of its stages, or else queries, as fit."""
    c = FEW_QUERIES if few_queries else DEFAULT["sm_90a"]
    smaller = (c, replace(c, parts=1), replace(c, parts=1, columns=64), replace(c, warpgroups=2, parts=1, columns=64))
    tries = (replace(t, stages=stages) for t in smaller for stages in range(c.stages, 1, -1))
    return next(t for t in tries if t.shared_bytes(variant, d_idx) <= t.shared_limit)


def choices(target: str) -> dict[str, tuple[int, ...]]:
    """The values of each decision that are worth trying on `target`."""
    return {"warpgroups": (1, 2, 3, 4), "columns": (64, 128, 256), "parts": (1, 2), "stages": (3, 4, 6, 8, 12)}
