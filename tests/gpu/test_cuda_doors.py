"""Calls on a GPU without one: through the emulator as the driver, through drivers that fail, and with none at all."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from dataclasses import asdict

import pytest
from cuda_library import HERE, build_driver, emulator, environment, fake_nvcc, python
from cuda_operator_cases import D_IDX, D_QK, D_V
from emulator import EMULATED

import dsa_tvm
from dsa_tvm import presets
from dsa_tvm.records.selection.gpu import BUCKETS, stage_of
from dsa_tvm.runtime import library

pytest.importorskip("tvm", reason="building needs apache-tvm")

from dsa_tvm.schedules import CUDA_ARCHS

from dsa_tvm.build.cuda import candidates as cuda_candidates
from dsa_tvm.build.cuda import fatbins
from dsa_tvm.build.cuda.candidates import TunedKernel

PRESET = presets.get("deepseek-v3.2")

#: A call of topk whose tensors say they are on a GPU, in the memory of the process.
CALL = """
import ctypes, os, numpy as np
from gpu_call import Call, Options
from dsa_tvm.runtime import library
rows, s_kv, topk = 3, 900, 64
x, n, out = np.zeros((rows, s_kv), "f"), np.zeros(rows, "i4"), np.full((rows, topk), -7, "i4")
call = Call("topk", {"logits": x, "ks": n, "ke": n}, {"topk": topk}, [out])
call.run(Options(ctypes.sizeof(Options), 0, 4096))
"""

ON_CPU = """
import numpy as np, dsa_tvm
n = np.array([5], np.int32)
assert dsa_tvm.topk(np.array([[1, 5, 2, 4, 3]], np.float32), n * 0, n, 2).tolist() == [[1, 3]]
"""


@pytest.fixture(scope="module")
def built(cuda_built):
    return cuda_built


@pytest.fixture(scope="module")
def recorder(tmp_path_factory):
    return build_driver(tmp_path_factory.mktemp("recorder"))


@pytest.fixture(scope="module")
def drivers(cuda_sets, tmp_path_factory):
    """Directories of drivers that run the kernels of the GPU that they say they are."""
    lengths = {"d_idx": D_IDX, "d_qk": D_QK, "d_v": D_V}
    kernels = {arch: next(s for s in cuda_sets if arch in s.archs) for arch in EMULATED}
    return {arch: emulator(s, lengths, tmp_path_factory.mktemp(arch)) for arch, s in kernels.items()}


#: The tests that run on the emulator. The last need a process of their own, in which all torch tensors are on the GPU.
CASES = ("cuda_cases.py", "cuda_operator_cases.py", "cuda_ort_cases.py")
TORCH_CASES = ("cuda_torch_cases.py",)


@pytest.mark.parametrize(("arch", "order"), [("sm_86", 0), ("sm_86", 1), ("sm_90a", 2)])
def test_the_operators_on_the_emulator(built, drivers, arch, order):
    files = [str(HERE / name) for name in CASES]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *files]
    variables = {"CUDA_EMULATOR_CAPABILITY": str(fatbins.number_of(arch)), "CUDA_EMULATOR_ORDER": str(order)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment(built, drivers[arch], **variables))
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-5000:]


@pytest.mark.parametrize("arch", ["sm_86", "sm_90a"])
def test_torch_on_the_emulator(built, drivers, arch):
    pytest.importorskip("torch")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *(str(HERE / name) for name in TORCH_CASES)]
    variables = {"CUDA_EMULATOR_CAPABILITY": str(fatbins.number_of(arch))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment(built, drivers[arch], **variables))
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-5000:]


@pytest.mark.parametrize("door", ["dsa_tvm", "torch.ops.dsa_tvm"])
def test_a_torch_call_is_enqueued_on_its_stream(built, recorder, door):
    """It enters a context once, and the second call loads nothing."""
    pytest.importorskip("torch")
    code = f"""
import torch, torch_on_gpu
torch_on_gpu.install()
import dsa_tvm.torch_ops
n = torch.zeros(3, dtype=torch.int32)
for _ in range(2):
    {door}.topk(torch.zeros(3, 900), n, n, topk=64)
