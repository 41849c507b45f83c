"""The decisions of the portable CUDA indexer, and the shared memory that they need."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .....gpu.architectures import shared_bytes, shared_bytes_of_each
from .....spec import ELEMENT_BYTES

#: The most heads of a query, for which memory is planned.
MAX_HEADS = 64


#: Architectures whose warps can multiply e4m3. On others the compiler would convert to f16 and multiply that, again for
#: every query, so keys are converted once instead.
_MULTIPLY_E4M3 = ("sm_89", "sm_120", "sm_120a", "sm_121", "sm_121a")


def product_of(variant: dict[str, str], arch: str = "cuda") -> str:
    """The type that is multiplied. Keys fit into it, and so do queries, or the addends that they are split into."""
    if variant["K"] != "float8_e4m3fn" or (variant["T"] == variant["K"] and arch in _MULTIPLY_E4M3):
        return variant["K"]
    return "float16" if ELEMENT_BYTES[variant["T"]] == 1 else {"float32": "bfloat16"}.get(variant["T"], variant["T"])


def planes(variant: dict[str, str]) -> int:
    """How many addends of the product's type an element of a query is split into. Their sum is exact."""
    return 3 if variant["T"] == "float32" and variant["K"] == "float8_e4m3fn" else 1


def row_stride(row_bytes: int) -> int:
    """Bytes from one row in shared memory to the next."""
    return row_bytes if row_bytes % 128 == 0 else row_bytes + 16


@dataclass(frozen=True)
class Decisions:
    """The decisions of a search.

    Parameters
    ----------
    warps : int
        Warps of a block: 1, 2, 4, 8 or 16.
    key_tiles : int
        A warp takes 16 times as many keys: 1, 2 or 4. They fill ``key_tiles * d_idx / 4`` registers if the tensor cores
        multiply 16 bits, or half of that for 8 bits.
    head_tiles : int
        A warp multiplies 8 times as many heads at a time: 2 or 4.
    queries : int
        Queries of a block, 1 to 16. Each tile of keys is copied once for all of them.
    stages : int
        Key tiles in shared memory, 1 to 8. With tensor cores, registers hold one more.

    Raises
    ------
    ValueError
        A decision is out of bounds.
    """

    warps: int
    key_tiles: int
    head_tiles: int
    queries: int
    stages: int

    def __post_init__(self) -> None:
        if self.warps not in (1, 2, 4, 8, 16) or self.key_tiles not in (1, 2, 4) or self.head_tiles not in (2, 4):
            raise ValueError(f"lightning_indexer: warps or tiles out of bounds: {self}")
        if not 1 <= self.queries <= 16 or not 1 <= self.stages <= 8:
            raise ValueError(f"lightning_indexer: queries or stages out of bounds: {self}")

    @property
    def block_keys(self) -> int:
        """Keys of a tile."""
        return self.warps * self.key_tiles * 16

    def head_rows(self, h_idx: int) -> int:
        """Rows that a query's heads take in shared memory."""
        return -(-h_idx // (8 * self.head_tiles)) * 8 * self.head_tiles

    def shared_bytes(self, variant: dict[str, str], product: str, d_idx: int, h_idx: int) -> int:
        """Shared memory of a launch; `product` as `product_of` has it."""
        keys = self.stages * self.block_keys * row_stride(d_idx * ELEMENT_BYTES[variant["K"]])
        head = planes(variant) * row_stride(d_idx * ELEMENT_BYTES[product]) + ELEMENT_BYTES["float32"]
        return keys + self.queries * self.head_rows(h_idx) * head


#: Of many queries of 128 bf16, by architecture.
DEFAULT = {
    "cuda": Decisions(warps=8, key_tiles=2, head_tiles=4, queries=2, stages=1),
    "sm_80": Decisions(warps=4, key_tiles=2, head_tiles=4, queries=3, stages=1),
    "sm_90a": Decisions(warps=4, key_tiles=2, head_tiles=4, queries=4, stages=1),
    "sm_100": Decisions(warps=4, key_tiles=2, head_tiles=4, queries=4, stages=1),
}


def default(variant: dict[str, str], d_idx: int, few_queries: bool, arch: str = "cuda") -> Decisions:
    """Decisions without a search: a long pipeline for few queries; otherwise as many queries as fit into a block.

    Parameters
    ----------
    variant : dict
        Element types T of q and K of k.
    d_idx : int
    few_queries : bool
    arch : str
        A key of `DEFAULT`, or any other architecture, which gets the decisions for "cuda".

    Returns
    -------
    Decisions

    Raises
    ------
    ValueError
        The keys are so wide that nothing fits.
    """
    product = product_of(variant, arch)
    arch = arch if arch in DEFAULT else "cuda"
    base = DEFAULT[arch]
    # Where there is more than the least, two blocks share it: one computes while the other waits.
    shares = 2 if shared_bytes(arch) > shared_bytes("cuda") else 1
    limits = shared_bytes_of_each(arch, shares), shared_bytes(arch)
    if few_queries:
        base = replace(base, warps=4)
        sizes = [(1, stages) for stages in (4, 3, 2, 1)]
    elif product == "float32":
        # Keys stay in shared memory while they are used.
        base = replace(base, warps=4)
        sizes = [(queries, stages) for stages in (2, 1) for queries in (8, 4, 2, 1)]
    else:
        sizes = [(queries, 1) for queries in (8, 6, 4, 3, 2, 1)]
    for warps, key_tiles in ((base.warps, 2), (base.warps // 2, 2), (2, 1), (1, 1)):
        for limit in limits:
            for queries, stages in sizes:
                c = replace(base, warps=warps, key_tiles=key_tiles, queries=queries, stages=stages)
                if c.shared_bytes(variant, product, d_idx, MAX_HEADS) <= limit:
                    return c
    raise ValueError(f"lightning_indexer: d_idx: {d_idx} does not fit a block of {arch}")


def choices(target: str) -> dict[str, tuple[int, ...]]:
    """The values of each decision that are worth trying on `target`."""
    return {
        "warps": (2, 4, 8),
        "key_tiles": (1, 2, 4),
        "head_tiles": (2, 4),
        "queries": (1, 2, 3, 4, 6, 8),
        "stages": (1, 2, 3, 4),
    }
