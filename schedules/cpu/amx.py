"""The tile products of AMX, as functions in LLVM's IR that kernels call.

AMX has eight tiles of 16 rows of 64 bytes. A product takes two of them, and adds to a third one with 16 x 16 sums. All
tiles are configured alike, so what is left of a row or of a tile has to be filled with zeros. LLVM's other intrinsics
choose the tiles themselves. They need a shape for each, and spill tiles in ways that no machine was at hand to try.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import tvm_ffi
from tvm import ir, tirx
from tvm.script import tirx as T

#: Rows of a tile, and their bytes.
ROWS, ROW_BYTES = 16, 64
_TILES = 8

#: The instruction by element type.
INSTRUCTIONS = {"bfloat16": "tdpbf16ps", "int8": "tdpbssd"}

#: LLVM's intrinsics begin with this. A test has functions that begin otherwise.
_PREFIX = "llvm.x86."
_ATTRIBUTES = 'nounwind "target-features"="+amx-tile,+amx-bf16,+amx-int8,+avx512bw,+avx512f,+avx512vl"'

_BEGIN, _END, _TRANSPOSE = "dsa_tiles_begin", "dsa_tiles_end", "dsa_transpose_16"


def takes(rows: int, columns: int) -> bool:
    """Whether so many rows and columns of sums are whole tiles that leave room for those of operands."""
    if rows % ROWS or columns % ROWS:
        return False
    below, beside = rows // ROWS, columns // ROWS
    # The right operands of a step are held, and the left ones take turns.
    return below * beside + beside < _TILES


def _session_ir() -> str:
    configuration = [0] * 64
    configuration[0] = 1  # the palette
    for tile in range(_TILES):
        configuration[16 + 2 * tile] = ROW_BYTES
        configuration[48 + tile] = ROWS
    bytes_of = ", ".join(f"i8 {x}" for x in configuration)
    return f"""
@dsa_tiles = linkonce_odr hidden constant [64 x i8] [{bytes_of}], align 64
define linkonce_odr hidden void @{_BEGIN}() #0 {{
  call void @{_PREFIX}ldtilecfg(ptr @dsa_tiles)
  ret void
}}
define linkonce_odr hidden void @{_END}() #0 {{
  call void @{_PREFIX}tilerelease()
  ret void
}}
"""


def _name(instruction: str, rows: int, columns: int, lefts: int) -> str:
    return f"dsa_{instruction}_{rows}x{columns}x{lefts}"


def _product_ir(instruction: str, rows: int, columns: int, lefts: int) -> str:
    """`product`'s function: its sums stay in tiles from the first step to the last."""
    sums = [[r * columns + c for c in range(columns)] for r in range(rows)]
    right = [rows * columns + c for c in range(columns)]
    left = range(rows * columns + columns, _TILES)

    def lines() -> Iterator[str]:
        for tile in range(rows * columns):
            yield f"call void @{_PREFIX}tilezero(i8 {tile})"
        yield "br label %step"
        yield "step:"
        yield "%i = phi i64 [ 0, %entry ], [ %next, %step ]"
        yield f"%along = mul i64 %i, {ROW_BYTES}"
        yield f"%down = mul i64 %i, {ROWS}"
        yield "%b_at = mul i64 %down, %b_stride"
        yield "%b0 = getelementptr i8, ptr %b, i64 %b_at"
        for c in range(columns):
            if c:
                yield f"%b{c} = getelementptr i8, ptr %b0, i64 {c * ROW_BYTES}"
            yield f"call void @{_PREFIX}tileloadd64(i8 {right[c]}, ptr %b{c}, i64 %b_stride)"
        for n in range(lefts * rows):
            row, tile = n % rows, left[n % len(left)]
            yield f"%a_down{n} = mul i64 %a_stride, {row * ROWS}"
            yield f"%a_part{n} = mul i64 %a_part, {n // rows}"
            yield f"%a_to{n} = add i64 %a_down{n}, %a_part{n}"
            yield f"%a_at{n} = add i64 %a_to{n}, %along"
            yield f"%a{n} = getelementptr i8, ptr %a, i64 %a_at{n}"
            yield f"call void @{_PREFIX}tileloadd64(i8 {tile}, ptr %a{n}, i64 %a_stride)"
            for c in range(columns):
                yield f"call void @{_PREFIX}{instruction}(i8 {sums[row][c]}, i8 {tile}, i8 {right[c]})"
        yield "%next = add i64 %i, 1"
        yield "%more = icmp slt i64 %next, %steps"
        yield "br i1 %more, label %step, label %done"
        yield "done:"
        for r in range(rows):
            for c in range(columns):
                at = r * ROWS * columns * ROW_BYTES + c * ROW_BYTES
                yield f"%c{r}_{c} = getelementptr i8, ptr %c, i64 {at}"
                tile, stride = sums[r][c], columns * ROW_BYTES
                yield f"call void @{_PREFIX}tilestored64(i8 {tile}, ptr %c{r}_{c}, i64 {stride})"
        yield "ret void"

    body = "\n".join(line if line.endswith(":") else f"  {line}" for line in lines())
    arguments = "ptr %c, ptr %a, i64 %a_stride, i64 %a_part, ptr %b, i64 %b_stride, i64 %steps"
    name = _name(instruction, rows, columns, lefts)
    return f"define linkonce_odr hidden void @{name}({arguments}) #0 {{\nentry:\n{body}\n}}\n"


