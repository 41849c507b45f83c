"""View the tensors of other packages as DLPack tensors: NumPy and torch directly, others through ``__dlpack__``.

Nothing is copied. Only what the view needs is checked here; the library checks the rest.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from ..errors import ArgumentError
from ..spec import DLPACK_TYPES, OTHER_DLPACK_TYPES, OpSpec, TensorSpec
from .dlpack import CPU, CUDA, HINT, Tensor, View, from_producer

#: Raises an error. It takes what was expected (None stands for the argument's element types) and what was given.
Refusal = Callable[[str | None, str], NoReturn]

_NAMED_TYPES = {**DLPACK_TYPES, **OTHER_DLPACK_TYPES}
_KIND_CODES = {"i": 0, "u": 1, "f": 2, "c": 5, "b": 6}

_FIELDS = struct.Struct("@QiiiBBHQQQ")
assert _FIELDS.size == ctypes.sizeof(Tensor)


class Pack:
    """Views as an array of pointers to `Tensor`, null for None.

    It uses few ctypes objects, because each of them costs a microsecond.

    Attributes
    ----------
    pointers : ctypes array of void pointers
        Valid while the `Pack` lives.
    """

    def __init__(self, views: Sequence[View | None]) -> None:
        lengths: list[int] = []
        for view in views:
            if view is not None:
                lengths += view.shape
                lengths += view.strides or ()
        self._lengths = (ctypes.c_int64 * len(lengths))(*lengths)
        self._tensors = ctypes.create_string_buffer(_FIELDS.size * len(views))
        address, at = ctypes.addressof(self._tensors), ctypes.addressof(self._lengths)
        pointers: list[int | None] = []
        for i, view in enumerate(views):
            if view is None:
                pointers.append(None)
                continue
            data, device, dtype, shape, strides = view
            ndim, offset = len(shape), i * _FIELDS.size
            strides_at = at + 8 * ndim if strides else 0
            _FIELDS.pack_into(self._tensors, offset, data, *device, ndim, *dtype, 1, at, strides_at, 0)
            at += 16 * ndim if strides else 8 * ndim
            pointers.append(address + offset)
        self.pointers = (ctypes.c_void_p * len(views))(*pointers)


def is_torch(x: Any) -> bool:
    """Whether `x` is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, getattr(torch, "Tensor", ()))


def note_written(tensors: Iterable[Any]) -> None:
    """Tell torch that the contents of its tensors have changed, so that a backward that needs the old ones fails."""
    for x in tensors:
        if is_torch(x) and not x.is_inference():
            sys.modules["torch"].autograd.graph.increment_version(x)


def refuse_transforms(op: str, inputs: Mapping[str, Any]) -> None:
    """Refuse torch tensors that carry a derivative, a trace or a batch dimension: a direct call would lose it.

    Parameters
    ----------
    op : str
    inputs : mapping
        By name: tensors of any package, or None.

    Raises
    ------
    ArgumentError
        torch is recording a trace, or an input has a tangent or is wrapped by `torch.func`.
    """
    tensors = {name: x for name, x in inputs.items() if is_torch(x)}
    if not tensors:
        return
    torch = sys.modules["torch"]
    if not is_watching(torch)():
        return
    interpreters, is_wrapped, is_tracing, forward_ad = _probes(torch)
    # A trace of this kind needs the module, so it need not be imported to find out.
    proxies = sys.modules.get("torch.fx.experimental.proxy_tensor")
    tracing = is_tracing() or (proxies is not None and proxies.get_proxy_mode() is not None)
    transforming, forward = interpreters() is not None, forward_ad._current_level >= 0
    if not (tracing or forward or transforming):
        return
    instead = f"; use torch.ops.dsa_tvm.{op}, which `import dsa_tvm.torch_ops` registers"
    for name, x in tensors.items():
        where = f"{op}: {name}: expected"
        if tracing:
            raise ArgumentError(f"{where} a call that torch does not trace, got one while it records a trace{instead}")
        if forward and forward_ad.unpack_dual(x).tangent is not None:
            raise ArgumentError(
                f"{where} a tensor without a tangent, got a dual one: there is no forward-mode derivative"
            )
        # A tensor that requires gradients gets its own message later.
        if transforming and is_wrapped(x) and not x.requires_grad:
            raise ArgumentError(f"{where} a plain tensor, got one inside a transform of torch.func{instead}")


@functools.cache
def is_watching(torch: Any) -> Callable[[], bool]:
    """A function that tells whether torch may record or transform what happens now: a trace, a mode, a derivative.

    It takes the time of two attributes of a tensor, because every call asks.
    """
    interpreters, is_tracing = torch._C._functorch.peek_interpreter_stack, torch._C._is_tracing
    modes, before_dispatch = torch._C._len_torch_dispatch_stack, torch._ops.mode_stack_state_for_pre_dispatch()
    forward_ad = torch.autograd.forward_ad

    def ask() -> bool:
        return (
            interpreters() is not None
            or is_tracing()
            or modes() > 0
            or forward_ad._current_level >= 0
            or before_dispatch.get(0) is not None
        )

    return ask


@functools.cache
def _probes(torch: Any) -> tuple[Any, Any, Any, Any]:
    """What tells of transforms, traces and forward mode. Looked up once, because every call asks."""
    functorch = torch._C._functorch
    is_wrapped = functorch.is_functorch_wrapped_tensor
    return functorch.peek_interpreter_stack, is_wrapped, torch.jit.is_tracing, torch.autograd.forward_ad


