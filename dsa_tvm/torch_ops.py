"""``torch.ops.dsa_tvm.*``: importing this module registers every operator with torch.

They work under `torch.compile(fullgraph=True)`, `torch.export` and `torch.func.vmap`: each has a fake implementation
that computes the output shapes, and integer attributes may be symbolic. There are no derivatives. Asking for one, in
reverse or forward mode, raises `NotImplementedError` with the name of the operator. An operator whose output may be one
of its inputs also has a form that changes this input and returns nothing: ``write_rows_``.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any, NoReturn

import torch
from torch.autograd import forward_ad

from .errors import ArgumentError
from .ops import OPS
from .runtime import exchange, frames
from .runtime.calls import call
from .spec import OpSpec, TensorSpec, completed

# Keep it when the module is reloaded: torch forgets the operators of a library that is deleted.
_LIBRARY = globals().get("_LIBRARY") or torch.library.Library("dsa_tvm", "FRAGMENT")

# An integer may come from a shape, as in topk=min(2048, k.shape[0]), so it is a SymInt.
_SCALARS = {int: "SymInt", float: "float"}

_INPUTS = {name: tuple(t.name for t in spec.inputs) for name, spec in OPS.items()}

# Where a call goes below autograd if nothing else is to see it: no mode, no transform, no trace, no lazy conjugate.
_AFTER_AUTOGRAD = torch._C._after_autograd_keyset
_PLAIN = {torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)).raw_repr() for name in ("CPU", "CUDA")}
#: For the keys of the calls so far: whether the call is plain.
_known_keys: dict[int, bool] = {}


def _schema(spec: OpSpec) -> str:
    inputs = [f"Tensor? {t.name}=None" if t.optional else f"Tensor {t.name}" for t in spec.inputs]
    attrs = [f"{_SCALARS[a.kind]} {a.name}" for a in spec.attrs]
    outputs = ", ".join(["Tensor"] * len(spec.outputs))
    arguments = ", ".join(inputs + (["*", *attrs] if attrs else []))
    return f"({arguments}) -> {outputs if len(spec.outputs) == 1 else f'({outputs})'}"


def _whole(spec: OpSpec, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """All inputs: torch passes them by position, without trailing defaults."""
    missing = len(spec.inputs) - len(args)
    return args + (None,) * missing if missing else args


def _inputs(spec: OpSpec, args: tuple[Any, ...]) -> dict[str, Any]:
    """Inputs by name."""
    return dict(zip(_INPUTS[spec.name], _whole(spec, args), strict=True))


def _attributes_getter(spec: OpSpec) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    """A function that takes the attributes, which torch passes by keyword, and returns them in the operator's order."""
    names = [a.name for a in spec.attrs]
    if len(names) > 1:
        return itemgetter(*names)
    if names:
        (name,) = names
        return lambda kwargs: (kwargs[name],)
    return lambda kwargs: ()


_attributes = {name: _attributes_getter(spec) for name, spec in OPS.items()}


def _single(outputs: tuple[Any, ...]) -> Any:
    return outputs[0] if len(outputs) == 1 else outputs


