"""Builds libraries for other sizes and machines, and for every CPU level that this machine runs."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from compare import assert_close, tolerance_of
from devices import float_target
from other_library import in_use
from samples import attention_inputs, flatten, indexer_inputs
from tuning_records import make

import dsa_tvm
from dsa_tvm import presets
from dsa_tvm.build.command import DEFAULT_TARGETS
from dsa_tvm.ops import OPS
from dsa_tvm.records import Log
from dsa_tvm.runtime import library
from dsa_tvm.spec import INT32_MAX

pytest.importorskip("tvm", reason="building needs apache-tvm")

HERE = Path(__file__).parent


def cli(*arguments):
    command = [sys.executable, "-m", "dsa_tvm.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


#: Decisions that a search might have found, by the bucket in which they were fastest.
FOUND = {
    ("lightning_indexer", 1, 2048): {"rows": 1, "min_keys": 64, "tasks_per_thread": 2},
    ("topk", 1, 4096): {"slack": 512, "scan": 48, "sample": 128},
    ("topk", 16, 32768): {"slack": 4096, "scan": 128, "sample": 1024},
    ("sparse_mla", 16, 32768): {"block_keys": 96},
}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A library for more sizes, built from records of which some are damaged or unusable."""
    from dsa_tvm.schedules import CPU

    target = float_target()
    logs, out = tmp_path_factory.mktemp("logs"), tmp_path_factory.mktemp("lib")
    kinds = {"kind": "final", "target": target}
    for (op, s_q, s_kv), changed in FOUND.items():
        decisions = asdict(CPU[op].DEFAULT[target]) | changed
        Log(logs / target / f"{op}.jsonl").append(make(op, (s_q, s_kv), decisions=decisions, **kinds))
    topk = Log(logs / target / "topk.jsonl")
    # These claim to be faster: one makes no progress, one is refused by the factory, one is from another version.
    for wrong in ({"slack": 2048, "scan": 0, "sample": 128}, {"slack": 2048, "scan": 17, "sample": 128}, {"wide": 1}):
        topk.append(make("topk", (1, 32768), (9, 9), decisions=wrong, **kinds))
    with open(topk.path, "a") as file:
        file.write("not a record\n")
    sizes = ("--d-idx", 96, "--d-idx", 1024, "--d-qk", 1024, "--d-v", 256)
    return out / library.LIBRARY_NAME, cli("build", *sizes, "--records", logs, "--target", target, "--out", out)


def test_other_sizes(tuned):
    """The advice in the error for an unserved size works."""
    arguments = indexer_inputs(np.random.default_rng(0), OPS["lightning_indexer"].variants[0], h_idx=5, d_idx=96)
    with pytest.raises(dsa_tvm.ArgumentError, match="dsa-tvm build --d-idx 96"):
        dsa_tvm.lightning_indexer(**arguments)
    assert library.verify(tuned[0])["served"]["d_idx"] == [32, 64, 96, 128, 1024]
    with in_use(tuned[0]):
        (expected,) = OPS["lightning_indexer"].reference(**arguments)
        np.testing.assert_allclose(dsa_tvm.lightning_indexer(**arguments), expected, rtol=1e-5, atol=1e-5)
        q, kv = np.ones((1, 2, 512), np.float32), np.ones((4, 512), np.float32)
        assert dsa_tvm.sparse_mla(q, kv, np.zeros((1, 1), np.int32), sm_scale=1, d_v=256)[0].shape == (1, 2, 256)


def test_sums_over_the_widest_keys_hold_the_tolerance(tuned):
    """Sums of 1024 equal products, whose rounding errors all have the same sign."""
    rng = np.random.default_rng(0)
    index = flatten(indexer_inputs(rng, OPS["lightning_indexer"].variants[0], s_kv=999, h_idx=5, d_idx=1024))
    index["k"][:] = np.linspace(0.5, 1, 999, dtype=np.float32)[:, None]
    attention = flatten(attention_inputs(rng, "float32", s_kv=999, h_q=5, d_qk=1024, topk=2))
    attention["kv"][:] = np.linspace(0.1, 0.2, 999, dtype=np.float32)[:, None]
    with in_use(tuned[0]):
        for op, arguments in {
            "lightning_indexer": index,
            "sparse_mla": attention | {"sm_scale": 0.1, "d_v": 256},
        }.items():
            outputs = as_tuple(getattr(dsa_tvm, op)(**arguments))
            for tensor, x, y in zip(OPS[op].outputs, outputs, OPS[op].reference(**arguments), strict=True):
                assert_close(x, y, tolerance_of(OPS[op], tensor.name, "float32"))


