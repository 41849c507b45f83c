"""One call of an operator: convert arguments to C structures, allocate outputs, turn a status into an exception.

`frames` has a faster way for plain arrays. This one takes everything else, and says what is wrong.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, SupportsIndex

from ..errors import ArgumentError, KernelError, LibraryError
from ..spec import AttrSpec, OpSpec
from . import library
from .dlpack import CPU, CUDA
from .integers import as_integer
from .tensors import Pack, as_tensor, cuda_stream, is_torch, note_written

_MAX_NDIM = 3


class Attribute(ctypes.Union):
    """``dsa_tvm_attr``."""

    _fields_ = (("i", ctypes.c_int64), ("f", ctypes.c_double))


class Options(ctypes.Structure):
    """``dsa_tvm_options``."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("num_threads", ctypes.c_int32),
        ("stream", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("workspace_size", ctypes.c_uint64),
    )


def _integer(op: str, name: str, value: Any, bits: int) -> int:
    number = as_integer(op, name, value)
    if not -(2 ** (bits - 1)) <= number < 2 ** (bits - 1):
        raise ArgumentError(f"{op}: {name}: expected a {bits}-bit integer, got {number}")
    return number


def _attribute(op: str, attr: AttrSpec, value: Any) -> Attribute:
    if isinstance(value, bool) or (attr.kind is float and not hasattr(value, "__float__")):
        got = "None" if value is None else type(value).__name__
        raise ArgumentError(f"{op}: {attr.name}: expected {attr.kind.__name__}, got {got}")
    if attr.kind is int:
        return Attribute(i=_integer(op, attr.name, value, 64))
    try:
        return Attribute(f=float(value))
    except (TypeError, ValueError, OverflowError) as error:  # an array of several elements, or 10**400
        got = f"{type(value).__name__} ({error})"
        raise ArgumentError(f"{op}: {attr.name}: expected a finite float32, got {got}") from error


def _empty(op: str, like: Any, dtype: str, shape: Sequence[int], device: int) -> Any:
    """A new output of the same package as `like`; with `dtype` "T" also of the same element type."""
    if is_torch(like):
        import torch

        return torch.empty(shape, dtype=like.dtype if dtype == "T" else getattr(torch, dtype), device=like.device)
    if device == CUDA:
        raise ArgumentError(
            f"{op}: out: expected tensors to write to, as {type(like).__name__} inputs are on a GPU, got none"
        )
    import numpy as np

    if dtype != "T":
        return np.empty(shape, dtype)
    if isinstance(like, np.ndarray):
        return np.empty(shape, like.dtype)
    raise ArgumentError(
        f"{op}: out: expected tensors to write to, as outputs cannot take the type of a {type(like).__name__}, got none"
    )


class _Plan:
    """``dsa_tvm_plan``: a call that the library has checked, and that it computes when the outputs are there."""

    def __init__(self, lib: ctypes.CDLL) -> None:
        self._lib, self._address = lib, None
        if not hasattr(lib, "dsa_tvm_plan_create"):
            raise LibraryError("library: expected one that this version has built, got an older one; build it again")
        self._address = lib.dsa_tvm_plan_create()
        if not self._address:
            raise KernelError(lib.dsa_tvm_last_error().decode())

    def __del__(self) -> None:
        if self._address:
            self._lib.dsa_tvm_plan_destroy(self._address)

    def prepare(self, spec: OpSpec, inputs: Pack, attrs: Sequence[Attribute]) -> tuple[list[list[int]], int]:
        """Check inputs and attributes. Returns the shapes of the outputs, and the bytes of workspace on a GPU."""
        shapes, size = (ctypes.c_int64 * _MAX_NDIM * len(spec.outputs))(), ctypes.c_uint64()
        attr_array = (Attribute * max(len(attrs), 1))(*attrs)
        given = (inputs.pointers, len(spec.inputs), attr_array, len(attrs))
        results = (shapes, len(spec.outputs), ctypes.byref(size))
        status = self._lib.dsa_tvm_prepare(ctypes.c_void_p(self._address), spec.name.encode(), *given, *results)
        if status:
            library.raise_error(self._lib, status)
        return [list(shape[: len(t.shape)]) for t, shape in zip(spec.outputs, shapes, strict=True)], size.value

    def run(self, outputs: Pack, count: int, options: Options) -> None:
        """Check the outputs, and compute."""
        plan = ctypes.c_void_p(self._address)
        status = self._lib.dsa_tvm_run(plan, outputs.pointers, count, ctypes.byref(options))
        if status:
            library.raise_error(self._lib, status)


