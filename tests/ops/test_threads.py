"""The same bits for any number of threads, from any number of callers."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from samples import attention_inputs, indexer_inputs

import dsa_tvm
from dsa_tvm.ops import OPS
from dsa_tvm.spec import DIMS

VARIANT = OPS["lightning_indexer"].variants[0]


def arguments(s_q, s_kv=3000):
    rng = np.random.default_rng(s_q)
    index = indexer_inputs(rng, VARIANT, s_q=s_q, s_kv=s_kv, h_idx=16, d_idx=64)
    attention = attention_inputs(rng, "float32", s_q=s_q, s_kv=s_kv, h_q=100)
    return index, attention


def everything(index, attention, num_threads):
    logits = dsa_tvm.lightning_indexer(**index, num_threads=num_threads)
    indices = dsa_tvm.indexer_topk(**index, topk=200, num_threads=num_threads)
    chosen = dsa_tvm.topk(logits, index["ks"], index["ke"], 200, num_threads=num_threads)
    attended = dsa_tvm.sparse_mla(attention["q"], attention["kv"], indices, sm_scale=0.07, num_threads=num_threads)
    first = [index[name] for name in ("q", "k", "weights", "ks", "ke")]
    given = {"topk": 200, "sm_scale": 0.07, "num_threads": num_threads}
    whole = dsa_tvm.dsa_attention(*first, attention["q"], attention["kv"], **given)
    return [logits, indices, chosen, *attended, *whole]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("s_q", [1, 2, 7, 8, 9, 40])
def test_same_bits_for_any_number_of_threads(s_q):
    inputs = arguments(s_q)
    expected = everything(*inputs, 1)
    for num_threads in (2, 3, 5, 16, 64):
        assert same(everything(*inputs, num_threads), expected), num_threads


def test_same_bits_on_every_run():
    inputs = arguments(9)
    expected = everything(*inputs, 2)
    assert all(same(everything(*inputs, 2), expected) for _ in range(20))


def test_many_callers_at_once():
    inputs = [arguments(s_q, 1000) for s_q in range(1, 17)]
    expected = [everything(*x, 1) for x in inputs]
    with ThreadPoolExecutor(16) as pool:
        for _ in range(3):
            actual = list(pool.map(lambda x: everything(*x, 2), inputs))
            assert all(map(same, actual, expected))


def test_fewer_queries_at_a_time_than_threads_take():
    """Of a million keys 256 MiB are the logits of 56 queries: less than 64 threads would take at a time."""
    s_q, s_kv, seen, first = 150, 2**20, 3000, 2**19
    index = indexer_inputs(np.random.default_rng(0), VARIANT, s_q=s_q, s_kv=seen, h_idx=2, d_idx=32)
    expected = dsa_tvm.indexer_topk(**index, topk=9, num_threads=1)
    k = np.zeros((s_kv, 32), np.float32)
    k[first : first + seen] = index["k"]
    moved = index | {"k": k, "ks": index["ks"] + np.int32(first), "ke": index["ke"] + np.int32(first)}
    indices = dsa_tvm.indexer_topk(**moved, topk=9, num_threads=64)
    assert np.array_equal(np.where(indices < 0, indices, indices - first), expected)


def test_process_default():
    before = dsa_tvm.get_num_threads()
    try:
        dsa_tvm.set_num_threads(np.int64(3))
        assert dsa_tvm.get_num_threads() == 3
    finally:
        dsa_tvm.set_num_threads(0)
    assert dsa_tvm.get_num_threads() == before


@pytest.mark.parametrize("number", [-1, 2**31, 2**32 + 1])
def test_no_such_number_of_threads(number):
    with pytest.raises(dsa_tvm.ArgumentError, match=r"set_num_threads: num_threads: expected 0\.\.2147483647, got"):
        dsa_tvm.set_num_threads(number)


@pytest.mark.parametrize("number", ["4", None, 1.5, np.ones(2)])
def test_no_number_of_threads(number):
    with pytest.raises(dsa_tvm.ArgumentError, match="set_num_threads: num_threads: expected int, got"):
        dsa_tvm.set_num_threads(number)


# What a child process runs: enough work that two threads are used.
CALL = """
import ctypes, os, signal, sys, threading, time
import numpy as np

def make():
    rng = np.random.default_rng(0)
    q, k = rng.random((8, 16, 64), np.float32), rng.random((4000, 64), np.float32)
    return q, k, rng.random((8, 16), np.float32), np.zeros(8, np.int32), np.full(8, 4000, np.int32)

inputs = make()

def call(num_threads):
    import dsa_tvm
    return dsa_tvm.lightning_indexer(*inputs, num_threads=num_threads).tobytes()

def tasks():
    return {int(name) for name in os.listdir("/proc/self/task")}

others = tasks()  # NumPy may have some

def ours():
    return len(tasks() - others - {os.getpid()})