def test_a_damaged_log_does_not_stop_a_build(tuned):
    path, done = tuned
    assert done.returncode == 0, done.stderr
    assert "topk.jsonl:6: not a JSON record" in done.stderr
    # DEFAULT's 13, 2 more of topk, 4 of sparse_mla (a type each). Those of the indexer differ in what a task takes.
    assert "compiling 19 kernels" in done.stderr
    assert done.stderr.count("leaving out a record of topk") == 3 and "scan: expected 16.." in done.stderr
    library.verify(path)


def test_the_manifest_says_which_decisions_serve_what(tuned):
    from dsa_tvm.schedules import CPU

    target = float_target()
    rows = library.verify(tuned[0])["kernels"][target]
    for op, module in CPU.items():
        default = asdict(module.DEFAULT[target])
        for s_q, s_kv in {key[1:] for key in FOUND if key[0] == op} | {(1, 32768), (128, 131072)}:
            row = next(r for r in rows[op] if s_q <= r["s_q"] and s_kv <= r["s_kv"])
            assert row["decisions"] == default | FOUND.get((op, s_q, s_kv), {}), (op, s_q, s_kv)


@pytest.mark.parametrize("s_q", [1, 19])
@pytest.mark.parametrize("s_kv", [1, 1999, 20011])
def test_the_buckets_of_a_tuned_library(tuned, s_q, s_kv):
    """Lengths that no tile divides give correct values, and the same bits for any number of threads."""
    rng = np.random.default_rng(s_kv)
    width = min(s_kv, 389)
    index = indexer_inputs(rng, OPS["lightning_indexer"].variants[0], s_q=s_q, s_kv=s_kv, h_idx=9, d_idx=32)
    index["ke"] = np.maximum(index["ke"], 0)
    attention = attention_inputs(rng, "float32", s_q=s_q, s_kv=s_kv, h_q=9, topk=width)
    logits = rng.standard_normal((s_q, s_kv)).astype(np.float32)
    calls = {
        "lightning_indexer": index,
        "topk": {"logits": logits, "ks": index["ks"], "ke": index["ke"], "topk": width},
        "indexer_topk": index | {"topk": width},
        "sparse_mla": attention | {"sm_scale": 576**-0.5, "d_v": 512},
    }
    with in_use(tuned[0]):
        for op, arguments in calls.items():
            alone = as_tuple(getattr(dsa_tvm, op)(**arguments, num_threads=1))
            for num_threads in range(2, 9):
                others = as_tuple(getattr(dsa_tvm, op)(**arguments, num_threads=num_threads))
                assert all(map(np.array_equal, others, alone)), (op, num_threads)
            if op == "indexer_topk":  # the reference ranks float64 logits; near ties it may differ
                arguments = calls["topk"] | {"logits": dsa_tvm.lightning_indexer(**index)}
            reference = OPS[op.removeprefix("indexer_")].reference(**arguments)
            for tensor, actual, expected in zip(OPS[op].outputs, alone, reference, strict=True):
                assert_close(actual, expected, OPS[op].tolerance.get(tensor.name, {}).get("float32"))


