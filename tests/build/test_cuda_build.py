"""Every CUDA kernel compiles for every architecture, without spills and within the shared memory of its GPUs."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from test_build import cli

import dsa_tvm.build.command
from dsa_tvm.errors import BuildError
from dsa_tvm.gpu import architectures
from dsa_tvm.runtime import library
from dsa_tvm.spec import DIMS

pytest.importorskip("tvm", reason="building needs apache-tvm")

from dsa_tvm.schedules import CUDA_ARCHS
from dsa_tvm.schedules.cuda.source import DEVICE_HEADERS, translation_unit

from dsa_tvm.build.cuda import fatbins
from dsa_tvm.build.cuda import kernels as cuda_kernels
from dsa_tvm.build.cuda import report as resources

NVCC = shutil.which("nvcc")

#: Shared memory of a block in KiB.
SHARED = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90a": 227, "sm_100": 227, "sm_120": 99, "compute_80": 99}


@pytest.fixture(scope="module")
def sets(cuda_sets):
    return cuda_sets


@pytest.fixture(scope="module")
def compiled(cuda_built):
    """The part of the manifest about CUDA kernels."""
    if not NVCC:
        pytest.skip("nvcc is not installed")
    return library.verify(cuda_built)["cuda"]


@pytest.fixture(scope="module")
def entries(compiled):
    """What the assembler says about every kernel, for every architecture."""
    return compiled["resources"]


def test_every_kernel_compiles_for_every_architecture(entries, sets):
    expected = {
        (function.symbol, arch)
        for kernels in sets
        for arch in kernels.archs
        for unit in kernels.units
        for function in unit.functions
    }
    assert {(e["kernel"], e["arch"]) for e in entries} == expected


def test_registers_and_shared_memory(entries):
    for entry in entries:
        assert entry["registers"] and not entry["spill_stores"] + entry["spill_loads"] + entry["stack"], entry
        assert entry["static_shared"] == 0 and entry["dynamic_shared"] <= SHARED[entry["arch"]] << 10, entry


def test_the_assembler_did_what_was_meant(compiled):
    """It did not serialize products of warpgroups, did not insert waits, and lets registers change hands."""
    assert compiled["remarks"] == []


def test_blocks_of_a_multiprocessor(entries):
    """Two blocks of Hopper's indexer for many queries fit, so that one sums while the other multiplies."""
    blocks = {(e["kernel"], e["arch"]): e["blocks"] for e in entries}
    assert min(blocks.values()) >= 1
    many = {count for (kernel, _), count in blocks.items() if "hopper_many" in kernel}
    assert many == {2}


#: Registers per thread at launch, by threads per block. The warpgroups redistribute them with setmaxnreg.
LAUNCHED_WITH = {256: 128, 384: 168, 640: 96}


def test_registers_of_kernels_that_share_them_out(entries):
    """With fewer registers, the last warpgroup would wait for ever."""
    found = {
        e["kernel"]: (e["threads"], e["registers"])
        for e in entries
        if e["arch"] == "sm_90a" and ("__hopper" in e["kernel"])
    }
    assert {threads for threads, _ in found.values()} == set(LAUNCHED_WITH)
    wrong = {kernel: taken for kernel, taken in found.items() if taken[1] != LAUNCHED_WITH[taken[0]]}
    assert not wrong


@pytest.mark.parametrize(
    ("op", "stage", "shares"),
    [
        ("lightning_indexer", "hopper_many", "24 and 1 times 232"),
        ("lightning_indexer", "hopper_few", "32 and 4 times 112"),
        ("sparse_mla", "attend__hopper", "88 and 2 times 208"),
        ("sparse_mla_fp8", "attend__hopper", "88 and 2 times 208"),
    ],
)
def test_a_kernel_that_would_hang_is_not_built(op, stage, shares):
    """Simulates another nvcc, whose kernels start with 8 registers less."""
    kernels = cuda_kernels.OPERATORS[op]("sm_90a", DIMS, lambda *described: described[-1])
    unit = fatbins.make_unit(op, [next(k for k in kernels if f"__{stage}__" in k.symbol(op))])
    (function,) = unit.functions
    threads = function.threads

    def said(registers):
        return (
            f"ptxas info    : Compiling entry function '{function.symbol}' for 'sm_90a'\n"
            f"ptxas info    : Function properties for {function.symbol}\n"
            "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
            f"ptxas info    : Used {registers} registers, used 2 barriers\n"
        )

    resources.expect_registers(said(LAUNCHED_WITH[threads]), unit)
    words = f"{function.symbol}: expected at least {LAUNCHED_WITH[threads]} registers per thread.*{shares}, got"
    with pytest.raises(BuildError, match=words):
        resources.expect_registers(said(LAUNCHED_WITH[threads] - 8), unit)


#: Loads for tensor cores and asynchronous copies; and in kernels of warpgroups bulk or gathered copies, barriers in
#: shared memory, and registers that change hands.
WARPS = ("LDSM", "LDGSTS")
BULK = ("UTMALDG", "SYNCS", "USETMAXREG")
GATHERED = ("LDGSTS", "SYNCS", "USETMAXREG")

