"""``torch.ops.dsa_tvm.*``: importing this module registers every operator with torch.

They work under `torch.compile(fullgraph=True)` and `torch.export`: each has a fake implementation that tells the output
shapes. There is no backward: asking for gradients raises `NotImplementedError` with the operator's name. An operator
whose output may be an input has a second form that changes this input and returns nothing: ``write_rows_``.
"""

from __future__ import annotations

from typing import Any

import torch

from .calls import call
from .errors import ArgumentError
from .ops import OPS
from .spec import OpSpec

_SCALARS = {int: "int", float: "float"}


def _schema(spec: OpSpec) -> str:
    inputs = [f"Tensor? {t.name}=None" if t.optional else f"Tensor {t.name}" for t in spec.inputs]
    attrs = [f"{_SCALARS[a.kind]} {a.name}" for a in spec.attrs]
    outputs = ", ".join(["Tensor"] * len(spec.outputs))
    arguments = ", ".join(inputs + (["*", *attrs] if attrs else []))
    return f"({arguments}) -> {outputs if len(spec.outputs) == 1 else f'({outputs})'}"


def _named(spec: OpSpec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs and attributes by name; torch passes them by position, without trailing defaults."""
    given = dict(zip((t.name for t in spec.inputs), args, strict=False)) | kwargs
    return {t.name: given.get(t.name) for t in spec.inputs}, {a.name: given[a.name] for a in spec.attrs}


def _expect_ranks(spec: OpSpec, inputs: dict[str, Any]) -> None:
    for t in spec.inputs:
        x = inputs[t.name]
        if x is not None and x.dim() != len(t.shape):
            raise ArgumentError(f"{spec.name}: {t.name}: expected rank {len(t.shape)}, got {x.dim()}")


def _single(outputs: tuple[Any, ...]) -> Any:
    return outputs[0] if len(outputs) == 1 else outputs


def _register(spec: OpSpec) -> None:
    name = f"dsa_tvm::{spec.name}"
    torch.library.define(name, _schema(spec))

    # For every device: `call` looks where the tensors are, and its error names the argument that is elsewhere.
    @torch.library.impl(name, "CompositeExplicitAutograd")
    def compute(*args, **kwargs):
        inputs, attrs = _named(spec, args, kwargs)
        with torch.no_grad():
            return _single(call(spec, inputs, attrs))

    @torch.library.register_fake(name)
    def fake(*args, **kwargs):
        inputs, attrs = _named(spec, args, kwargs)
        _expect_ranks(spec, inputs)
        dims = {a.dim: attrs[a.name] for a in spec.attrs if a.dim}
        for t in spec.inputs:
            x = inputs[t.name]
            if x is None:
                continue
            for dim, length in zip(t.shape, x.shape, strict=True):
                dims.setdefault(dim, length)
        variable = {t.dtype: inputs[t.name].dtype for t in reversed(spec.inputs) if inputs[t.name] is not None}
        like = inputs[spec.inputs[0].name]
        return _single(
            tuple(
                like.new_empty([dims[d] for d in t.shape], dtype=variable.get(t.dtype) or getattr(torch, t.dtype))
                for t in spec.outputs
            )
        )

    def backward(ctx, *gradients):
        raise NotImplementedError(f"dsa_tvm.{spec.name} has no backward: it serves inference only")

    torch.library.register_autograd(name, backward)


def _register_in_place(spec: OpSpec) -> None:
    """Register the form of an operator that writes to its inputs and returns nothing; its name ends in ``_``."""
    changed = {t.may_be: t.name for t in spec.outputs}
    name = f"dsa_tvm::{spec.name}_"
    inputs = [f"Tensor(a{i}!) {t.name}" if t.name in changed else f"Tensor {t.name}" for i, t in enumerate(spec.inputs)]
    torch.library.define(name, f"({', '.join(inputs)}) -> ()")

    # With gradients on, `call` refuses tensors that ask for them: what is overwritten has no derivative.
    @torch.library.impl(name, "CompositeExplicitAutograd")
    def compute(*args, **kwargs):
        inputs, attrs = _named(spec, args, kwargs)
        call(spec, inputs, attrs, tuple(inputs[t.may_be] for t in spec.outputs))

    @torch.library.register_fake(name)
    def fake(*args, **kwargs):
        inputs, _ = _named(spec, args, kwargs)
        _expect_ranks(spec, inputs)


for _spec in OPS.values():
    _register(_spec)
    if all(t.may_be for t in _spec.outputs):
        _register_in_place(_spec)
