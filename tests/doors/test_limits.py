"""What the library says of the machine's limits. How fast the machine is, nothing here depends on."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from dsa_tvm.errors import ArgumentError
from dsa_tvm.ops.element_types import PRODUCTS, product_of
from dsa_tvm.runtime import library, limits
from dsa_tvm.spec import DLPACK_TYPES


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_rates(threads):
    assert limits.peak("float32", threads, 0.01) > 1e6
    for size in (1, 63, 64, 100_000, 20_000_000):
        assert limits.read_rate(size, threads, 0.005) > 1e3


#: The products that a target has beside those of float32.
DOTS = {
    "x86-64-v2": (),
    "x86-64-v3": (),
    "x86-64-v3-vnni": ("int8",),
    "x86-64-v4": (),
    "x86-64-v4-vnni": ("int8",),
    "x86-64-v4-bf16": ("bfloat16", "int8"),
    "x86-64-v4-amx": ("bfloat16", "int8"),
    "aarch64": (),
}


@pytest.mark.parametrize("target", DOTS)
def test_products_of_a_target(target):
    """One without dot products of a type has no peak for it."""
    code = (
        "from dsa_tvm.runtime import limits as x; print(x.read_rate(10**6, 2, 0.01), *(x.peak(t, 2, 0.01) for t in %r))"
    )
    environment = {**os.environ, "DSA_TVM_TARGET": target}
    done = subprocess.run([sys.executable, "-c", code % (PRODUCTS,)], env=environment, capture_output=True, text=True)
    if "DSA_TVM_TARGET: expected" in done.stderr:
        pytest.skip(f"this machine or this library does not run {target}")
    assert done.returncode == 0, done.stderr
    read, *peaks = done.stdout.split()
    assert float(read) > 1e3
    assert [peak != "None" for peak in peaks] == [dtype == "float32" or dtype in DOTS[target] for dtype in PRODUCTS]


def test_types_are_multiplied_in_what_holds_them():
    for dtype in DLPACK_TYPES:
        assert product_of(dtype) in PRODUCTS
    assert product_of("float16") == product_of("float32") == "float32"  # bfloat16 would round them
    assert product_of("float8_e4m3fn") == product_of("bfloat16") == "bfloat16"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: limits.peak("float16"), "peak: dtype: expected float32, bfloat16 or int8, got float16"),
        (lambda: limits.peak("float32", -1), "peak: num_threads: expected 0 or more, got -1"),
        (lambda: limits.peak("float32", 1, -1.0), "peak: seconds: expected 0..3600, got -1"),
        (lambda: limits.peak("float32", 1, float("nan")), "peak: seconds: expected 0..3600, got -?nan"),
        (lambda: limits.read_rate(0), r"read_rate: bytes: expected 1..\d+, got 0"),
        (lambda: limits.read_rate(-5), r"read_rate: bytes: expected 1..\d+, got -5"),
        (lambda: limits.read_rate(1 << 62), r"read_rate: bytes: expected 1..\d+, got 4611686018427387904"),
        (lambda: limits.read_rate(1, -2), "read_rate: num_threads: expected 0 or more, got -2"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()


def test_null_pointers():
    loaded = library.load()
    assert loaded.dsa_tvm_peak(None, 1, ctypes.c_double(0), None) == 1
    assert loaded.dsa_tvm_last_error() == b"peak: dtype: expected float32, bfloat16 or int8, got a null pointer"
    assert loaded.dsa_tvm_peak(b"float32", 1, ctypes.c_double(0), None) == 1
    assert loaded.dsa_tvm_last_error() == b"peak: rate: expected an address, got a null pointer"


def test_a_library_of_an_earlier_version(monkeypatch):
    """It measures nothing, and is no error."""
    monkeypatch.setattr(library, "load", lambda: object())
    assert limits.peak("float32") is None and limits.read_rate(100) is None