#: Instructions of some kernels: products by tensor cores and by warpgroups, of 16 and of 8 bits, and what goes with
#: them.
MEANT = {
    ("sm_80", "lightning_indexer__many__bfloat16__bfloat16__128"): ("HMMA.16816.F32.BF16", *WARPS),
    ("sm_80", "sparse_mla__attend__bfloat16__576__512"): ("HMMA.16816.F32.BF16", *WARPS),
    ("sm_80", "lightning_indexer__many__float8_e4m3fn__float8_e4m3fn__128"): ("HMMA.16816.F32", *WARPS),
    ("sm_89", "lightning_indexer__many__float8_e4m3fn__float8_e4m3fn__128"): ("QMMA.16832.F32.E4M3.E4M3", "LDSM"),
    ("sm_120", "lightning_indexer__few__float8_e4m3fn__float8_e4m3fn__64"): ("QMMA.16832.F32.E4M3.E4M3", "LDSM"),
    ("sm_90a", "lightning_indexer__many__float8_e4m3fn__float8_e4m3fn__128"): ("HMMA.16816.F32", *WARPS),
    **{
        (arch, "lightning_indexer__many__int8__int8__128"): ("IMMA.16832.S8.S8", *WARPS)
        for arch in ("sm_80", "sm_90a", "sm_100", "sm_120")
    },
    ("sm_120", "sparse_mla__attend__float16__576__512"): ("HMMA.16816.F32", *WARPS),
    **{
        ("sm_90a", f"lightning_indexer__{stage}__{name}__{name}__128__64"): (product, *BULK)
        for stage in ("hopper_many", "hopper_few")
        for name, product in (("bfloat16", "HGMMA"), ("float8_e4m3fn", "QGMMA"))
    },
    ("sm_90a", "lightning_indexer__hopper_many__float16__float16__64__32"): ("HGMMA", *BULK),
    **{
        (arch, "sparse_mla__attend__bfloat16__576__512__16"): ("HMMA.16816.F32.BF16", *WARPS)
        for arch in ("sm_80", "sm_89", "sm_100")
    },
    ("sm_90a", "sparse_mla__attend__bfloat16__576__512"): ("HMMA.16816.F32.BF16", *WARPS),
    ("sm_90a", "sparse_mla__attend__hopper__bfloat16__576__512"): ("HGMMA", *GATHERED),
    ("sm_86", "sparse_mla_fp8__attend__bfloat16__576__512"): ("HMMA.16816.F32.BF16", *WARPS),
    ("sm_90a", "sparse_mla_fp8__attend__hopper__bfloat16__576__512"): ("HGMMA", *GATHERED),
}


