"""The decisions of the CUDA sparse attention."""

from __future__ import annotations

from dataclasses import dataclass

from .....gpu.architectures import FEW_HEADS, shared_bytes
from .....ops.packed_rows import GROUP, SCALED
from ...emit import WARP, Place, SharedPool
from ..gather import RowGather
from ..online_softmax import OnlineSoftmax
from ..packed_gather import PackedGather
from .fma import FmaTiles
from .mma import MmaTiles


def gather_of(variant: dict[str, str]):
    """The class that brings the rows: packed ones, where K says so."""
    return PackedGather if variant.get("K") == SCALED else RowGather


def tiles_of(dtype: str):
    """The class of the products."""
    return FmaTiles if dtype == "float32" else MmaTiles


#: Stages of the operator. `combine` follows if the keys were cut into parts.
STAGES = ("attend", "combine")

#: Registers of a thread that hold neither queries nor sums.
_OTHER_REGISTERS = 48


def work_place(places: SharedPool) -> Place:
    """Which query and which first head a block has."""
    return places.place((2,), "int32")


@dataclass(frozen=True)
class Decisions:
    """The decisions of a search.

    Parameters
    ----------
    heads : int
        Heads of a block: 16, 32 or 64.
    block_keys : int
        Keys of a step: a multiple of 16, of 8 for f32, and of `warps`.
    stages : int
        Slots of `block_keys` keys. Two are in use, and the others are being filled. Packed rows have one more.
    warps : int
        4, 8 or 16; for f32 4 or 8.
    score_split : int
        Parts of d_qk that different warps make the scores from: 1, 2, 4 or 8. f32 takes as many as there are warps.
    split_keys : int
        The fewest keys that a part is cut for; a multiple of `block_keys`.

    Raises
    ------
    ValueError
        A decision does not divide what it has to divide.
    """

    heads: int
    block_keys: int
    stages: int
    warps: int
    score_split: int
    split_keys: int

    def __post_init__(self) -> None:
        if self.heads not in (16, 32, 64) or self.warps not in (4, 8, 16) or self.score_split not in (1, 2, 4, 8):
            raise ValueError(f"sparse_mla: decisions out of bounds: {self}")
        if self.block_keys < 8 or not 3 <= self.stages <= 8 or self.split_keys < 1:
            raise ValueError(f"sparse_mla: decisions out of bounds: {self}")
        if self.block_keys % 8 or self.block_keys % self.warps or self.split_keys % self.block_keys:
            raise ValueError(f"sparse_mla: decisions that do not divide: {self}")

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.warps * WARP

    @property
    def softmax_threads(self) -> int:
        """Threads that share a head's scores: a power of two."""
        pairs = self.block_keys // 2
        return min(self.threads // self.heads, pairs & -pairs, WARP)

    @property
    def score_warps(self) -> tuple[int, int]:
        """Warps among which keys and heads are divided for the scores."""
        within = self.warps // self.score_split
        across_heads = min(self.heads // 16, within)
        return within // max(across_heads, 1), across_heads

    def check(self, variant: dict[str, str], d_qk: int, d_v: int) -> None:
        """Raise ValueError if there is no kernel with these decisions for that element type and these lengths."""
        if variant["T"] == "float32":
            if self.warps > 8:
                raise ValueError(f"sparse_mla: more warps than parts of d_qk: {self}")
            return
        if gather_of(variant) is PackedGather and (variant["T"] != "bfloat16" or d_v % GROUP):
            raise ValueError(f"sparse_mla: no kernel for {variant} with d_v {d_v}")
        if self.block_keys % 16:
            raise ValueError(f"sparse_mla: decisions that do not divide: {self}")
        across_keys, across_heads = self.score_warps
        tiles = across_keys * across_heads
        uneven = tiles == 0 or self.block_keys // 16 % across_keys or self.heads // 16 % across_heads
        if uneven or tiles * self.score_split != self.warps:
            raise ValueError(f"sparse_mla: warps that do not divide the tiles of scores: {self}")
        queries = self.heads // 16 // across_heads * -(-d_qk // 16 // self.score_split) * 4
        sums = self.heads // 16 * -(-d_v // 16 // self.warps) * 8
        if queries + sums + _OTHER_REGISTERS > min(255, 65536 // self.threads):
            raise ValueError(f"sparse_mla: more than the registers hold: {self}")

    def shared_bytes(self, variant: dict[str, str], d_qk: int, d_v: int) -> int:
        """Shared memory of a launch."""
        places, gather = SharedPool(), gather_of(variant)
        tiles_of(variant["T"]).arrays(places, self, d_qk, gather.slots_of(self))
        OnlineSoftmax.array(places, self)
        work_place(places)
        gather.arrays(places, self, d_qk, d_v)
        return places.bytes

    def blocks(self, s_q: int, h_q: int) -> int:
        """First extent of the grid."""
        return s_q * -(-h_q // self.heads)


#: For bf16 and f16: what runs on every GPU from sm_80 on, and what the larger shared memory of some allows.
DEFAULT = {
    "cuda": Decisions(heads=64, block_keys=16, stages=3, warps=8, score_split=4, split_keys=64),
    "sm_80": Decisions(heads=64, block_keys=32, stages=3, warps=8, score_split=4, split_keys=64),
    "sm_90a": Decisions(heads=64, block_keys=32, stages=4, warps=8, score_split=4, split_keys=64),
    "sm_100": Decisions(heads=64, block_keys=32, stages=4, warps=8, score_split=4, split_keys=64),
}
#: Two blocks on a multiprocessor, if shared memory allows it.
DEFAULT_F32 = {
    "cuda": Decisions(heads=16, block_keys=8, stages=3, warps=8, score_split=1, split_keys=64),
    "sm_80": Decisions(heads=16, block_keys=16, stages=3, warps=8, score_split=1, split_keys=64),
}
DEFAULT_FEW_HEADS = Decisions(heads=FEW_HEADS, block_keys=16, stages=3, warps=8, score_split=8, split_keys=64)

#: Packed rows need a ring of their own, and sm_80 has no room for it beside 32 keys.
DEFAULT_PACKED = {
    "sm_80": Decisions(heads=64, block_keys=16, stages=5, warps=8, score_split=4, split_keys=64),
    "sm_90a": Decisions(heads=64, block_keys=32, stages=4, warps=8, score_split=4, split_keys=64),
    "sm_100": Decisions(heads=64, block_keys=32, stages=4, warps=8, score_split=4, split_keys=64),
}


def default(variant: dict[str, str], arch: str = "cuda", few_heads: bool = False) -> Decisions:
    """The hand-made decisions, those of any GPU where `arch` has none of its own.

    Parameters
    ----------
    variant : dict
        Element type T, and K where rows are packed.
    arch : str
        A key of `DEFAULT`, or another architecture from sm_80 on.
    few_heads : bool
        Whether they are for at most `FEW_HEADS` heads.

    Returns
    -------
    Decisions
    """
    if variant["T"] == "float32":
        return DEFAULT_F32.get(arch, DEFAULT_F32["cuda"])
    if few_heads:
        return DEFAULT_FEW_HEADS
    if gather_of(variant) is PackedGather:
        return DEFAULT_PACKED.get(arch, DEFAULT["cuda"])
    return DEFAULT.get(arch, DEFAULT["cuda"])


def choices(target: str) -> dict[str, tuple[int, ...]]:
    """The values of each decision that are worth trying on `target`."""
    small = shared_bytes(target) == shared_bytes("cuda")
    return {
        "heads": (16, 32, 64),
        "block_keys": (8, 16, 32) if small else (8, 16, 32, 48, 64),
        "stages": (3, 4, 5),
        "warps": (4, 8, 16),
        "score_split": (1, 2, 4, 8),
        "split_keys": (64, 96, 128, 192, 256, 384),
    }
