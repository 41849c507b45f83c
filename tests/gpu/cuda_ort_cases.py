"""A node on a GPU, in an ONNX Runtime that is only a table of functions, with the emulator as driver."""

from __future__ import annotations

import ctypes
from ctypes import CFUNCTYPE, POINTER, c_char_p, c_int, c_int64, c_size_t, c_uint32, c_void_p
from typing import ClassVar

import numpy as np
import pytest
from test_topk import DATA

from dsa_tvm.ops import OPS
from dsa_tvm.runtime import library

_ONNX = {"float32": 1, "int32": 6}


class CustomOp(ctypes.Structure):
    """The part of ``OrtCustomOp`` that is called here."""

    _fields_ = (
        ("version", c_uint32),
        ("create_kernel", c_void_p),
        ("name", CFUNCTYPE(c_char_p, c_void_p)),
        ("provider", CFUNCTYPE(c_char_p, c_void_p)),
        ("between", c_void_p * 13),
        ("create_kernel_v2", CFUNCTYPE(c_void_p, c_void_p, c_void_p, c_void_p, POINTER(c_void_p))),
        ("compute_v2", CFUNCTYPE(c_void_p, c_void_p, c_void_p)),
    )


class Runtime:
    """An ONNX Runtime with one node: `inputs` and `attrs` in order, an int32 output."""

    _all: ClassVar[list] = []

    def __init__(self, inputs, attrs, stream=77):
        self.values = list(inputs)
        self.attrs, self.ops, self.errors = attrs, [], []
        # The library knows it by its address, for as long as the process lives.
        self._all.append(self)
        self._slots, self._keep = (c_void_p * 415)(), []
        types = CFUNCTYPE(c_void_p, c_uint32)(lambda version: ctypes.addressof(self._slots))
        text = ctypes.create_string_buffer(b"1.24.0")
        version = CFUNCTYPE(c_void_p)(lambda: ctypes.addressof(text))
        self.base = (c_void_p * 2)(*(ctypes.cast(f, c_void_p) for f in (types, version)))
        self._keep += [types, version]
        self._offer(0, self._create_status, c_int, c_char_p)
        self._offer(26, self._store(1, 1), c_char_p, POINTER(c_void_p))
        self._offer(27, lambda domain, op: self.ops.append(CustomOp.from_address(op)), c_void_p, c_void_p)
        self._offer(28, lambda options, domain: None, c_void_p, c_void_p)
        self._offer(51, self._data, c_void_p, POINTER(c_void_p))
        self._offer(72, self._store(1, 0), c_void_p, POINTER(c_int))
        self._offer(86, self._integer, c_void_p, c_char_p, POINTER(c_int64))
        self._offer(88, self._store(1, len(inputs)), c_void_p, POINTER(c_size_t))
        self._offer(90, self._value, c_void_p, c_size_t, POINTER(c_void_p))
        self._offer(91, self._output, c_void_p, c_size_t, POINTER(c_int64), c_size_t, POINTER(c_void_p))
        self._offer(93, lambda status: None, c_void_p)
        self._offer(193, self._store(1, stream), c_void_p, POINTER(c_void_p))
        self._offer(194, self._store(1, 1), c_void_p, POINTER(c_void_p))
        self._offer(414, self._shape, c_void_p, POINTER(c_int), POINTER(c_void_p), POINTER(c_size_t))

    def _offer(self, slot, function, *types):
        made = CFUNCTYPE(c_void_p, *types)(lambda *args: function(*args) or None)
        self._keep.append(made)
        self._slots[slot] = ctypes.cast(made, c_void_p)

    @staticmethod
    def _store(position, value):
        """A function that stores `value` where the argument at `position` points."""

        def function(*args):
            args[position][0] = value

        return function

    def _create_status(self, code, message):
        self.errors.append(f"{code}: {message.decode()}")
        return len(self.errors)

    def _data(self, value, to):
        to[0] = self.values[value - 1].ctypes.data

    def _integer(self, info, name, to):
        to[0] = self.attrs[name.decode()]

    def _value(self, context, i, to):
        to[0] = i + 1

    def _output(self, context, i, shape, rank, to):
        self.values.append(np.full(shape[:rank], -7, np.int32))
        to[0] = len(self.values)

    def _shape(self, value, kind, shape, rank):
        array = self.values[value - 1]
        lengths = (c_int64 * array.ndim)(*array.shape)
        self._keep.append(lengths)
        kind[0], shape[0], rank[0] = _ONNX[array.dtype.name], ctypes.addressof(lengths), array.ndim

    @staticmethod
    def _text(function, op):
        return function(ctypes.addressof(op))

    def run(self, name, provider):
        """The output of the operator that is registered for a provider, or its error."""
        lib = ctypes.CDLL(library.get_library_path())
        lib.RegisterCustomOps.restype = c_void_p
        assert not lib.RegisterCustomOps(c_void_p(1), self.base)
        (op,) = [x for x in self.ops if (self._text(x.name, x), self._text(x.provider, x)) == (name, provider)]
        kernel = c_void_p()
        assert not op.create_kernel_v2(ctypes.addressof(op), None, None, ctypes.byref(kernel)), self.errors
        return self.errors[-1] if op.compute_v2(kernel, None) else self.values[-1]


