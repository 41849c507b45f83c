"""Makes ``torch.onnx.export`` write each torch operator as one node of ``ai.dsa``. Needs torch and onnxscript."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from ...errors import ArgumentError
from ...ops import OPS
from ...spec import OpSpec
from .nodes import DOMAIN, VERSION
from .schemas import register_schemas


def translation_table() -> dict[Any, Callable[..., Any]]:
    """A ``custom_translation_table`` for ``torch.onnx.export`` with the operators of ``torch.ops.dsa_tvm``.

    This registers the torch operators (`dsa_tvm.torch_ops`) and the schemas (`register_schemas`). Attributes are
    numbers in ONNX, so one that the model computes from a shape, such as ``topk=min(2048, k.shape[0])``, needs a fixed
    shape. Pass `topk` itself instead: with fewer keys, the remaining indices are -1.

    Returns
    -------
    dict
        A function for each ``torch.ops.dsa_tvm.<operator>.default``.

    Raises
    ------
    ModuleNotFoundError
        torch or onnxscript is not installed.

    Examples
    --------
    >>> program = torch.onnx.export(model, args, custom_translation_table=export.translation_table())
    >>> export.attach_bodies(program.model_proto)
    """
    import torch

    from ... import torch_ops  # noqa: F401  # registers the operators

    register_schemas()
    return {getattr(torch.ops.dsa_tvm, name).default: _translation(spec) for name, spec in OPS.items()}


def _translation(spec: OpSpec) -> Callable[..., Any]:
    from onnxscript.values import Opset

    operator = getattr(Opset(DOMAIN, VERSION), spec.onnx_name)
    kinds = {a.name: a.kind for a in spec.attrs}

    def translate(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        inputs = [given.get(t.name) for t in spec.inputs]
        while inputs[-1] is None:
            inputs.pop()
        attrs = {name: given[name] for name in kinds}
        for name, value in attrs.items():
            if not isinstance(value, (int, float)):
                raise ArgumentError(
                    f"{spec.name}: attribute {name}: expected a number, as ONNX keeps it in the node, "
                    f"got one that follows from a shape ({value})"
                )
        return operator(*inputs, **attrs)

    # From the signature, the exporter learns which arguments are inputs and which are attributes.
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature(
        [
            *(inspect.Parameter(t.name, kind) for t in spec.inputs if not t.optional),
            *(inspect.Parameter(t.name, kind, default=None) for t in spec.inputs if t.optional),
            *(inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, annotation=k) for n, k in kinds.items()),
        ]
    )
    translate.__signature__ = signature  # type: ignore[attr-defined]
    translate.__annotations__ = dict(kinds)
    translate.__name__ = spec.name
    return translate