def _workspace(op: str, size: int, device: int, stream: int) -> Any:
    """Workspace for a call on a GPU, from torch's allocator."""
    try:
        import torch
    except ImportError as error:
        message = f"{op}: workspace: expected PyTorch, which allocates it for calls on a GPU, got none ({error})"
        raise LibraryError(message) from error
    # The caching allocator may reuse this block on the stream that was current at allocation. That is the stream of
    # the call, unless the call has no torch tensors: then it runs on the default stream.
    elsewhere = torch.cuda.current_stream(device).cuda_stream != stream
    with torch.cuda.stream(torch.cuda.default_stream(device)) if elsewhere else nullcontext():
        return torch.empty(size, dtype=torch.uint8, device=f"cuda:{device}")


def call(
    spec: OpSpec,
    inputs: Mapping[str, Any],
    attrs: Mapping[str, Any],
    out: Any = None,
    num_threads: SupportsIndex = 0,
) -> tuple[Any, ...]:
    """Run one operator.

    Parameters
    ----------
    spec : OpSpec
    inputs, attrs : mapping
        By name. An optional input may be None.
    out : tensor or tuple of tensors, optional
        Where the outputs go; by default they are allocated.
    num_threads : int
        The most threads of this call; 0 for the process default.

    Returns
    -------
    tuple
        The outputs, in the operator's order.

    Raises
    ------
    ArgumentError
        An argument does not fit the operator. No output has been touched.
    KernelError
        There is no memory for the workspace.
    LibraryError
        The library is missing or damaged, or has no kernels for this CPU or GPU; or there is no CUDA driver.
    """
    lib = library.load()
    num_threads = _integer(spec.name, "num_threads", num_threads, 32)
    keep: list[Any] = []
    cuda = library.has_cuda(lib)
    given_out = () if out is None else out if isinstance(out, tuple) else (out,)
    stream = cuda_stream((*inputs.values(), *given_out)) if cuda else 0
    views = [
        None
        if inputs[t.name] is None and t.optional
        else as_tensor(spec, t, inputs[t.name], keep, cuda=cuda, stream=stream)
        for t in spec.inputs
    ]
    given = Pack(views)
    device = views[0].device if views[0] else (CPU, 0)
    given_attrs = [_attribute(spec.name, a, attrs[a.name]) for a in spec.attrs]
    # The library checks the arguments first, so nothing is allocated for a call that it refuses.
    plan = _Plan(lib)
    shapes, workspace_size = plan.prepare(spec, given, given_attrs)
    if out is None:
        first = inputs[spec.inputs[0].name]
        outputs = tuple(
            _empty(spec.name, first, t.dtype, shape, device[0]) for t, shape in zip(spec.outputs, shapes, strict=True)
        )
    else:
        outputs = given_out
        if len(outputs) != len(spec.outputs):
            raise ArgumentError(f"{spec.name}: out: expected {len(spec.outputs)} tensors, got {len(outputs)}")
    taken = Pack(
        [
            as_tensor(spec, t, x, keep, writable=True, cuda=cuda, stream=stream)
            for t, x in zip(spec.outputs, outputs, strict=True)
        ]
    )
    options = Options(ctypes.sizeof(Options), num_threads, stream)
    if workspace_size:
        # torch's allocator has it back when this function returns. Whoever gets it next runs later on the same stream.
        workspace = _workspace(spec.name, workspace_size, device[1], stream)
        options.workspace, options.workspace_size = workspace.data_ptr(), workspace_size
    plan.run(taken, len(outputs), options)
    if out is not None:
        note_written(outputs)
    return outputs