assert torch_on_gpu.allocated == [(3 * 64 * 4, torch.int32)] * 2
"""
    done = python(code, environment(built, recorder))
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    launches = [line for line in lines if line.startswith("launch")]
    assert len(launches) == 2 and all("stream 4096 context 0" in line for line in launches)
    assert lines.count("push 0") == lines.count("pop 0") == 3 and lines.count("image") == IMAGES


def test_a_call_is_enqueued_where_it_is_asked_for(built, recorder):
    done = python(CALL + "call.run(Options(ctypes.sizeof(Options), 0, 7))\n", environment(built, recorder))
    assert done.returncode == 0, done.stderr
    launch = "launch dsa_topk__rows grid 3 1 1 block 512 shared {shared} stream {stream} context 0"
    lines = done.stderr.splitlines()
    launches = [line for line in lines if line.startswith("launch")]
    shared = launches[0].split("shared ")[1].split()[0]
    assert launches == [launch.format(shared=shared, stream=stream) for stream in (4096, 7)]
    # The kernels come once, in the relaxed mode, and the context is put back each time.
    assert [line for line in lines if line.startswith("capture")] == ["capture mode 2", "capture mode 0"]
    assert lines.count("image") == 5 and lines.index("image") > lines.index("capture mode 2")
    assert lines.count("push 0") == lines.count("pop 0") == 3


@pytest.mark.parametrize(
    ("own", "pushed", "used"),
    [
        (None, 3, 0),  # none: once to load the kernels, and once for each call
        (0, 0, 0),  # the primary one of the device
        (8, 0, 8),  # another one of the device
        (1, 3, 0),  # one of another device, which is current again after each call
        (9, 3, 0),
    ],
)
def test_the_callers_context_is_used_if_it_is_one_of_the_device(built, recorder, own, pushed, used):
    context = {} if own is None else {"FAKE_CONTEXT": str(own)}
    again = "call.run(Options(ctypes.sizeof(Options), 0, 4096))\n"
    done = python(CALL + again, environment(built, recorder, FAKE_GPUS="2", **context))
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert [line.split()[-1] for line in lines if line.startswith("launch")] == [str(used)] * 2
    assert lines.count("push 0") == lines.count("pop 0") == pushed


def test_a_workspace_is_measured_without_a_context(built, recorder):
    done = python(CALL + "assert call.workspace_size() == 0\n", environment(built, recorder))
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert lines.count("push 0") == lines.count("pop 0") == 2  # to load the kernels, and for the call


#: As in `CALL`, one of the indexer in fp8: 64 heads. The driver writes down the launches and computes nothing.
INDEXER = """
import ctypes, ml_dtypes, numpy as np
from gpu_call import Call, Options
q = np.zeros(({s_q}, 64, {d_idx}), ml_dtypes.float8_e4m3fn)
k = np.zeros(({s_kv}, {d_idx}), ml_dtypes.float8_e4m3fn)
n, weights, out = np.zeros({s_q}, "i4"), np.zeros(({s_q}, 64), "f"), np.zeros(({s_q}, {s_kv}), "f")
inputs = dict(q=q, k=k, weights=weights, ks=n, ke=n, k_scale=None)
Call("lightning_indexer", inputs, {{}}, [out]).run(Options(ctypes.sizeof(Options), 0, 4096))
"""


@pytest.mark.parametrize(
    ("s_q", "s_kv", "stage", "grid"),
    [
        # 132 multiprocessors: one block of 256 keys' tiles on each.
        (1, 65536, "hopper_few", "1 128"),
        (4, 65536, "hopper_few", "4 32"),
        (8, 32768, "hopper_few", "8 16"),
        # Of a block that takes 4 queries at a time, half would have none.
        (1, 131072, "hopper_few", "1 128"),
        (2, 131072, "hopper_few", "2 64"),
        (3, 131072, "hopper_many", "1 512"),
        (4096, 2048, "hopper_many", "1024 2"),
    ],
)
def test_how_the_indexer_is_cut(built, recorder, s_q, s_kv, stage, grid):
    assert launch_of_the_indexer(built, recorder, s_q, s_kv) == (stage, grid)


@pytest.mark.parametrize(("resident", "runs"), [("1", 128), ("3", 256)])
def test_few_queries_are_cut_for_the_blocks_that_fit(built, recorder, resident, runs):
    """Keys of 64 bytes leave shared memory for two blocks of 640 threads, but registers perhaps for one."""
    launch = launch_of_the_indexer(built, recorder, 1, 65536, 64, FAKE_RESIDENT=resident)
    assert launch == ("hopper_few", f"1 {runs}")


def test_tensor_maps_serve_all_groups_of_queries(built, recorder):
    """Logits of 40 queries are made 16 at a time; what bulk copies read is described to the driver once."""
    pytest.importorskip("ml_dtypes")
    code = """
