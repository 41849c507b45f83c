"""A list of ONNX nodes under construction."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import AttributeProto, NodeProto, TensorProto, helper, numpy_helper


class Body:
    """A list of nodes under construction. A call appends a node and returns the names of its outputs."""

    def __init__(self, prefix: str = "") -> None:
        self.nodes: list[NodeProto] = []
        self._prefix = prefix
        self._constants: dict[tuple, str] = {}
        self._casts: dict[tuple[str, int], str] = {}

    def __call__(self, op_type: str, *inputs: str, outputs: int = 1, **attrs: Any) -> Any:
        names = [f"{self._prefix}{op_type}_{len(self.nodes)}" + (f"_{i}" if i else "") for i in range(outputs)]
        self.nodes.append(helper.make_node(op_type, list(inputs), names, name=names[0], **attrs))
        return names[0] if outputs == 1 else names

    def const(self, value: Any) -> str:
        """The name of a constant. Python integers and lists of them become int64."""
        array = np.asarray(value)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self("Constant", value=numpy_helper.from_array(array))
        return self._constants[key]

    def attribute(self, name: str, kind: type) -> str:
        """An attribute of the calling node, as a scalar."""
        value = self("Constant")
        field, proto_type = {int: ("value_int", AttributeProto.INT), float: ("value_float", AttributeProto.FLOAT)}[kind]
        self.nodes[-1].attribute.append(AttributeProto(name=field, ref_attr_name=name, type=proto_type))
        return value

    def length(self, tensor: str, axis: int) -> str:
        """The length of an axis, as int64 of shape [1]."""
        return self("Shape", tensor, start=axis, end=axis + 1)

    def positions(self, matrix: str) -> str:
        """The numbers 0, 1, ... of the columns, as int32."""
        # Cast at the end: ONNX Runtime keeps a fixed length as int64 through a Cast, and an int32 Range then fails.
        stop = self("Squeeze", self.length(matrix, 1))
        return self.cast(self("Range", self.const(0), stop, self.const(1)), TensorProto.INT32)

    def vector(self, scalar: str) -> str:
        """A scalar as a tensor of shape [1]."""
        return self("Reshape", scalar, self.const([1]))

    def cast(self, tensor: str, to: int) -> str:
        """A tensor in another element type; each is cast once."""
        if (tensor, to) not in self._casts:
            self._casts[tensor, to] = self("Cast", tensor, to=to)
        return self._casts[tensor, to]

    def unsqueeze(self, tensor: str, *axes: int) -> str:
        """A tensor with new axes of length 1."""
        return self("Unsqueeze", tensor, self.const(list(axes)))

    def rename(self, old: str, new: str) -> None:
        """Rename a value."""
        for node in self.nodes:
            for names in (node.input, node.output):
                names[:] = [new if name == old else name for name in names]