def _compute(spec: OpSpec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    results = frames.call(spec, _whole(spec, args), _attributes[spec.name](kwargs), None, 0)
    if results is not None:
        return _single(results)
    inputs = _inputs(spec, args)
    if not torch.is_grad_enabled():
        return _single(call(spec, inputs, kwargs))
    with torch.no_grad():
        return _single(call(spec, inputs, kwargs))


def _check_fake(spec: OpSpec, tensor: TensorSpec, x: torch.Tensor, lengths: dict[str, Any]) -> None:
    """Refuse what is wrong for any values of the symbolic lengths. Adds the lengths of the tensor to `lengths`."""
    where = f"{spec.name}: {tensor.name}"
    if x.dim() != len(tensor.shape):
        expected = f"rank {len(tensor.shape)} [{', '.join(tensor.shape)}]"
        raise ArgumentError(f"{where}: expected {expected}, got rank {x.dim()}")
    dtype, types = str(x.dtype).removeprefix("torch."), spec.dtypes_of(tensor)
    if dtype not in types:
        raise ArgumentError(f"{where}: expected {' or '.join(types)}, got {dtype}")
    try:
        lengths |= completed({dim: length for dim, length in lengths.items() if isinstance(length, int)})
    except ValueError as error:
        raise ArgumentError(f"{spec.name}: {error}") from None
    for dim, length in zip(tensor.shape, x.shape, strict=True):
        known = lengths.setdefault(dim, length)
        # Comparing symbols would bind them, which only the caller should do.
        if isinstance(known, int) and isinstance(length, int) and known != length:
            raise ArgumentError(f"{where}: expected {dim} of {known}, got {length}")


def _checked_lengths(spec: OpSpec, inputs: dict[str, Any], attrs: dict[str, Any]) -> dict[str, Any]:
    lengths = {a.dim: attrs[a.name] for a in spec.attrs if a.dim}
    for t in spec.inputs:
        if inputs[t.name] is not None:
            _check_fake(spec, t, inputs[t.name], lengths)
    return lengths


def _fake(spec: OpSpec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    inputs = _inputs(spec, args)
    lengths = _checked_lengths(spec, inputs, kwargs)
    variable = {t.dtype: inputs[t.name].dtype for t in reversed(spec.inputs) if inputs[t.name] is not None}
    like = inputs[spec.inputs[0].name]
    return _single(
        tuple(
            like.new_empty([lengths[d] for d in t.shape], dtype=variable.get(t.dtype) or getattr(torch, t.dtype))
            for t in spec.outputs
        )
    )


class _WithoutBackward(torch.autograd.Function):
    """Makes an operator a node of the graph, so that only a backward that reaches it is an error."""

    @staticmethod
    def forward(ctx: Any, name: str, kwargs: dict[str, Any], *args: Any) -> Any:
        ctx.name = name
        # The dispatcher calls `_autograd` again, now with gradients off.
        return getattr(torch.ops.dsa_tvm, name)(*args, **kwargs)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> NoReturn:
        raise NotImplementedError(f"dsa_tvm.{ctx.name} has no backward: it serves inference only")


def _refuse_tangents(spec: OpSpec, tensors: list[torch.Tensor]) -> None:
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(f"dsa_tvm.{spec.name} has no forward-mode derivative: it serves inference only")


def _is_plain(keys: Any) -> bool:
    """Whether a call is to be computed here and now, which saves torch the way through its dispatcher again. Otherwise
    something else is to see the call.
    """
    if forward_ad._current_level >= 0:
        return False
    every = keys.raw_repr()
    try:
        return _known_keys[every]
    except KeyError:
        return _known_keys.setdefault(every, (keys & _AFTER_AUTOGRAD).raw_repr() in _PLAIN)


def _autograd(spec: OpSpec, keys: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in args if x is not None]
    if _is_plain(keys) and not any(x.requires_grad for x in tensors):
        return _single(call(spec, _inputs(spec, args), kwargs))
    _refuse_tangents(spec, tensors)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        if torch._C._functorch.peek_interpreter_stack() is not None:
            # Inside the dispatcher, an autograd.Function cannot be a node of torch.func's graphs.
            raise NotImplementedError(
                f"dsa_tvm.{spec.name} has no backward: it serves inference only; "
                "inside torch.func.grad and the like, detach its inputs"
            )
        return _WithoutBackward.apply(spec.name, kwargs, *args)
    with torch._C._AutoDispatchBelowAutograd():
        operator = getattr(torch.ops.dsa_tvm, spec.name).default
        return operator.redispatch(keys & _AFTER_AUTOGRAD, *args, **kwargs)


def _register(spec: OpSpec) -> None:
    if hasattr(torch.ops.dsa_tvm, spec.name):
        # The module is being reloaded. The registered operators call the functions of this module by name.
        return

    def compute(*args: Any, **kwargs: Any) -> Any:
        return _compute(spec, args, kwargs)

    def fake(*args: Any, **kwargs: Any) -> Any:
        return _fake(spec, args, kwargs)

    fast = exchange.Caller(spec, torch, exchange.dispatched).call
    count, single = len(spec.inputs), len(spec.outputs) == 1

    def autograd(keys: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_plain(keys):
            given = args if len(args) == count else _whole(spec, args)
            # torch passes the attributes in the order of the schema, which is the operator's.
            results = fast(given, kwargs.values(), None, 0)
            if results is not None:
                return results[0] if single else results
        return _autograd(spec, keys, args, kwargs)

    _LIBRARY.define(spec.name + _schema(spec))
    # One implementation for every device: `call` finds the device, and names an argument that is on another one.
    _LIBRARY.impl(spec.name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dsa_tvm::{spec.name}", fake, lib=_LIBRARY)
    # torch.library.register_autograd ignores forward mode: it would silently drop tangents.
    _LIBRARY.impl(spec.name, autograd, "Autograd", with_keyset=True)


def _changed(spec: OpSpec, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs that an operator writes to, in the order of its outputs."""
    names = _INPUTS[spec.name]
    return tuple([args[names.index(t.may_be)] for t in spec.outputs if t.may_be])


def _compute_in_place(spec: OpSpec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    changed = _changed(spec, args)
    if frames.call(spec, args, _attributes[spec.name](kwargs), changed, 0) is None:
        with torch.no_grad():
            call(spec, _inputs(spec, args), kwargs, changed)


def _autograd_in_place(spec: OpSpec, keys: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _refuse_tangents(spec, list(args))
    if torch.is_grad_enabled() and any(x.requires_grad for x in args):
        raise NotImplementedError(f"dsa_tvm.{spec.name}_ has no backward: what it overwrites has no derivative")
    with torch._C._AutoDispatchBelowAutograd():
        operator = getattr(torch.ops.dsa_tvm, f"{spec.name}_").default
        operator.redispatch(keys & _AFTER_AUTOGRAD, *args, **kwargs)


def _register_in_place(spec: OpSpec) -> None:
    """Register the form of an operator that writes to its inputs and returns nothing. Its name ends in ``_``."""
    name = f"{spec.name}_"
    if hasattr(torch.ops.dsa_tvm, name):
        return

    def compute(*args: Any, **kwargs: Any) -> None:
        _compute_in_place(spec, args, kwargs)

    def fake(*args: Any, **kwargs: Any) -> None:
        _checked_lengths(spec, _inputs(spec, args), kwargs)

    fast, attributes = exchange.Caller(spec, torch, exchange.dispatched).call, _attributes[spec.name]

    def autograd(keys: Any, *args: Any, **kwargs: Any) -> None:
        if not _is_plain(keys) or fast(args, attributes(kwargs), _changed(spec, args), 0) is None:
            _autograd_in_place(spec, keys, args, kwargs)

    changed = {t.may_be for t in spec.outputs}
    inputs = [f"Tensor(a{i}!) {t.name}" if t.name in changed else f"Tensor {t.name}" for i, t in enumerate(spec.inputs)]
    _LIBRARY.define(f"{name}({', '.join(inputs)}) -> ()")
    _LIBRARY.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dsa_tvm::{name}", fake, lib=_LIBRARY)
    _LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)


for _spec in OPS.values():
    _register(_spec)
    if all(t.may_be for t in _spec.outputs):
        _register_in_place(_spec)
