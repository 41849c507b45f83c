"""Every CUDA kernel compiles for every architecture, without spills and within the shared memory of its GPUs."""

from __future__ import annotations

import hashlib
import shutil
import subprocess

import pytest
from test_build import cli

from dsa_tvm.errors import BuildError
from dsa_tvm.spec import DIMS

pytest.importorskip("tvm", reason="building needs apache-tvm")

from dsa_tvm.schedules import CUDA_ARCHS
from dsa_tvm.schedules.cuda.source import DEVICE_HEADERS

from dsa_tvm.compiler import cuda, cuda_kernels, resources

NVCC = shutil.which("nvcc")

#: Shared memory a block can have, in KiB.
SHARED = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90a": 227, "sm_100": 227, "sm_120": 99, "compute_80": 99}


@pytest.fixture(scope="module")
def sets():
    return cuda.generate(CUDA_ARCHS, DIMS)


@pytest.mark.skipif(not NVCC, reason="nvcc is not installed")
@pytest.mark.parametrize("op", cuda_kernels.OPERATORS)
def test_every_kernel_compiles_for_every_architecture(op, sets, request, tmp_path):
    """What compiled once is not compiled again: nvcc's words are kept with pytest's cache."""
    version = subprocess.run([NVCC, "--version"], capture_output=True, text=True).stdout
    headers = "".join(path.read_text() for path in sorted(DEVICE_HEADERS.iterdir()))
    said = []
    for i, kernels in enumerate(sets):
        unit = next(unit for unit in kernels.units if unit.op == op)
        key = hashlib.sha256("".join((version, headers, unit.text, *kernels.targets)).encode()).hexdigest()
        words = request.config.cache.get(f"cuda/{key}", None)
        if words is None:
            _, words = cuda.compile_unit(unit, kernels.targets, tmp_path / f"{i}.fatbin", NVCC)
            request.config.cache.set(f"cuda/{key}", words)
        said.append(words)
    entries = resources.parse(said, sets)
    symbols = {f.symbol for unit in sets[0].units if unit.op == op for f in unit.functions}
    assert {(e["kernel"], e["arch"]) for e in entries} == {(s, arch) for s in symbols for arch in CUDA_ARCHS}
    for entry in entries:
        assert entry["registers"] and not entry["spill_stores"] + entry["spill_loads"] + entry["stack"], entry
        assert entry["static_shared"] == 0 and entry["dynamic_shared"] <= SHARED[entry["arch"]] << 10, entry


def test_shared_memory(sets):
    for kernels in sets:
        most = min(SHARED[target] for target in kernels.targets) << 10
        for unit in kernels.units:
            for function in unit.functions:
                assert 0 <= function.kernel.shared_bytes <= most, function.symbol
                assert function.threads % 32 == 0 and 32 <= function.threads <= 1024


def test_sets_have_the_same_symbols(sets, monkeypatch):
    from dsa_tvm.schedules.cuda import topk

    default = topk.DEFAULT["cuda"]
    monkeypatch.setitem(topk.DEFAULT, "sm_90a", topk.Decisions(1024, *list(vars(default).values())[1:]))
    monkeypatch.setattr(cuda, "OPERATORS", {"topk": cuda_kernels.OPERATORS["topk"]})
    first, second = cuda.generate(("sm_80", "sm_90a", "sm_120"), DIMS)
    assert (first.archs, first.ptx) == (("sm_80", "sm_120"), "compute_80")
    assert (second.archs, second.ptx) == (("sm_90a",), None)
    assert [f.symbol for f in first.units[0].functions] == [f.symbol for f in second.units[0].functions]
    assert {f.threads for f in second.units[0].functions} == {1024}


def test_architectures():
    assert cuda.check_archs([]) == CUDA_ARCHS
    assert cuda.check_archs(["sm_120", "sm_90a", "sm_90", "sm_90"]) == ("sm_90", "sm_90a", "sm_120")
    for wrong in ("sm_75", "90", "compute_90", ""):
        with pytest.raises(BuildError, match="arch: expected sm_80 or later"):
            cuda.check_archs([wrong])


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
        **{"kernel": "dsa_topk__rows", "arch": "sm_90a", "registers": 64, "stack": 8},
        **{"spill_stores": 4, "spill_loads": 12, "static_shared": 16},
    }
    words = ["dsa_topk__rows", "sm_90a", "64", "8", "4", "12", "16", "90000"]
    manifest = {"kernels": {}, "cuda": {"resources": [entry | {"dynamic_shared": 90000}]}}
    assert [line.split() for line in resources.lines(manifest)][1] == words


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target", "cuda", "--nvcc", "no-such-nvcc"], "nvcc: expected NVIDIA's CUDA compiler, got no-such-nvcc"),
        (["--arch", "sm_90"], "arch: expected --target cuda beside it"),
        (["--target", "cuda", "--arch", "sm_70", "--nvcc", "true"], "arch: expected sm_80 or later"),
        (["--target", "cuda", "--target", "x86-64-v3", "--nvcc", "false"], "false -std=c++17"),
    ],
)
def test_refusals(tmp_path, arguments, words):
    done = cli("build", "--out", tmp_path / "lib", *arguments)
    assert done.returncode == 1 and words in done.stderr, done.stderr
    assert not list(tmp_path.glob("lib/*"))
