"""The decisions of the sparse attention for sm_90a, and its layout of shared memory."""

from __future__ import annotations

from dataclasses import dataclass

from .....ops.packed_rows import SCALED
from ...emit import Place, SharedPool

#: Heads of a block, which are the rows of a product of a warpgroup.
HEADS = 64

#: Keys of a tile.
KEYS = 64

#: Elements of a row of the 128 byte swizzle. A tile of shared memory is [64 rows, ATOM] of them.
ATOM = 64

#: The width of values. Each of two warpgroups has a product of the largest width, 256.
D_V = 512

#: Registers of a thread that multiplies, with packed keys. The threads that unpack them need the others.
PACKED_REGISTERS = 208

#: Two warpgroups multiply, and one copies.
WARPGROUP = 128
THREADS = 3 * WARPGROUP

#: Registers of three threads, one of each warpgroup, as many as the launch gives them: 168 each.
_REGISTERS = 504


@dataclass(frozen=True)
class Decisions:
    """The decisions of a search.

    Parameters
    ----------
    consumer_registers : int
        Registers of a thread that multiplies, a multiple of 8 from 208 to 232; the copying threads have the others.
        With packed keys it is 208, since their copies take 88.
    split_keys : int
        The fewest keys that a part is cut for; a multiple of 64.

    Raises
    ------
    ValueError
        A decision is out of bounds.
    """

    consumer_registers: int
    split_keys: int

    def __post_init__(self) -> None:
        if self.consumer_registers % 8 or not 208 <= self.consumer_registers <= 232:
            raise ValueError(f"sparse_mla: registers out of bounds: {self}")
        if self.split_keys < 1 or self.split_keys % KEYS:
            raise ValueError(f"sparse_mla: decisions that do not divide: {self}")

    @property
    def heads(self) -> int:
        """Heads of a block."""
        return HEADS

    @property
    def block_keys(self) -> int:
        """The number of keys in a part is a multiple of this."""
        return KEYS

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return THREADS

    @property
    def producer_registers(self) -> int:
        """Registers of a thread that copies."""
        return _REGISTERS - 2 * self.consumer_registers

    def check(self, variant: dict[str, str], d_qk: int, d_v: int) -> None:
        """Raise ValueError if there is no such kernel."""
        dtype = variant["T"]
        keys = variant.get("K", dtype)
        if dtype not in ("bfloat16", "float16") or keys not in (dtype, SCALED):
            raise ValueError(f"sparse_mla: no kernel of warpgroups for {variant}")
        if keys == SCALED and dtype != "bfloat16":
            raise ValueError(f"sparse_mla: no kernel of warpgroups for {variant}")
        if keys == SCALED and self.consumer_registers > PACKED_REGISTERS:
            raise ValueError(f"sparse_mla: too few registers for the copies of {variant}: {self}")
        if d_v != D_V or d_qk not in (D_V, D_V + ATOM):
            raise ValueError(f"sparse_mla: no kernel of warpgroups for d_qk {d_qk} and d_v {d_v}")

    def shared_bytes(self, variant: dict[str, str], d_qk: int, d_v: int) -> int:
        """Shared memory of a launch."""
        places = SharedPool()
        tiles(places, d_qk)
        exchange(places)
        # The rows of tiles are swizzled by their address: the pool begins at a multiple of 1024 also where it is
        # placed by its end.
        return -(-places.bytes // 1024) * 1024

    def blocks(self, s_q: int, h_q: int) -> int:
        """First extent of the grid."""
        return s_q * -(-h_q // HEADS)


def tiles(places: SharedPool, d_qk: int) -> tuple[Place, Place, Place]:
    """Queries, the two slots of keys, and weights for the other warpgroup, all of them in swizzled tiles."""
    atoms = d_qk // ATOM
    queries = places.place((atoms, HEADS, ATOM), "uint16", 1024)
    keys = places.place((2, atoms, KEYS, ATOM), "uint16", 1024)
    if d_qk == D_V:
        return queries, keys, places.place((2, 1, HEADS, ATOM), "uint16", 1024)
    # The key-only part is free once the scores are computed, and is as large as the weights.
    free = keys.elem_offset + D_V // ATOM * KEYS * ATOM
    return queries, keys, Place((2, atoms, HEADS, ATOM), "uint16", free)


def exchange(places: SharedPool) -> tuple[Place, ...]:
    """Barriers, which keys count, the shifts, the ends of rows, a number of each warp, and what the block works on.

    Then the totals of pairs of either parity, and what warps voted.
    """
    return (
        places.place((8,), "uint64"),
        places.place((2, 4), "uint32"),
        places.place((2, HEADS), "float32"),
        places.place((2, 2, HEADS), "float32"),
        places.place((THREADS // 32,), "int32"),
        places.place((3,), "int32"),
        places.place((2, 2, HEADS), "float32"),
        places.place((2, WARPGROUP // 32), "uint32"),
    )


#: bf16 and f16 alike.
DEFAULT = {"sm_90a": Decisions(consumer_registers=208, split_keys=128)}


def choices(target: str) -> dict[str, tuple[int, ...]]:
    """The values of each decision that are worth trying on `target`."""
    return {"consumer_registers": (208, 216, 224, 232), "split_keys": (64, 128, 192, 256, 512)}