def wait_until(holds):
    # For what a thread does last: Python has joined it a little earlier.
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)

def in_child(function, fork=os.fork):
    child = fork()
    if child == 0:
        try:
            os._exit(0 if function() else 1)
        finally:
            os._exit(2)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if os.waitpid(child, os.WNOHANG)[0]:
            return True
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False
"""


def process(code, preload=None, **environment):
    variables = os.environ | environment | ({"LD_PRELOAD": str(preload)} if preload else {})
    command = [sys.executable, "-W", "ignore", "-c", CALL + textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=variables)
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    return done.stdout


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    """A library to preload that refuses memory and threads."""
    path = tmp_path_factory.mktemp("faults") / "faults.so"
    source = Path(__file__).parent.parent / "c" / "faults.c"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", str(source), "-ldl", "-o", str(path)], check=True)
    return path


def test_a_child_of_a_parent_that_used_openmp(tmp_path):
    """The parent never loaded the library, but an OpenMP whose threads the child lacks; the child imports us first."""
    source, pool = tmp_path / "pool.c", tmp_path / "pool.so"
    source.write_text("void work(void) {\n#pragma omp parallel num_threads(2)\n;\n}\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-fopenmp", str(source), "-o", str(pool)], check=True)
    process(
        f"""
        ctypes.CDLL({str(pool)!r}).work()
        assert in_child(lambda: call(2) == call(1))
        """
    )


@pytest.mark.parametrize("fork", ["os.fork", "lambda: libc.syscall(57)"])
def test_a_forked_child_computes(fork):
    """The parent's threads have worked; the child has none of them. A bare system call tells nobody of the fork."""
    if "syscall" in fork and platform.machine() != "x86_64":
        pytest.skip("another number of the system call")
    process(
        f"""
        libc = ctypes.CDLL(None)
        expected = call(1)
        assert call(2) == expected
        assert in_child(lambda: call(2) == expected and call(3) == expected, {fork})
        assert call(2) == expected
        """
    )


def test_a_forked_child_has_threads_again():
    process(
        """
        import dsa_tvm
        call(2)
        def again():
            dsa_tvm.set_num_threads(4)
            alone = ours() == 0
            call(2)
            return alone and ours() == 1 and dsa_tvm.get_num_threads() == 4
        assert in_child(again)
        """
    )


def test_children_forked_while_others_call():
    """At a fork another thread may be anywhere in the library, with its mutex held."""
    process(
        """
        expected, stop = call(1), threading.Event()
        def work():
            while not stop.is_set():
                assert call(2) == expected
        callers = [threading.Thread(target=work) for _ in range(2)]
        for caller in callers: caller.start()
        try:
            for _ in range(20):
                assert in_child(lambda: call(2) == expected)
        finally:
            stop.set()
        for caller in callers: caller.join()
        """
    )


def test_no_thread_can_be_made(faults):
    """Then, and at a larger number later, the caller computes alone; and once there are some, with them."""
    process(
        """
        faults = ctypes.CDLL(None)
        left, refused = (ctypes.c_int.in_dll(faults, f"faults_{name}") for name in ("threads", "refused"))
        left.value = 0
        expected = call(1)
        assert call(2) == expected and refused.value == 1 and ours() == 0
        for _ in range(100): assert call(4) == expected
        assert refused.value <= 4  # another attempt comes a second later
        left.value = 1
        time.sleep(2.1)
        assert call(4) == expected and ours() == 1
        for _ in range(100): assert call(4) == expected
        """,
        preload=faults,
    )


def test_no_memory_for_a_thread():
    """A limit on the address space, which the stack of a thread is part of."""
    process(
        """
        import resource
        expected = call(1)
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 2**20, size + 2**20))
        assert call(2) == expected and ours() == 0
        """
    )


def test_a_limit_on_processes():
    process(
        """
        import resource
        expected = call(1)
        if os.getuid() == 0:
            os.setresuid(65534, 65534, 65534)  # root has no limit
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
        assert call(2) == expected and call(64) == expected and ours() == 0
        """
    )


def test_a_large_number_of_threads_is_bounded():
    process(
        """
        import dsa_tvm
        expected = call(1)
        assert call(100_000) == expected and call(2**31 - 1) == expected
        assert ours() <= 4 * len(os.sched_getaffinity(0))
        dsa_tvm.set_num_threads(100_000)
        assert dsa_tvm.get_num_threads() == 1024 and call(0) == expected
        """
    )


