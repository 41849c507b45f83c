"""What compiled kernels consist of."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path


def disassembled(kernel, target: str, directory: Path) -> str:
    """What objdump prints of a kernel that is compiled for a target; LLVM's prints code of any machine."""
    from dsa_tvm.build import objects

    objects.write_object({"kernel": kernel}, target, directory / "kernel.o")
    program = ["llvm-objdump", "--mattr=+dotprod,+i8mm,+bf16"] if target.startswith("aarch64") else ["objdump"]
    command = [*program, "-d", "--no-show-raw-insn", directory / "kernel.o"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def innermost_loops(code: str) -> Iterator[list[str]]:
    """The instructions of each loop without another one in it, from what objdump prints."""
    found = re.findall(r"^ *([0-9a-f]+):\s+(.*)$", code, re.MULTILINE)
    lines = [(int(address, 16), instruction) for address, instruction in found]
    jumps = [
        (re.match(r"(?:j\w+|b\.\w+|cbn?z\s+\w+,)\s+(?:0x)?([0-9a-f]+)", instruction), address)
        for address, instruction in lines
    ]
    loops = [(int(to[1], 16), address) for to, address in jumps if to and int(to[1], 16) <= address]
    for first, last in loops:
        if not any((first, last) != x and first <= x[0] and x[1] <= last for x in loops):
            yield [instruction for address, instruction in lines if first <= address <= last]


def spills(loop: list[str]) -> list[str]:
    """The instructions of a loop that keep vectors on the stack."""
    return [x for x in loop if ("mm" in x and "(%rsp" in x) or re.search(r"\bq\d.*\[sp", x)]