import ctypes, ml_dtypes, numpy as np
from gpu_call import Call, Options
s_q, s_kv, topk = 40, 1 << 20, 64
q = np.zeros((s_q, 64, 128), ml_dtypes.float8_e4m3fn)
k = np.zeros((s_kv, 128), ml_dtypes.float8_e4m3fn)
n, weights, out = np.zeros(s_q, "i4"), np.zeros((s_q, 64), "f"), np.zeros((s_q, topk), "i4")
inputs = dict(q=q, k=k, weights=weights, ks=n, ke=n, k_scale=None)
options = Options(ctypes.sizeof(Options), 0, 4096, 256, 1 << 40)
Call("indexer_topk", inputs, dict(topk=topk), [out]).run(options)
"""
    done = python(code, environment(built, recorder))
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len([line for line in lines if line.startswith("launch dsa_lightning_indexer")]) == 3
    assert len([line for line in lines if line.startswith("tensor map")]) == 2


def launch_of_the_indexer(built, recorder, s_q, s_kv, d_idx=128, **variables):
    """The stage of its kernel, and the grid."""
    pytest.importorskip("ml_dtypes")
    code = INDEXER.format(s_q=s_q, s_kv=s_kv, d_idx=d_idx)
    done = python(code, environment(built, recorder, **variables))
    assert done.returncode == 0, done.stderr
    (launch,) = [line.split() for line in done.stderr.splitlines() if line.startswith("launch")]
    return launch[1].split("__")[1], " ".join(launch[3:5])


@pytest.mark.parametrize(("s_q", "s_kv"), BUCKETS["lightning_indexer"])
def test_what_is_tuned_is_what_is_launched(built, recorder, s_q, s_kv):
    types = ("float8_e4m3fn", "float8_e4m3fn")
    stage, _ = launch_of_the_indexer(built, recorder, s_q, s_kv)
    assert stage == stage_of("lightning_indexer", {"s_q": s_q, "s_kv": s_kv}, "sm_90a", types)


@pytest.mark.parametrize("stage", ["hopper_few", "hopper_many"])
@pytest.mark.parametrize("multiprocessors", ["32", "132"])
def test_a_candidate_launches_the_stage_that_is_tuned(recorder, tmp_path, stage, multiprocessors):
    """Whatever the launcher would choose on the GPU that measures it."""
    types = ("float8_e4m3fn", "float8_e4m3fn")
    kernel = TunedKernel("lightning_indexer", "sm_90a", stage, types, tuple(asdict(PRESET).items()))
    nvcc = fake_nvcc(tmp_path)
    (tmp_path / "shared").mkdir()
    foundation = cuda_candidates.found(kernel, tmp_path / "shared", "cc", nvcc)
    decisions = asdict(kernel.space().DEFAULT["sm_90a"])
    candidate = tmp_path / "candidate.so"
    cuda_candidates.make(kernel, foundation, decisions, candidate)
    variables = {"FAKE_MULTIPROCESSORS": multiprocessors, "GPU_CALL_LIBRARY": str(candidate)}
    for s_q in (1, 8, 4096):
        launched, _ = launch_of_the_indexer(candidate, recorder, s_q, 16384, **variables)
        assert launched == stage


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        (
            {"FAKE_FAILURE": "cuMemPoolCreate"},
            "1: topk: workspace: expected 12800 bytes of memory on CUDA device 0, got",
        ),
        ({"FAKE_FAILURE": "cuMemAllocFromPoolAsync"}, "1: topk: workspace: expected 12800 bytes of memory on CUDA dev"),
        ({"FAKE_POOLS": "0"}, "9: topk: workspace: expected 12800 bytes of memory on CUDA device 0, got none: "),
        ({"FAKE_FAILURE": "cuLaunchKernel"}, "1: topk: dsa_topk__parts: the failure that was asked for"),
    ],
)
def test_failures_in_onnx_runtime(built, recorder, variables, words):
    """What was taken for a workspace is given back."""
    code = """