def _transpose_ir() -> str:
    """16 vectors of 16 u32, by exchanging blocks of 8, 4, 2 and 1 across the diagonal."""
    vector = f"<{ROWS} x i32>"
    names = [f"%v0_{i}" for i in range(ROWS)]
    lines = []
    for i, name in enumerate(names):
        lines.append(f"%from{i} = getelementptr {vector}, ptr %from, i64 {i}")
        lines.append(f"{name} = load {vector}, ptr %from{i}, align 4")
    for n, block in enumerate((8, 4, 2, 1), 1):
        after = [f"%v{n}_{i}" for i in range(ROWS)]
        for i in range(ROWS):
            first, second = names[i & ~block], names[i | block]
            shift = i & block  # the lower one takes the blocks off the diagonal from below, and the other way round
            picks = ((lane & ~block | shift) + (ROWS if bool(lane & block) else 0) for lane in range(ROWS))
            mask = ", ".join(f"i32 {pick}" for pick in picks)
            lines.append(f"{after[i]} = shufflevector {vector} {first}, {vector} {second}, <{ROWS} x i32> <{mask}>")
        names = after
    for i, name in enumerate(names):
        lines.append(f"%at{i} = mul i64 %stride, {i}")
        lines.append(f"%to{i} = getelementptr i8, ptr %to, i64 %at{i}")
        lines.append(f"store {vector} {name}, ptr %to{i}, align 4")
    body = "\n".join(f"  {line}" for line in lines)
    arguments = "ptr %to, i64 %stride, ptr %from"
    return f"define linkonce_odr hidden void @{_TRANSPOSE}({arguments}) #0 {{\n{body}\n  ret void\n}}\n"


def _declarations() -> str:
    return f"""
declare void @{_PREFIX}ldtilecfg(ptr)
declare void @{_PREFIX}tilerelease()
declare void @{_PREFIX}tilezero(i8 immarg)
declare void @{_PREFIX}tileloadd64(i8 immarg, ptr, i64)
declare void @{_PREFIX}tilestored64(i8 immarg, ptr, i64)
declare void @{_PREFIX}tdpbf16ps(i8 immarg, i8 immarg, i8 immarg)
declare void @{_PREFIX}tdpbssd(i8 immarg, i8 immarg, i8 immarg)
attributes #0 = {{ {_ATTRIBUTES} }}
"""


def ir_of(kernel: tirx.PrimFunc) -> str:
    """The functions of this module that a kernel calls."""
    called: set[str] = set()

    def note(call: ir.Call) -> None:
        if call.args and isinstance(call.args[0], ir.StringImm):
            called.add(call.args[0].value)

    tvm_ffi.structural_walk(kernel.body, (ir.Call, note))
    shapes = (re.fullmatch(r"dsa_(tdp\w+)_(\d+)x(\d+)x(\d+)", name) for name in sorted(called))
    products = [_product_ir(found[1], *map(int, found.groups()[1:])) for found in shapes if found]
    transposes = [_transpose_ir()] if _TRANSPOSE in called else []
    return "".join([_session_ir(), *products, *transposes, _declarations()])


def begin():
    """Configure the tiles of the calling thread. Whatever it had in them is lost, as the ABI allows to any call."""
    return T.call_extern("void", _BEGIN)


def end():
    """Release the tiles, so that the system need not save them when it switches threads."""
    return T.call_extern("void", _END)


def product(dtype, sums, left, left_row, right, right_row, steps, lefts=1, part=0):
    """Set `sums` to the products of tiles, and of a second left operand with the same right one.

    Parameters
    ----------
    dtype : str
        A key of `INSTRUCTIONS`.
    sums : Buffer
        Of 16 x rows by 16 x columns 4-byte sums. They are set, not added to.
    left, right : expression
        Addresses of the first elements. A row of `left` has the elements of all steps side by side, 64 bytes each. Each
        step has 16 rows of `right` and 64 bytes of them for each column.
    left_row, right_row : expression
        Bytes from a row to the next.
    steps : expression
        At least 1.
    lefts, part : int, expression
        How many left operands, and the bytes from one to the next.
    """
    rows, columns = int(sums.shape[0]) // ROWS, int(sums.shape[1]) // ROWS
    name = _name(INSTRUCTIONS[dtype], rows, columns, lefts)
    numbers = (T.Cast("int64", x) for x in (left_row, part, right_row, steps))
    left_row, part, right_row, steps = numbers
    return T.call_extern("void", name, T.address_of(sums[0, 0]), left, left_row, part, right, right_row, steps)


def transpose(to, row_bytes, rows):
    """Write the transpose of 16 x 16 u32, which lie side by side from the address `rows` on, to rows at `to`."""
    return T.call_extern("void", _TRANSPOSE, to, T.Cast("int64", row_bytes), rows)


def steps(start, stop, element_bytes: int):
    """Steps of a product over elements of some bytes each."""
    return (stop - start + ROW_BYTES // element_bytes - 1) // (ROW_BYTES // element_bytes)
