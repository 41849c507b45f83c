"""Which target of a library is taken on a machine, by what CPUID says of it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from dsa_tvm.build import kernel_table, link, spec_table
from dsa_tvm.build.command import DEFAULT_TARGETS
from dsa_tvm.build.kernel_table import Kernels
from dsa_tvm.spec import DIMS, INT32_MAX

pytest.importorskip("tvm", reason="the table of targets needs apache-tvm")
from dsa_tvm.schedules.cpu import lightning_indexer

pytestmark = [
    pytest.mark.skipif(not shutil.which("cc"), reason="there is no C compiler"),
    pytest.mark.skipif(os.uname().machine != "x86_64", reason="this machine has no CPUID"),
]

#: Words of CPUID and XGETBV in the order of struct x86_features, and the bits of features as Intel's manual has them.
EBX_7, XCR0, EAX_7_1, ECX_7, EDX_7 = 1, 3, 4, 5, 6
AVX_VNNI, AVX512_BF16 = (EAX_7_1, 4), (EAX_7_1, 5)
AVX512_VNNI = (ECX_7, 11)
AVX2, AVX512F = (EBX_7, 5), (EBX_7, 16)
AMX = AMX_BF16, AMX_TILE, AMX_INT8, *AMX_STATE = (EDX_7, 22), (EDX_7, 24), (EDX_7, 25), (XCR0, 17), (XCR0, 18)


@pytest.fixture(scope="module")
def choose(tmp_path_factory):
    """Targets for sets of features that are masked, from all targets of a library by default."""
    work = tmp_path_factory.mktemp("choose")
    spec_table.write(work, DIMS, "0")
    # The set of AMX has kernels to try.
    decisions = lightning_indexer.DEFAULT["x86-64-v4-amx"]
    tried = {types: "scores" for types in (("bfloat16", "bfloat16"), ("int8", "int8"))}
    rows = {"x86-64-v4-amx": {"lightning_indexer": [Kernels(INT32_MAX, INT32_MAX, decisions, tried)]}}
    targets = [(target, rows.get(target, {})) for target in reversed(DEFAULT_TARGETS["x86_64"])]
    (work / "table.c").write_text(kernel_table.source(targets))
    source = link.export_directory() / "src"
    sources = [Path(__file__).parent.parent / "c" / "choose.c", source / "common" / "error.c", source / "cpu/kernels.c"]
    sources += [work / "table.c", work / "specs.c"]
    link.run(["cc", *link.flags(work), *map(str, sources), "-lpthread", "-o", f"{work}/choose"])

    def run(masks, wanted="", tiles=""):
        words = []
        for mask in masks:
            found = [2**32 - 1] * 7
            for word, bit in mask:
                found[word] &= ~(1 << bit)
            words += map(str, found)
        environment = os.environ | {"DSA_TVM_TARGET": wanted, "TILES": tiles}
        done = subprocess.run([f"{work}/choose", *words], capture_output=True, check=True, text=True, env=environment)
        return done.stdout.splitlines()

    return run


def test_the_best_target_that_runs_is_taken(choose):
    expected = {
        (): "x86-64-v4-amx",
        **{(bit,): "x86-64-v4-bf16" for bit in AMX},  # Granite Rapids under a hypervisor or a kernel without tiles
        AMX: "x86-64-v4-bf16",
        (AVX512_BF16,): "x86-64-v4-vnni",  # Cascade Lake, Ice Lake
        (AVX512_VNNI,): "x86-64-v4",  # whatever else it has: bf16 needs both, 512 bits are better than AVX-VNNI
        (AVX512_VNNI, AVX_VNNI, AVX512_BF16): "x86-64-v4",  # Skylake
        (AVX512F,): "x86-64-v3-vnni",  # Alder Lake
        (AVX512F, AVX_VNNI): "x86-64-v3",  # Haswell
        (AVX512F, AVX_VNNI, AVX512_VNNI, AVX512_BF16): "x86-64-v3",
        (AVX2,): "x86-64-v2",
        tuple((word, bit) for word in range(7) for bit in range(32)): (
            "this CPU runs none of the library's targets (x86-64-v4-amx, x86-64-v4-bf16, x86-64-v4-vnni, "
            "x86-64-v4, x86-64-v3-vnni, x86-64-v3, x86-64-v2)"
        ),
    }
    assert choose(list(expected)) == list(expected.values())


def test_what_linux_says_of_arm_cpus(tmp_path):
    """The bits of AT_HWCAP and AT_HWCAP2 as Linux numbers them: ASIMDDP in the one, I8MM and BF16 in the other."""
    program = Path(__file__).parent.parent / "c" / "arm_features.c"
    link.run(["cc", f"-I{link.export_directory() / 'src'}", str(program), "-o", f"{tmp_path}/arm"])
    dotprod, i8mm, bf16, all_but = 1 << 20, 1 << 13, 1 << 14, 2**64 - 1
    words = {
        (0, 0): "",
        (0x1100FF, 0): "dotprod ",  # Neoverse N1
        (all_but ^ dotprod, 0): "",
        (0, dotprod | 1 << 9 | 1 << 12): "",  # those of SVE, and a bit of the other word
        (dotprod, i8mm): "dotprod i8mm ",
        (dotprod, bf16): "dotprod bf16 ",
        (all_but, all_but): "dotprod i8mm bf16 ",
        (i8mm | bf16, 0): "",
    }
    arguments = [str(word) for pair in words for word in pair]
    done = subprocess.run([f"{tmp_path}/arm", *arguments], capture_output=True, check=True, text=True)
    assert done.stdout.splitlines() == [f"{expected}." for expected in words.values()]
    table = kernel_table.source([(target, {}) for target in DEFAULT_TARGETS["aarch64"]])
    for target, needs in {
        "aarch64": "0",
        "aarch64-dotprod": "ARM_DOTPROD",
        "aarch64-i8mm": "ARM_DOTPROD | ARM_I8MM",
        "aarch64-bf16": "ARM_DOTPROD | ARM_I8MM | ARM_BF16",
    }.items():
        assert f'{{"{target}", 0, {needs}, ' in table


@pytest.mark.parametrize(
    ("target", "needed"),
    [
        ("x86-64-v3", [AVX2]),
        ("x86-64-v3-vnni", [AVX2, AVX_VNNI]),
        ("x86-64-v4-vnni", [AVX512F, AVX512_VNNI]),
        ("x86-64-v4-bf16", [AVX512F, AVX512_VNNI, AVX512_BF16]),
        ("x86-64-v4-amx", [AVX512F, AVX512_VNNI, AVX512_BF16, *AMX]),
    ],
)
def test_a_target_that_is_asked_for_runs_or_is_refused(target, needed, choose):
    refused = f"DSA_TVM_TARGET: expected a target this CPU runs, got {target}"
    assert choose([(), *((feature,) for feature in needed)], target) == [target, *[refused] * len(needed)]


@pytest.mark.parametrize("tiles", ["refused", "wrong", "failing"])
def test_tiles_are_used_only_where_linux_allows_them_and_they_are_right(tiles, choose):
    """The program ends itself if a kernel runs before both CPUID and Linux have said yes."""
    assert choose([()], tiles=tiles) == ["x86-64-v4-bf16"]
    refused = "DSA_TVM_TARGET: expected a target this CPU runs, got x86-64-v4-amx"
    assert choose([()], "x86-64-v4-amx", tiles) == [refused]
    # Nobody asks for them for another target's sake.
    assert choose([(), AMX], "x86-64-v4-bf16", tiles) == ["x86-64-v4-bf16"] * 2