@pytest.mark.parametrize(("arch", "kernel"), MEANT)
def test_instructions(arch, kernel, sets, tmp_path):
    """Looks at the machine code with the disassembler, not at the source."""
    if not NVCC:
        pytest.skip("nvcc is not installed")
    disassembler = find_disassembler()
    if not disassembler:
        pytest.skip("nvdisasm is not installed: pip install nvidia-cuda-nvdisasm")
    kernels = next(s for s in sets if arch in s.archs)
    (function,) = [f for unit in kernels.units for f in unit.functions if f.symbol == f"dsa_{kernel}"]
    (tmp_path / "kernel.cu").write_text(translation_unit([function.definition]))
    (tmp_path / "headers").symlink_to(DEVICE_HEADERS)  # nvcc does not quote paths for its shell
    flags = ["-std=c++17", "-O3", "-I", "headers", "-diag-suppress", "177"]
    code = f"arch=compute_{arch.removeprefix('sm_')},code={arch}"
    command = [NVCC, *flags, "-Xptxas", "-v", "-gencode", code, "-cubin", "-o", "kernel.cubin", "kernel.cu"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stderr
    assert "(C75" not in said, said
    # A kernel has no variables. If there is one, inline assembly takes the address of something else.
    assert " 0 bytes gmem" in said, said
    disassembled = [disassembler, "-c", str(tmp_path / "kernel.cubin")]
    machine_code = subprocess.run(disassembled, capture_output=True, text=True, check=True).stdout
    assert [word for word in MEANT[arch, kernel] if word not in machine_code] == []
    assert not re.search(r"\b(LDL|STL)\b", machine_code)


def find_disassembler():
    """The disassembler on PATH or from NVIDIA's package."""
    spec = importlib.util.find_spec("nvidia")
    places = [Path(place) for place in spec.submodule_search_locations or ()] if spec else []
    found = [str(path) for place in places for path in place.glob("**/bin/nvdisasm")]
    return shutil.which("nvdisasm") or next(iter(found), None)


def test_shared_memory(sets):
    for kernels in sets:
        most = min(SHARED[target] for target in kernels.targets) << 10
        for unit in kernels.units:
            for function in unit.functions:
                assert 0 <= function.kernel.shared_bytes <= most, function.symbol
                assert function.threads % 32 == 0 and 32 <= function.threads <= 1024


def test_products_of_each_architecture(sets):
    """fp8 is multiplied as fp8 on the architectures that can, and never in PTX for later GPUs."""
    found = {}
    for kernels in sets:
        (symbol, product), *_ = [
            (f.symbol, f.kernel.product)
            for unit in kernels.units
            for f in unit.functions
            if f.kernel.variant == dict.fromkeys("TK", "float8_e4m3fn") and f.kernel.product
        ]
        text = next(unit.text for unit in kernels.units if symbol in unit.text)
        assert ("dsa_mma_e4m3(" in text) == (product == "float8_e4m3fn")
        found |= dict.fromkeys(kernels.targets, product)
    own = {"sm_89", "sm_120"}
    assert {target for target, product in found.items() if product == "float8_e4m3fn"} == own
    assert {target for target, product in found.items() if product == "float16"} == {*CUDA_ARCHS, "compute_80"} - own


def test_sets_have_the_same_symbols(sets, monkeypatch):
    from dsa_tvm.schedules.cuda.topk import kernel as topk

    default = topk.DEFAULT["cuda"]
    monkeypatch.setitem(topk.DEFAULT, "sm_90a", topk.Decisions(1024, *list(vars(default).values())[1:]))
    monkeypatch.setattr(fatbins, "OPERATORS", {"topk": cuda_kernels.OPERATORS["topk"]})
    first, second = fatbins.generate(("sm_80", "sm_90a", "sm_120"), DIMS)
    assert (first.archs, first.ptx) == (("sm_80", "sm_120"), "compute_80")
    assert (second.archs, second.ptx) == (("sm_90a",), None)
    assert [f.symbol for f in first.units[0].functions] == [f.symbol for f in second.units[0].functions]
    assert {f.threads for f in second.units[0].functions} == {1024}


def test_architectures():
    assert fatbins.check_archs([]) == CUDA_ARCHS
    assert fatbins.check_archs(["sm_120", "sm_90a", "sm_90", "sm_90"]) == ("sm_90", "sm_90a", "sm_120")
    for wrong in ("sm_75", "90", "compute_90", ""):
        with pytest.raises(BuildError, match="arch: expected sm_80 or later"):
            fatbins.check_archs([wrong])


def test_what_the_assembler_says_is_understood(sets):
    said = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'dsa_topk__rows' for 'sm_90a'
ptxas info    : Function properties for dsa_topk__rows
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 16 bytes smem, 440 bytes cmem[0]
"""
    (entry,) = resources.parse([said], sets)
    assert entry.pop("dynamic_shared") > 80 << 10
    assert entry == {
        **{"kernel": "dsa_topk__rows", "arch": "sm_90a", "threads": 512, "registers": 64, "stack": 8},
        **{"spill_stores": 4, "spill_loads": 12, "static_shared": 16, "blocks": 2},
    }
    words = ["dsa_topk__rows", "sm_90a", "512", "64", "8", "4", "12", "16", "90000", "2"]
    serialized = "(C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized in the function 'f'"
    remarks = resources.remarks([f"ptxas info    : {serialized}\n{said}", said, f"ptxas info    : {serialized}\n"])
    assert remarks == [serialized]
    manifest = {"kernels": {}, "cuda": {"resources": [entry | {"dynamic_shared": 90000}], "remarks": remarks}}
    lines = list(resources.lines(manifest))
    assert lines[1].split() == words and lines[2:] == remarks


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "blocks"),
    [
        ("sm_90a", 256, 128, 114744, 2),
        ("sm_90a", 256, 128, 116 << 10, 1),
        ("sm_90a", 384, 168, 0, 1),
        ("sm_80", 256, 33, 0, 6),
        ("sm_86", 256, 32, 0, 6),
        ("sm_86", 128, 32, 49 << 10, 2),
    ],
)
def test_resident_blocks(arch, threads, registers, shared, blocks):
    """The numbers are those of NVIDIA's tables of compute capabilities."""
    assert architectures.resident_blocks(arch, threads, registers, shared) == blocks


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target", "cuda", "--nvcc", "no-such-nvcc"], "nvcc: expected NVIDIA's CUDA compiler, got no-such-nvcc"),
        (["--arch", "sm_90"], "arch: expected --target cuda beside it"),
        (["--target", "cuda", "--arch", "sm_70", "--nvcc", "true"], "arch: expected sm_80 or later"),
    ],
)
def test_refusals(tmp_path, arguments, words):
    done = cli("build", "--out", tmp_path / "lib", *arguments)
    assert done.returncode == 1 and words in done.stderr, done.stderr
    assert not list(tmp_path.glob("lib/*"))


def test_a_failing_compiler_leaves_nothing(sets, tmp_path, monkeypatch):
    few = [replace(sets[0], units=sets[0].units[1:2])]
    monkeypatch.setattr(fatbins, "generate", lambda *described: few)
    with pytest.raises(BuildError, match=r"false -std=c\+\+17"):
        dsa_tvm.build.command.build(tmp_path / "lib", targets=("x86-64-v3", "cuda"), version="0", nvcc="false")
    assert not list(tmp_path.glob("lib/*"))