def test_threads_of_the_library():
    """They run on all CPUs though their first caller is bound to one, and leave signals to the program."""
    process(
        """
        import dsa_tvm
        call(1)
        cpus = os.sched_getaffinity(0)
        def bound():
            os.sched_setaffinity(threading.get_native_id(), {min(cpus)})
            before = tasks()
            call(2)
            (found,) = tasks() - before
            time.sleep(0.2)  # the call need not wait for it to begin
            fields = dict(line.split(":", 1) for line in open(f"/proc/self/task/{found}/status"))
            blocked = int(fields["SigBlk"], 16)
            assert os.sched_getaffinity(found) == cpus
            assert all(blocked >> s - 1 & 1 for s in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGUSR1))
            assert not any(blocked >> s - 1 & 1 for s in (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE))
            good.append(True)
        good = []
        caller = threading.Thread(target=bound)
        caller.start()
        caller.join()
        assert good
        """
    )


def test_short_calls_take_one_thread():
    """Tens of microseconds are over before another thread has begun."""
    process(
        """
        import dsa_tvm
        def topk(s_q, s_kv):
            n = np.full(s_q, s_kv, np.int32)
            dsa_tvm.topk(np.zeros((s_q, s_kv), np.float32), n * 0, n, 8, num_threads=4)
        def mla(h_q, topk):
            q, kv = np.zeros((1, h_q, 576), np.float32), np.zeros((9, 576), np.float32)
            dsa_tvm.sparse_mla(q, kv, np.zeros((1, topk), np.int32), sm_scale=0.1, num_threads=4)
        topk(8, 2048)
        mla(16, 64)
        dsa_tvm.lightning_indexer(*(x[:1] for x in inputs[:1]), inputs[1][:64], *(x[:1] for x in inputs[2:]))
        assert ours() == 0
        topk(256, 2048)
        assert ours() > 0
        """
    )


def test_workspaces_of_a_failed_kernel_are_freed(faults):
    """A kernel that finds no memory for one of its workspaces leaves those behind that it had."""
    process(
        """
        import dsa_tvm
        faults = ctypes.CDLL(None)
        blocks = ctypes.c_int.in_dll(faults, "faults_blocks")
        rng = np.random.default_rng(0)
        q, kv = rng.random((4, 128, 576), np.float32), rng.random((900, 576), np.float32)
        indices = np.arange(512, dtype=np.int32).reshape(1, -1).repeat(4, 0)
        def attend(num_threads):
            return [x.tobytes() for x in dsa_tvm.sparse_mla(q, kv, indices, sm_scale=0.1, num_threads=num_threads)]
        def fail(given):
            blocks.value = given
            try:
                attend(1)
            except dsa_tvm.KernelError as error:
                refused.append("no memory for the workspace of a task" in str(error))
            blocks.value = 2**30
        # Each in a thread of its own, for one that has had these workspaces keeps them.
        refused, before = [], faults.faults_live()
        for i in range(200):
            caller = threading.Thread(target=fail, args=(i % 6,))
            caller.start()
            caller.join()
        assert len(refused) == 200 and all(refused)
        wait_until(lambda: faults.faults_live() == before)
        # And on several threads, again and again, until they have what they need.
        good, live = attend(1), faults.faults_live()
        for i in range(200):
            blocks.value = i % 6
            try:
                assert attend(3) == good
            except dsa_tvm.KernelError:
                pass
        blocks.value = 2**30
        assert attend(3) == good
        assert faults.faults_live() <= live + 20 * ours()
        """,
        preload=faults,
    )


def test_memory_of_a_thread_that_ends_is_freed(faults):
    """A thread keeps workspaces for its next call."""
    process(
        """
        faults = ctypes.CDLL(None)
        call(1)
        before = faults.faults_live()
        for _ in range(50):
            caller = threading.Thread(target=call, args=(1,))
            caller.start()
            caller.join()
        wait_until(lambda: faults.faults_live() == before)
        """,
        preload=faults,
    )


def test_the_pool_itself(tmp_path):
    """Its C file alone, called by several threads at once and stopped at the end, under ThreadSanitizer."""
    pytest.importorskip("tvm", reason="the tables of the operators are made by the build")
    from dsa_tvm.build import spec_table
    from dsa_tvm.build.link import export_directory

    source, here = export_directory() / "src", Path(__file__).parent.parent
    header = Path(dsa_tvm.__file__).parent / "include"
    includes = [f"-I{folder}" for folder in (tmp_path, source, header)]
    spec_table.write(tmp_path, DIMS, "0")
    files = [here / "c" / "pool.c", source / "cpu" / "threads.c", source / "cpu" / "cpus.c"]
    command = [
        "cc",
        "-g",
        "-O1",
        "-fsanitize=thread",
        *includes,
        *map(str, files),
        "-lpthread",
        "-o",
        f"{tmp_path}/pool",
    ]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("the compiler has no ThreadSanitizer")
    # It cannot lay out its memory where addresses are much randomized.
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    done = subprocess.run([*fixed, f"{tmp_path}/pool"], capture_output=True, text=True, timeout=120)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer does not run here")
    assert done.returncode == 0 and done.stdout == "ok\n", done.stdout + done.stderr
