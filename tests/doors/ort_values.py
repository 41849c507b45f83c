"""Values and models for ONNX Runtime's Python API, which knows only NumPy's own element types."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper

from dsa_tvm.ops.element_types import STORAGE
from dsa_tvm.spec import ONNX_TYPES


def onnx_type(dtype: np.dtype) -> int:
    """TensorProto.DataType of an array's type."""
    return ONNX_TYPES.get(dtype.name) or helper.np_dtype_to_tensor_dtype(dtype)


def ort_value(array: np.ndarray) -> ort.OrtValue:
    """A value in the array's memory."""
    stored = array.view(STORAGE.get(array.dtype.name, array.dtype))
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(stored, onnx_type(array.dtype))


def widened(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of the model whose outputs of bfloat16 and float8 are cast to float32, which NumPy has."""
    narrow = (onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT8E4M3FN)
    model = onnx.ModelProto.FromString(model.SerializeToString())
    for output in model.graph.output:
        if output.type.tensor_type.elem_type in narrow:
            output.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
            old, output.name = output.name, f"{output.name}_wide"
            model.graph.node.append(helper.make_node("Cast", [old], [output.name], to=onnx.TensorProto.FLOAT))
    return model
