"""No kernel reads or writes a byte outside its arguments: each argument borders on a page without access."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hostile import valid_arguments

from dsa_tvm.ops import OPS
from dsa_tvm.runtime.calls import call

PAGE = mmap.PAGESIZE
CASES = [(op, i) for op, spec in OPS.items() for i in range(len(spec.variants))]

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def fenced(array: np.ndarray, at_end: bool) -> np.ndarray:
    """A copy that ends or starts at a page without access. It is never freed, because the process is short."""
    pages = -(-max(array.nbytes, 1) // PAGE)
    private_anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    start = libc.mmap(None, (pages + 2) * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, private_anonymous, -1, 0)
    assert libc.mprotect(start, PAGE, 0) == 0 and libc.mprotect(start + (pages + 1) * PAGE, PAGE, 0) == 0
    address = start + (pages + 1) * PAGE - array.nbytes if at_end else start + PAGE
    memory = (ctypes.c_uint8 * array.nbytes).from_address(address)
    copy = np.frombuffer(memory, np.uint8).view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def run(op: str, variant: int) -> None:
    spec = OPS[op]
    lengths = {"s_q": 3, "s_kv": 53, "h_idx": 5, "d_idx": 64, "topk": 20, "h_q": 9, "d_qk": 576, "d_v": 512}
    arguments = valid_arguments(spec, spec.variants[variant], lengths, np.random.default_rng(0))
    attrs = {a.name: arguments[a.name] for a in spec.attrs}
    inputs = {t.name: arguments[t.name] for t in spec.inputs}
    expected = call(spec, inputs, attrs)
    for at_end in (True, False):
        outputs = tuple(fenced(np.zeros_like(x), at_end) for x in expected)
        fenced_inputs = {name: x if x is None else fenced(x, at_end) for name, x in inputs.items()}
        for actual, wanted in zip(call(spec, fenced_inputs, attrs, outputs), expected, strict=True):
            assert actual.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("op", OPS)
def test_fenced(op):
    """Runs in a child process, which an access too far would end."""
    variants = [str(i) for o, i in CASES if o == op]
    done = subprocess.run([sys.executable, str(Path(__file__)), op, *variants], capture_output=True, text=True)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr}"


def test_a_byte_too_far_is_noticed():
    code = "import test_guard_pages as t, numpy as np; x = t.fenced(np.zeros(5, np.uint8), True)\n"
    code += "print(t.ctypes.string_at(x.ctypes.data, 6))"
    tests = str(Path(__file__).parent)
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {tests!r}); {code}"])
    assert done.returncode < 0


if __name__ == "__main__":
    for number in sys.argv[2:]:
        run(sys.argv[1], int(number))