from cuda_ort_cases import SHAPE, node
print(node(SHAPE)[0].run(b"TopKIndices", b"CUDAExecutionProvider"))
"""
    done = python(code, environment(built, recorder, **variables))
    assert done.returncode == 0 and done.stdout.startswith(words), done.stdout + done.stderr
    taken = variables.get("FAKE_FAILURE") == "cuLaunchKernel"
    assert done.stderr.count("give back stream 77") == taken


@pytest.mark.parametrize("capability", ["80", "87", "90", "103", "110", "121"])
def test_gpus_with_kernels(built, recorder, capability):
    done = python(CALL, environment(built, recorder, FAKE_CAPABILITY=capability))
    assert done.returncode == 0 and "launch" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        (
            {"FAKE_CAPABILITY": "75"},
            "3: topk: this library has no kernels for a GPU of compute capability 7.5, but for sm_80,",
        ),
        ({"FAKE_GPUS": "0"}, "3: topk: the CUDA driver finds no GPU"),
        ({"FAKE_FAILURE": "cuInit"}, "3: topk: the CUDA driver does not start: the failure that was asked for"),
        ({"FAKE_FAILURE": "cuLibraryLoadData"}, "3: topk: the kernels do not load on CUDA device 0: the failure that"),
        (
            {"FAKE_FAILURE": "cuKernelGetFunction"},
            "3: topk: the kernels do not load on CUDA device 0: the failure that",
        ),
        (
            {"FAKE_FAILURE": "cuDevicePrimaryCtxRetain"},
            "3: topk: the kernels do not load on CUDA device 0: the failure",
        ),
        (
            {"FAKE_FAILURE": "cuLibraryLoadData", "FAKE_VERSION": "11080"},
            "the failure that was asked for (the driver is for CUDA 11.8, and nvcc 1",
        ),
        ({"FAKE_FAILURE": "cuLaunchKernel"}, "4: topk: dsa_topk__rows: the failure that was asked for"),
    ],
)
def test_failures(built, recorder, variables, words):
    done = python(CALL, environment(built, recorder, **variables))
    assert done.returncode == 1 and words in done.stderr.splitlines()[-1], done.stderr
    assert python(ON_CPU, environment(built, recorder, **variables)).returncode == 0


#: Calls until one succeeds, and once more.
PERSIST = """
import ctypes, numpy as np
from gpu_call import Call, Options, Refused
x, n, out = np.zeros((3, 900), "f"), np.zeros(3, "i4"), np.full((3, 64), -7, "i4")
call = Call("topk", {"logits": x, "ks": n, "ke": n}, {"topk": 64}, [out])
refused = []
for _ in range(4):
    try:
        call.run(Options(ctypes.sizeof(Options), 0, 4096))
    except Refused as error:
        refused.append(str(error))
print(len(refused), *refused, sep="\\n")
"""


#: Of the library: one for each operator that has kernels of its own.
IMAGES = 5


@pytest.mark.parametrize(
    ("function", "failing", "images"),
    [
        # The second image, the last kernel's handle, its function, a shared memory's limit.
        ("cuLibraryLoadData", "2-2", IMAGES + 1),
        ("cuLibraryLoadData", "1-1", IMAGES),
        ("cuLibraryGetKernel", "30-30", 2 * IMAGES),
        ("cuKernelGetFunction", "1-1", 2 * IMAGES),
        ("cuKernelSetAttribute", "7-7", 2 * IMAGES),
        ("cuOccupancyMaxActiveBlocksPerMultiprocessor", "1-1", 2 * IMAGES),
        ("cuCtxPushCurrent_v2", "1-1", IMAGES),
        ("cuDevicePrimaryCtxRetain", "1-1", IMAGES),
        ("cuInit", "1-1", IMAGES),
        ("cuDeviceGetCount", "1-1", IMAGES),
    ],
)
@pytest.mark.parametrize("error", ["999", "2"])
def test_a_failed_load_and_then_a_good_one(built, recorder, function, failing, images, error):
    """Nothing of the failed one stays in the GPU's memory, and it is not remembered."""
    variables = {"FAKE_FAILURE": function, "FAKE_FAILS": failing, "FAKE_ERROR": error}
    done = python(PERSIST, environment(built, recorder, **variables))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "1" and "the failure that was asked for" in done.stdout, done.stdout
    lines = done.stderr.splitlines()
    assert lines.count("image") - lines.count("unload") == IMAGES
    if function != "cuLibraryGetKernel":
        assert lines.count("image") == images
    assert sum(line.startswith("launch") for line in lines) == 3
    assert lines.count("push 0") == lines.count("pop 0") + (function == "cuCtxPushCurrent_v2")
    retained = function not in ("cuDevicePrimaryCtxRetain", "cuInit", "cuDeviceGetCount")
    assert lines.count("release 0") == retained


