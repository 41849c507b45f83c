"""Libraries for measuring, called through TVM's runtime as in a tuning job."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from devices import float_target
from samples import attention_inputs

import dsa_tvm
from dsa_tvm.errors import BuildError
from dsa_tvm.ops import OPS
from dsa_tvm.ops.element_types import PRODUCTS
from dsa_tvm.runtime import library

tvm = pytest.importorskip("tvm", reason="candidates are compiled by apache-tvm")
pytestmark = pytest.mark.skipif(not shutil.which("cc"), reason="there is no C compiler")

AARCH64_CC = "aarch64-linux-gnu-gcc"
S_Q, S_KV = 3, 500
FLOAT32 = PRODUCTS.index("float32")


def make(op, target, decisions, directory, cc="cc"):
    """A library with DEFAULT and with other decisions."""
    from dsa_tvm.schedules import CPU

    from dsa_tvm.build import candidates

    variant, default = OPS[op].variants[0], CPU[op].DEFAULT[target]
    linker = candidates.Linker(op, tuple(variant.values()), target, cc)
    objects = [directory / f"{suffix}.o" for suffix in candidates.SUFFIXES]
    for path, suffix, chosen in zip(objects, candidates.SUFFIXES, (default, decisions), strict=True):
        candidates.compile_kernel(op, variant, target, chosen, suffix, path)
    linker.link(objects[0], default, objects[1], decisions, directory / "candidate.so")
    return directory / "candidate.so"


def installed_decisions(op):
    """The decisions of the kernel that the installed library uses for our lengths."""
    from dsa_tvm.schedules import CPU

    rows = library.verify(library.default_path())["kernels"][float_target()][op]
    row = next(r for r in rows if r["s_q"] >= S_Q and r["s_kv"] >= S_KV)
    return CPU[op].Decisions(**row["decisions"])


@pytest.fixture(scope="module")
def attention(tmp_path_factory):
    """`sparse_mla`, with optional inputs and both kinds of attributes. Its bits depend on the decisions."""
    directory = tmp_path_factory.mktemp("attention")
    return make("sparse_mla", float_target(), installed_decisions("sparse_mla"), directory)


def local(path):
    return tvm.runtime.load_module(str(path)), tvm.cpu()


def through_rpc(path):
    """A module behind TVM's RPC server in this process."""
    session = tvm.rpc.LocalSession()
    session.upload(str(path))
    return session.load_module(path.name), session.cpu()


def packed(device, topk=77):
    """Arguments in the order of the operator."""
    inputs = attention_inputs(np.random.default_rng(0), "float32", s_q=S_Q, s_kv=S_KV, h_q=41, topk=topk)
    outputs = [np.full(shape, np.nan, np.float32) for shape in ((S_Q, 41, 512), (S_Q, 41), (S_Q, 41))]
    tensors = [tvm.runtime.tensor(x, device) for x in (*inputs.values(), *outputs)]
    return inputs, [*tensors[:3], None, None, 0.125, 512, *tensors[3:]]