@functools.cache
def numpy_type(dtype: Any) -> tuple[int, int] | None:
    """DLPack (code, bits) of a NumPy type, if it has one. Cached, because NumPy computes the name each time."""
    named = _NAMED_TYPES.get(dtype.name)
    return named or ((_KIND_CODES[dtype.kind], dtype.itemsize * 8) if dtype.kind in _KIND_CODES else None)


def _from_numpy(x: Any, fail: Refusal, writable: bool) -> View:
    dtype = numpy_type(x.dtype)
    if dtype is None or dtype[1] > 255:
        fail(None, str(x.dtype))
    if not x.dtype.isnative:
        fail("native byte order", f"dtype {x.dtype.str}")
    if writable and not x.flags.writeable:
        fail("a writable array", "a read-only one")
    strides = None
    if not x.flags.c_contiguous:
        size = x.dtype.itemsize
        if any(s % size for s in x.strides):
            fail("a contiguous array", f"strides of {x.strides} bytes")
        strides = [s // size for s in x.strides]
    return View(x.ctypes.data, (CPU, 0), dtype, x.shape, strides)


@functools.cache
def torch_type(dtype: Any) -> tuple[int, int] | None:
    """DLPack (code, bits) of a torch type; None if it is quantized or has fewer bits than its storage."""
    name, bits = str(dtype).removeprefix("torch."), dtype.itemsize * 8
    if name in _NAMED_TYPES:
        return _NAMED_TYPES[name]
    kind = "float" if dtype.is_floating_point else "complex" if dtype.is_complex else name.rstrip("0123456789")
    code = {"int": 0, "uint": 1, "float": 2, "complex": 5, "bool": 6}.get(kind)
    return None if code is None or name not in ("bool", f"{kind}{bits}") else (code, bits)


def _data_of_subclass(x: Any) -> int:
    """Address of the data; 0 if there is none."""
    fake_tensor = sys.modules.get("torch._subclasses.fake_tensor")
    if fake_tensor is not None and isinstance(x, fake_tensor.FakeTensor):  # data_ptr would warn
        return 0
    try:
        return int(x.data_ptr())
    except RuntimeError:  # a wrapper around other tensors
        return 0


def _from_torch(x: Any, fail: Refusal, writable: bool, cuda: bool) -> View:
    import torch

    if torch.is_grad_enabled() and x.requires_grad:
        fail(
            "a tensor without requires_grad (there is no backward; use torch.no_grad())", "one that asks for gradients"
        )
    if x.layout is not torch.strided:
        fail("a dense tensor", f"layout {x.layout}")
    if x.device.type != "cpu" and not (cuda and x.is_cuda):
        fail("a tensor on the CPU" + " or on a CUDA GPU" * cuda, f"one on {x.device}{HINT if x.is_cuda else ''}")
    if x.is_conj() or x.is_neg():
        fail("a tensor whose conjugate or sign is resolved (resolve_conj, resolve_neg)", "one where it is not")
    dtype = torch_type(x.dtype)
    if dtype is None:
        fail(None, str(x.dtype))
    # A subclass may be a fake tensor, or a wrapper around other tensors.
    data = x.data_ptr() if type(x) is torch.Tensor else _data_of_subclass(x)
    if not data and x.numel():
        fail("a tensor with memory of its own", f"a {type(x).__name__} without")
    strides = None if x.is_contiguous() else x.stride()
    device = (CUDA, x.device.index) if x.is_cuda else (CPU, 0)
    return View(data, device, dtype, x.shape, strides)


def cuda_stream(tensors: Iterable[Any]) -> int:
    """The current stream of the first GPU tensor of torch; 0, the default stream, if there is none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    on_gpus = (x.device for x in tensors if is_torch(x) and x.is_cuda)
    return next((torch.cuda.current_stream(device).cuda_stream for device in on_gpus), 0)


def _refuse(spec: OpSpec, tensor: TensorSpec, expected: str | None, got: str) -> NoReturn:
    expected = expected or " or ".join(spec.dtypes_of(tensor))
    raise ArgumentError(f"{spec.name}: {tensor.name}: expected {expected}, got {got}")


def as_tensor(
    spec: OpSpec,
    tensor: TensorSpec,
    x: Any,
    keep: list[Any],
    *,
    writable: bool = False,
    cuda: bool = False,
    stream: int = 0,
) -> View:
    """A view of `x`. Objects that must outlive the call are appended to `keep`.

    Parameters
    ----------
    spec : OpSpec
    tensor : TensorSpec
        The argument that `x` is given for.
    x : tensor
    keep : list
    writable : bool
        Whether the call writes to it.
    cuda : bool
        Whether it may be on a GPU.
    stream : int
        The stream that will use it there.

    Raises
    ------
    ArgumentError
        `x` is not a tensor, or cannot be viewed as a DLPack tensor on such a device.
    """
    fail = functools.partial(_refuse, spec, tensor)
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(x, numpy.ndarray):
        return _from_numpy(x, fail, writable)
    if is_torch(x):
        return _from_torch(x, fail, writable, cuda)
    if hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__"):
        return from_producer(x, fail, writable, keep, cuda, stream)
    fail("a tensor (NumPy, torch, or anything with DLPack)", "None" if x is None else type(x).__name__)
