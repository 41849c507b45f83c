"""ONNX models of the operators. Needs the onnx package; loads neither TVM, PyTorch nor ONNX Runtime."""

from __future__ import annotations

from ..runtime.library import get_library_path
from .onnx.models import build_attention_model, build_model
from .onnx.nodes import DOMAIN, VERSION, attach_bodies, detach_bodies, function_body, operator_node
from .onnx.plain import build_plain_attention_model, build_plain_model
from .onnx.schemas import register_schemas
from .onnx.translation import translation_table

__all__ = [
    "DOMAIN",
    "VERSION",
    "attach_bodies",
    "build_attention_model",
    "build_model",
    "build_plain_attention_model",
    "build_plain_model",
    "detach_bodies",
    "function_body",
    "get_library_path",
    "operator_node",
    "register_schemas",
    "translation_table",
]