@pytest.mark.parametrize(("error", "loads"), [("209", 1), ("222", 1), ("2", 4), ("719", 4)])
def test_only_lasting_errors_are_remembered(built, recorder, error, loads):
    """A driver that these kernels are not for is asked once; memory may be free next time."""
    variables = {"FAKE_FAILURE": "cuLibraryGetKernel", "FAKE_ERROR": error}
    done = python(PERSIST, environment(built, recorder, **variables))
    assert done.returncode == 0 and done.stdout.splitlines()[0] == "4", done.stdout + done.stderr
    assert done.stderr.splitlines().count("image") == done.stderr.splitlines().count("unload") == loads


def test_devices_of_a_kind_share_their_kernels(built, recorder):
    """With CUDA_MODULE_LOADING=EAGER each library is copied to every context."""
    code = (
        CALL
        + """
for ordinal in (0, 1):
    there = dict.fromkeys(("logits", "ks", "ke", "indices"), (2, ordinal))
    call = Call("topk", {"logits": x, "ks": n, "ke": n}, {"topk": topk}, [out], there)
    call.run(Options(ctypes.sizeof(Options), 0, 4096))
"""
    )
    done = python(code, environment(built, recorder, FAKE_GPUS="2"))
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines().count("image") == IMAGES
    assert "context 1" in done.stderr


def test_a_forked_child_is_told(built, recorder):
    code = (
        CALL
        + """
if os.fork() == 0:
    try:
        call.run(Options(ctypes.sizeof(Options), 0, 4096))
    except Exception as error:
        print(error, flush=True)
    os._exit(0)
os.wait()
call.run(Options(ctypes.sizeof(Options), 0, 4096))
"""
    )
    done = python(code, environment(built, recorder))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("3: topk: the CUDA driver was first used before this process was forked")


def has_driver():
    try:
        return bool(ctypes.CDLL("libcuda.so.1"))
    except OSError:
        return False


@pytest.mark.parametrize("kind", ["none", "broken", "too old"])
def test_without_a_driver(built, tmp_path, kind):
    if kind == "none" and has_driver():
        pytest.skip("this machine has a CUDA driver")
    if kind == "broken":
        (tmp_path / "libcuda.so.1").write_bytes(b"not an ELF file" * 100)
    if kind == "too old":
        build_driver(tmp_path, "-DTOO_OLD")
    words = "the CUDA driver is too old: it has no cuLibraryLoadData, 12.0 has it"
    env = environment(built, tmp_path)
    done = python(CALL, env)
    assert (words if kind == "too old" else "no CUDA driver could be loaded (") in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].startswith("gpu_call.Refused: 3: topk: ")
    assert python(ON_CPU, env).returncode == 0
    function = """
import numpy as np, dsa_tvm
from cuda_cases import OnGpu
n = np.array([5], np.int32)
dsa_tvm.topk(OnGpu(np.zeros((1, 5), np.float32)), OnGpu(n), OnGpu(n), 2, out=OnGpu(np.zeros((1, 2), np.int32)))
"""
    assert "dsa_tvm.errors.LibraryError: topk: " in python(function, env).stderr.splitlines()[-1]


def test_the_manifest_lists_what_there_is_for_gpus(built):
    manifest = library.verify(built)
    assert manifest["targets"][-1] == dsa_tvm.active_target()
    assert manifest["cuda"]["archs"] == list(CUDA_ARCHS) and manifest["cuda"]["ptx"] == "compute_80"
    assert {"dsa_topk__rows", "dsa_topk__parts", "dsa_topk__merge"} <= manifest["cuda"]["kernels"][0]["topk"].keys()
    code = "from dsa_tvm.runtime import library; import json; print(json.dumps(library.cuda_archs()))"
    archs = json.loads(python(code, environment(built, built.parent)).stdout)
    assert sorted(archs[:-1]) == sorted(CUDA_ARCHS) and archs[-1] == "compute_80"


def test_a_library_without_cuda_says_how_to_get_one():
    assert library.cuda_archs() == () and library.verify(library.default_path())["cuda"] is None
    lib = library.load()
    assert lib.dsa_tvm_cuda_archs() is None and b"dsa-tvm build --target cuda" in lib.dsa_tvm_last_error()


def test_onnx_runtime_still_runs_on_the_cpu(built):
    """The operators are registered for CUDAExecutionProvider too, which this ONNX Runtime need not have."""
    for name in ("onnx", "onnxruntime"):
        pytest.importorskip(name)
    files = [str(HERE.parent / "doors" / "test_ort.py")]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(built, built.parent))
    assert done.returncode == 0, done.stdout[-3000:]