class Pool(ctypes.Structure):
    """Records the requests to memory pools of the driver."""

    _fields_ = (("taken", c_size_t), ("given_back", c_size_t), ("bytes", c_size_t), ("stream", c_size_t))


def node(shape, stream=77):
    """A node that selects 64 positions of each row, and its inputs."""
    logits = DATA["ties"](np.random.default_rng(0), shape)
    inputs = [logits, np.zeros(shape[0], np.int32), np.full(shape[0], shape[1], np.int32)]
    return Runtime(inputs, {"topk": 64}, stream), inputs


#: The workspace for one of these rows.
SHAPE, BYTES = (1, 40000), 2 * 4 * 4 * 64


@pytest.mark.parametrize("stream", [77, 0])
def test_a_node_on_the_gpu(stream):
    """The workspace is allocated on the stream before the kernels and freed after them."""
    pool = Pool.in_dll(ctypes.CDLL("libcuda.so.1"), "emulated_pool")
    for shape in ((3, 900), SHAPE):
        before = pool.taken
        runtime, inputs = node(shape, stream)
        np.testing.assert_array_equal(
            runtime.run(b"TopKIndices", b"CUDAExecutionProvider"), OPS["topk"].reference(*inputs, 64)[0]
        )
        assert pool.taken - before == (shape == SHAPE) and pool.given_back == pool.taken
    assert (pool.bytes, pool.stream) == (BYTES, stream)


def test_no_memory_for_a_workspace(monkeypatch):
    """The node fails, and the next call works again."""
    runtime, inputs = node(SHAPE)
    monkeypatch.setenv("CUDA_EMULATOR_POOL_BYTES", str(BYTES - 1))
    expected = f"1: topk: workspace: expected {BYTES} bytes of memory on CUDA device 0, got none: "
    assert runtime.run(b"TopKIndices", b"CUDAExecutionProvider").startswith(expected)
    assert (runtime.values[-1] == -7).all()
    monkeypatch.setenv("CUDA_EMULATOR_POOL_BYTES", str(BYTES))
    runtime, _ = node(SHAPE)
    np.testing.assert_array_equal(
        runtime.run(b"TopKIndices", b"CUDAExecutionProvider"), OPS["topk"].reference(*inputs, 64)[0]
    )


def test_what_is_registered():
    runtime = Runtime([np.zeros((1, 5), np.float32), *np.array([[0], [5]], np.int32)], {"topk": 2})
    runtime.run(b"TopKIndices", b"CUDAExecutionProvider")
    listed = [(op.name(ctypes.addressof(op)).decode(), op.provider(ctypes.addressof(op))) for op in runtime.ops]
    for spec in OPS.values():
        assert listed.count((spec.onnx_name, None)) == len(spec.variants)
        assert listed.count((spec.onnx_name, b"CUDAExecutionProvider")) == len(spec.variants)
