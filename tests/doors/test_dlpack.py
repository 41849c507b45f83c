"""Tensors of any package with DLPack, old protocol and new, without copies."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest

import dsa_tvm
from dsa_tvm.ops import OPS
from dsa_tvm.runtime import dlpack
from dsa_tvm.runtime.dlpack import Tensor, capsule_pointer
from dsa_tvm.runtime.tensors import as_tensor


class Foreign:
    """A tensor of some package, with nothing but the protocol."""

    def __init__(self, array, versioned=True, device=(1, 0)):
        self.array, self.versioned, self.device = array, versioned, device

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **kwargs):
        if kwargs and not self.versioned:
            raise TypeError("this producer is from before DLPack 1.0")
        return self.array.__dlpack__(**kwargs)


N = np.array([6], np.int32)
LOGITS = np.array([[1, 9, 3, 8, 2, 7]], np.float32)


@pytest.mark.parametrize("versioned", [True, False])
def test_both_protocols(versioned):
    arguments = [Foreign(x, versioned) for x in (LOGITS, N * 0, N)]
    assert dsa_tvm.topk(*arguments, 3).tolist() == [[1, 3, 5]]


def test_output_is_written_in_place():
    out = np.zeros((1, 3), np.int32)
    dsa_tvm.topk(LOGITS, N * 0, N, 3, out=Foreign(out))
    assert out.tolist() == [[1, 3, 5]]


class Copying(Foreign):
    """Exports a copy; whether it says so when it is asked not to, or in the capsule."""

    def __dlpack__(self, *, copy=None, **kwargs):
        if copy is False and not self.versioned:
            raise BufferError("there is only a copy")
        return self.array.__dlpack__(copy=True, **kwargs)


@pytest.mark.parametrize("says_it_later", [True, False])
def test_an_output_that_would_be_a_copy_is_refused(says_it_later):
    out = np.zeros((1, 3), np.int32)
    with pytest.raises(dsa_tvm.ArgumentError, match=r"topk: indices: expected .* without a copy, got .*copy"):
        dsa_tvm.topk(LOGITS, N * 0, N, 3, out=Copying(out, says_it_later))
    arguments = [Copying(x, says_it_later) for x in (LOGITS, N * 0, N)]
    assert dsa_tvm.topk(*arguments, 3, out=Foreign(out)) and out.tolist() == [[1, 3, 5]]


def test_a_producer_from_before_copies_could_be_refused():
    class Older(Foreign):
        def __dlpack__(self, *, max_version=None):
            return self.array.__dlpack__(max_version=max_version)

    out = np.zeros((1, 3), np.int32)
    dsa_tvm.topk(LOGITS, N * 0, N, 3, out=Older(out))
    assert out.tolist() == [[1, 3, 5]]


def test_a_producer_that_exports_nothing():
    class Refusing(Foreign):
        def __dlpack__(self, **kwargs):
            if kwargs:
                raise TypeError("from before DLPack 1.0")
            raise BufferError("not today")

    with pytest.raises(dsa_tvm.ArgumentError, match=r"topk: logits: expected a tensor .*not today"):
        dsa_tvm.topk(Refusing(LOGITS), N * 0, N, 3)


@pytest.mark.parametrize("kind", [TypeError, ValueError, RuntimeError])
def test_a_producer_that_refuses_in_its_own_way(kind):
    class Refusing(Foreign):
        def __dlpack__(self, **kwargs):
            raise kind("not this type")

    with pytest.raises(dsa_tvm.ArgumentError, match=r"topk: logits: expected a tensor .*not this type"):
        dsa_tvm.topk(Refusing(LOGITS), N * 0, N, 3)


def test_read_only_output_is_refused():
    out = np.zeros((1, 3), np.int32)
    out.flags.writeable = False
    for target in (out, Foreign(out)):
        with pytest.raises(dsa_tvm.ArgumentError, match="topk: indices: expected a "):
            dsa_tvm.topk(LOGITS, N * 0, N, 3, out=target)


def test_strides_and_offset_are_read():
    wide = np.arange(24, dtype=np.float32).reshape(2, 12)
    with pytest.raises(dsa_tvm.ArgumentError, match="topk: logits: expected a contiguous tensor"):
        dsa_tvm.topk(Foreign(wide[:, ::2]), *np.zeros((2, 2), np.int32), 3)
    assert dsa_tvm.topk(Foreign(wide[1:, :]), N * 0, N, 2).tolist() == [[4, 5]]


def test_other_device_is_refused_before_it_is_asked():
    with pytest.raises(
        dsa_tvm.ArgumentError, match="topk: logits: expected a tensor on the CPU, got one on a CUDA GPU"
    ):
        dsa_tvm.topk(Foreign(LOGITS, device=(2, 0)), N * 0, N, 3)


@pytest.mark.parametrize("answer", [None, 3, ("gpu", 0), (1, 2, 3)])
def test_a_producer_that_does_not_tell_its_device(answer):
    with pytest.raises(dsa_tvm.ArgumentError, match="topk: logits: expected a tensor that tells its device, got "):
        dsa_tvm.topk(Foreign(LOGITS, device=answer), N * 0, N, 3)


class OnGpu(Foreign):
    """A tensor that pretends to be on a GPU, also in its capsule."""

    def __init__(self, array, copied=False, refuses=False, told=(2, 0)):
        super().__init__(array, device=told)
        self.copied, self.refuses, self.asked = copied, refuses, []

    def __dlpack__(self, **kwargs):
        self.asked.append(kwargs)
        if self.refuses and kwargs.get("copy") is False:
            raise BufferError("it would be a copy")
        capsule = self.array.__dlpack__(max_version=(1, 0))
        managed = dlpack.Versioned.from_address(dlpack.capsule_pointer(capsule, b"dltensor_versioned"))
        managed.tensor.device_type = 2
        managed.flags = 2 if self.copied else 0
        return capsule


def view(x, *, cuda=True, writable=False):
    """As a library with CUDA kernels takes it, for a call on stream 7."""
    spec = OPS["topk"]
    return as_tensor(spec, spec.inputs[0], x, [], writable=writable, cuda=cuda, stream=7)


@pytest.mark.parametrize("kind", ["copied", "refuses"])
@pytest.mark.parametrize("writable", [True, False])
def test_a_copy_on_a_gpu_is_refused(kind, writable):
    """The copy would be freed when the call returns, before the kernels have run."""
    with pytest.raises(dsa_tvm.ArgumentError, match=r"topk: logits: expected .* without a copy, got .*copy"):
        view(OnGpu(LOGITS, **{kind: True}), writable=writable)
    x = OnGpu(LOGITS)
    assert view(x).device == (2, 0) and view(x).data == LOGITS.ctypes.data
    assert x.asked[0] == {"max_version": (1, 0), "copy": False, "stream": 7}


@pytest.mark.parametrize("told", [(1, 0), (2, 1)])
def test_a_capsule_from_another_device_than_its_producer_says(told):
    with pytest.raises(dsa_tvm.ArgumentError, match="as its producer says, got one on a CUDA GPU, number 0"):
        view(OnGpu(LOGITS, told=told))


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        *((np.dtype(t), t) for t in ("int64", "uint16", "float64", "bool", "complex64", "float16", "int8")),
        *((np.dtype(getattr(ml_dtypes, t)), t) for t in ("bfloat16", "float8_e5m2", "float8_e4m3fnuz", "int4")),
        *((np.dtype("M8[s]"), "datetime64[s]"), (np.dtype(object), "object")),
    ],
    ids=str,
)
def test_types_are_named_as_their_owner_does(dtype, name):
    with pytest.raises(dsa_tvm.ArgumentError, match=rf"^topk: logits: expected float32, got {re.escape(name)}$"):
        dsa_tvm.topk(np.zeros((1, 6), dtype), N * 0, N, 3)


def test_overlapping_memory_is_named():
    memory = np.zeros((1, 6), np.int32)
    with pytest.raises(
        dsa_tvm.ArgumentError, match="topk: indices: expected memory that does not overlap `logits`, got"
    ):
        dsa_tvm.topk(memory.view(np.float32), N * 0, N, 3, out=memory[:, :3])


@pytest.mark.parametrize("thing", [None, 3, [1.0], "logits", object()])
def test_things_that_are_no_tensors(thing):
    with pytest.raises(dsa_tvm.ArgumentError, match="topk: logits: expected a tensor"):
        dsa_tvm.topk(thing, N * 0, N, 3)


@pytest.mark.parametrize("offset", [2**64 - 64, 2**64 - 1])
def test_an_offset_that_wraps_around_is_refused(offset):
    class Wrapping(Foreign):
        def __dlpack__(self, **kwargs):
            capsule = self.array.__dlpack__()
            Tensor.from_address(capsule_pointer(capsule, b"dltensor")).byte_offset = offset
            return capsule

    with pytest.raises(dsa_tvm.ArgumentError, match="topk: logits: expected an address of 64 bits, got data 0x"):
        dsa_tvm.topk(Wrapping(LOGITS), N * 0, N, 3)
