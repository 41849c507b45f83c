"""Every record that comes with the package: whole, of these operators, replayed on symbolic lengths and checked."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from dsa_tvm.schedules import CPU, CpuSpace, cpu_variants, space

from dsa_tvm import presets, records
from dsa_tvm.build import objects, plan
from dsa_tvm.build.candidates import Linker, compile_kernel
from dsa_tvm.ops import OPS
from dsa_tvm.runtime import library
from dsa_tvm.tuning import measure
from dsa_tvm.tuning.problem import Problem
from dsa_tvm.tuning.tasks import Task, irregular

READ, DAMAGED = records.read_directory(records.default_directory())
PLACES = sorted({(r.target, r.op) for r in READ})


def test_whole():
    assert not DAMAGED
    assert all(r.kind == "final" and r.error is None for r in READ)


def runs(target):
    """Whether this machine runs the library's kernels for `target`."""
    environment = {**os.environ, "DSA_TVM_TARGET": target}
    code = "import dsa_tvm; dsa_tvm.active_target()"
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True).returncode == 0


def rows_of(target, op):
    """What a library is built with, by element types."""
    return plan.make([target], READ, presets.get(presets.DEFAULT), print)[target][op]


@pytest.fixture(
    scope="module",
    params=[(target, op, v) for target, op in PLACES for v in cpu_variants(op, target) if v in OPS[op].variants],
    ids=lambda x: "-".join((*x[:2], *x[2].values())),
)
def place(request, tmp_path_factory):
    """A target, an operator and element types, and what links and loads candidates of them."""
    target, op, variant = request.param
    if not runs(target):
        pytest.skip(f"this machine does not run {target}")
    directory = tmp_path_factory.mktemp("shipped")
    default = directory / "default.o"
    compile_kernel(op, variant, target, CPU[op].DEFAULT[target], "default", default)
    linker = Linker(op, tuple(variant.values()), target)
    return target, op, variant, default, linker, directory


def test_replay(place):
    """The decisions of each record, in every element type that they decide for, on lengths that no tile divides.

    Those that a library does not hold are replayed in the types that they were measured in.
    """
    import tvm

    target, op, variant, default, linker, directory = place
    types = tuple(variant.values())
    mine = [r for r in READ if (r.target, r.op) == (target, op)]
    held = [row.decisions for row in rows_of(target, op)[types]]
    task = Task(op, target, presets.get("deepseek-v3.2"), 5, 3001, types)
    work = irregular(task)
    problem = Problem.of(work, variant, range(work.lengths["s_q"]))
    replayed = [r.decisions for r in mine if r.types == types or r.decisions in held]
    for i, decisions in enumerate({tuple(sorted(d.items())): d for d in replayed}.values()):
        chosen = space.kernel_decisions(CpuSpace(CPU[op], variant, target), decisions)
        candidate = directory / f"{i}.o"
        compile_kernel(op, variant, target, chosen, "candidate", candidate)
        path = directory / f"{i}.so"
        linker.link(default, CPU[op].DEFAULT[target], candidate, chosen, path)
        module = tvm.runtime.load_module(str(path))
        for threads in (1, 3):
            measure.check(module, tvm.cpu(), problem, measure.CANDIDATE, threads)


@pytest.mark.parametrize(("target", "op"), PLACES)
def test_installed_library_uses_them(target, op):
    """The library that was built with the package holds what the records say."""
    manifest = library.verify(library.default_path())
    if target not in manifest["kernels"]:
        pytest.skip(f"the library has no kernels for {target}")
    expected = [
        {"s_q": row.s_q_max, "s_kv": row.s_kv_max, "decisions": dict(row.decisions)}
        for rows, _ in objects.shared(rows_of(target, op))
        for row in rows
    ]
    assert manifest["kernels"][target][op] == expected