def as_tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def test_without_records_every_kernel_is_the_default_one(monkeypatch):
    from dsa_tvm.schedules import CPU

    from dsa_tvm import records
    from dsa_tvm.build import command as build
    from dsa_tvm.build import plan

    parser = argparse.ArgumentParser()
    build.add_arguments(parser)
    logs = []
    monkeypatch.setattr(build, "build", lambda out, **options: logs.append(options["logs"]))
    for arguments in ([], ["--records", "none"], ["--records", "somewhere"]):
        build.run(parser.parse_args(["--out", "lib", *arguments]), "0")
    assert logs == [records.default_directory(), None, Path("somewhere")] and logs[0].is_dir()
    rows = plan.make(["x86-64-v3"], [], presets.get("glm-5"), pytest.fail)["x86-64-v3"]
    for op, module in CPU.items():
        for (row,) in rows[op].values():
            assert row.decisions == asdict(module.DEFAULT["x86-64-v3"])
            assert row.s_q_max == row.s_kv_max == INT32_MAX


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target", "z80"], "target: expected one of"),
        (["--d-idx", "7"], "d_idx: expected a multiple of 32"),
        (["--d-v", "2048"], "d_v: expected a multiple of 64 in 64..1024, got 2048"),
        (["--cc", "no-such-compiler"], "cc: expected a C compiler"),
        (["--records", "no-such-directory"], "tuning logs: expected a directory, got "),
        (["--preset", "no-such-model"], "preset: expected one of"),
    ],
)
def test_refusals(tmp_path, arguments, words):
    done = cli("build", "--out", tmp_path / "lib", *arguments)
    assert done.returncode == 1 and words in done.stderr
    assert not list(tmp_path.glob("lib/*"))


@pytest.mark.parametrize("target", DEFAULT_TARGETS["x86_64"])
def test_every_level_this_cpu_runs(target):
    """Runs the tests of the operators again, on the kernels that the library does not pick here."""
    if target not in library.verify(library.default_path())["targets"]:
        pytest.skip(f"the library has no kernels for {target}")
    if target == dsa_tvm.active_target():
        pytest.skip(f"{target} is in use: the other tests ran on it")
    names = ("lightning_indexer", "topk", "sparse_mla", "threads", "guard_pages")
    files = [HERE.parent / "ops" / f"test_{name}.py" for name in names]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"DSA_TVM_TARGET": target})
    if "expected a target this CPU runs" in done.stdout:
        pytest.skip(f"this CPU does not run {target}")
    assert done.returncode == 0, done.stdout[-3000:]


def test_decisions_that_do_not_divide_are_refused():
    """A tile that does not fit would leave part of the output unwritten."""
    from dsa_tvm.schedules import CPU

    wrong = {"lightning_indexer": {"block_keys": 49}, "topk": {"scan": 17}, "sparse_mla": {"values": 48}}
    for op, module in CPU.items():
        with pytest.raises(ValueError, match=f"{op}: decisions that do not divide"):
            replace(module.DEFAULT["x86-64-v3"], **wrong[op])


AARCH64_CC = "aarch64-linux-gnu-gcc"
EMULATOR = "qemu-aarch64"


def test_aarch64_kernels_compile(tmp_path):
    from dsa_tvm.build import objects, plan

    rows = plan.make(DEFAULT_TARGETS["aarch64"], [], presets.get("glm-5"), pytest.fail)
    for compiled in objects.compile_objects(rows, tmp_path, lambda line: None).values():
        header = compiled.object.read_bytes()[:20]
        assert header[:4] == b"\x7fELF" and header[18] == 183  # EM_AARCH64


@pytest.mark.skipif(not shutil.which(AARCH64_CC), reason=f"{AARCH64_CC} is not installed")
@pytest.mark.skipif(not shutil.which(EMULATOR), reason=f"{EMULATOR} is not installed")
def test_aarch64_runs_under_emulation(tmp_path):
    done = cli("build", "--target", "aarch64", "--cc", AARCH64_CC, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    include = Path(dsa_tvm.__file__).parent / "include"
    program = tmp_path / "embed"
    link = [f"-L{tmp_path}", "-ldsa_tvm", "-lm", f"-Wl,-rpath,{tmp_path}"]
    source = str(HERE.parent / "c" / "embed.c")
    subprocess.run([AARCH64_CC, source, f"-I{include}", *link, "-o", str(program)], check=True)
    done = subprocess.run(
        [EMULATOR, "-L", "/usr/aarch64-linux-gnu", str(program)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "target aarch64" in done.stdout, done.stdout + done.stderr