@pytest.mark.parametrize("load", [local, through_rpc])
def test_same_bits_as_the_installed_library(attention, load):
    module, device = load(attention)
    inputs, arguments = packed(device)
    for num_threads in (1, 2, 5):
        expected = dsa_tvm.sparse_mla(**inputs, sm_scale=0.125, num_threads=num_threads)
        assert module["call"](1, num_threads, *arguments) is None
        assert all(np.array_equal(x.numpy(), y) for x, y in zip(arguments[-3:], expected, strict=True))
        # DEFAULT may give other bits, but not other values.
        module["call"](0, num_threads, *arguments)
        np.testing.assert_allclose(arguments[-3].numpy(), expected[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("load", [local, through_rpc])
def test_times(attention, load):
    module, device = load(attention)
    _, arguments = packed(device)
    seconds = [module["time"](which, 1, 3, *arguments) for which in (0, 1)]
    seconds.append(module.time_evaluator("call", device, number=3)(1, 1, *arguments).mean)
    assert all(1e-6 < x < 1 for x in seconds)
    rate = module["peak"](FLOAT32, 1, 20)
    flops = 2 * S_Q * 41 * 77 * (576 + 512)
    # A clock that rises in between is all that may lift a kernel above the limit.
    assert 1 < rate < 1e4 and flops / min(seconds) < 1.5e9 * rate
    assert module["peak"](FLOAT32, 2, 20) > 0.5 * rate and module["cpus"]() >= 1
    # The target of the kernels for float32 has no other products.
    assert module["peak"](PRODUCTS.index("bfloat16"), 1, 20) == 0


UNLOAD = """
import gc, os, sys
import numpy as np, tvm, tvm_ffi
def tasks():
    return set(os.listdir("/proc/self/task"))
module = tvm_ffi.load_module(sys.argv[1], keep_module_alive=False)
shapes = ((99, 41, 576), (9, 576), (99, 77), (99, 41, 512), (99, 41), (99, 41))
q, kv, indices, *outputs = (
    tvm.runtime.tensor(np.zeros(shape, np.int32 if i == 2 else np.float32)) for i, shape in enumerate(shapes)
)
before = tasks()
module["call"](0, 2, q, kv, indices, None, None, 0.125, 512, *outputs)
started = tasks() - before
assert started
del module
gc.collect()
assert sys.argv[1] not in open("/proc/self/maps").read() and not started & tasks()
"""


def test_its_threads_end_with_it(attention):
    """A search loads and unloads thousands of libraries, so their threads must end with them."""
    done = subprocess.run([sys.executable, "-c", UNLOAD, str(attention)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def changed(position, value):
    return lambda arguments: [*arguments[:position], value, *arguments[position + 1 :]]


WRONG = {
    "which: expected 0..1, got 2": changed(0, 2),
    "which: expected 0..1, got -1": changed(0, -1),
    "threads: expected 1..1024, got 0": changed(1, 0),
    "threads: expected an integer": changed(1, 1.5),
    "expected 12 arguments, got 11": lambda arguments: arguments[:-1],
    "expected 12 arguments, got 0": lambda arguments: [],
    "q: expected a tensor, got a null pointer": changed(2, None),
    "q: expected a tensor or None, got TVM type": changed(2, "q"),
    "indices: expected int32, got float32": lambda arguments: changed(4, arguments[2])(arguments),
    "sm_scale: expected a number": changed(7, None),
    "d_v: expected an integer": changed(8, 512.0),
    "d_v: expected d_v to be one this library serves": changed(8, 100),
    "lse: expected memory that does not overlap `max_logits`": lambda arguments: changed(11, arguments[10])(arguments),
    "lse: expected a tensor, got a null pointer": changed(11, None),
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_arguments_are_an_error(attention, words):
    module, device = local(attention)
    _, arguments = packed(device)
    with pytest.raises(ValueError, match=f"sparse_mla: {words}"):
        module["call"](*WRONG[words]([0, 1, *arguments]))
    assert np.isnan(arguments[-3].numpy()).all()


def test_wrong_arguments_of_the_others_are_an_error(attention):
    module, device = local(attention)
    _, arguments = packed(device)
    for name, wrong in {"time": [0, 1, 0, *arguments], "peak": [FLOAT32, 0, 20]}.items():
        with pytest.raises(ValueError, match="expected 1"):
            module[name](*wrong)
    with pytest.raises(ValueError, match="peak: expected 3 arguments, got 0"):
        module["peak"]()
    with pytest.raises(ValueError, match=f"product: expected 0..{len(PRODUCTS) - 1}, got {len(PRODUCTS)}"):
        module["peak"](len(PRODUCTS), 1, 20)


def test_other_element_types_are_an_error(attention):
    module, device = local(attention)
    _, arguments = packed(device)
    arguments[0], arguments[1] = (tvm.runtime.tensor(arguments[i].numpy().astype(np.float16)) for i in (0, 1))
    arguments[-3] = tvm.runtime.tensor(np.zeros((S_Q, 41, 512), np.float16))
    with pytest.raises(RuntimeError, match="no kernel for these element types"):
        module["call"](0, 1, *arguments)


def test_candidates_multiply_as_the_library_does(tmp_path):
    """A target with dot products has candidates with them, too: another kernel's time says nothing."""
    from dsa_tvm.schedules import CPU, DOTS, cpu_kernel, cpu_variants

    from dsa_tvm.build import candidates, objects

    for target in DOTS:
        op = next(op for op in CPU if cpu_variants(op, target))
        variant, decisions = cpu_variants(op, target)[0], CPU[op].DEFAULT[target]
        candidates.compile_kernel(op, variant, target, decisions, "candidate", tmp_path / "candidate.o")
        name = objects.symbol(op, variant.values(), target, "candidate")
        objects.write_object({name: cpu_kernel(op, variant, target, decisions)}, target, tmp_path / "library.o")
        assert (tmp_path / "candidate.o").read_bytes() == (tmp_path / "library.o").read_bytes(), target


def test_linker_errors(tmp_path):
    from dsa_tvm.build.candidates import Linker

    with pytest.raises(BuildError, match="cc: expected a C compiler, got no-such-compiler"):
        Linker("topk", (), "x86-64-v3", "no-such-compiler")
    (tmp_path / "empty.o").touch()
    linker = Linker("topk", (), dsa_tvm.active_target())
    with pytest.raises(BuildError, match="undefined reference to `__tvm_ffi_topk"):
        linker.link(tmp_path / "empty.o", None, tmp_path / "empty.o", None, tmp_path / "out.so")


@pytest.mark.skipif(not shutil.which(AARCH64_CC), reason=f"{AARCH64_CC} is not installed")
def test_aarch64_links(tmp_path):
    from dsa_tvm.schedules.cpu.topk import DEFAULT

    path = make("topk", "aarch64", replace(DEFAULT["aarch64"], slack=4096), tmp_path, AARCH64_CC)
    header = path.read_bytes()[:20]
    assert header[:4] == b"\x7fELF" and header[18] == 183  # EM_AARCH64
