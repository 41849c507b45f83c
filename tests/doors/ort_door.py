"""The ONNX Runtime door: models of one node, without a function body to fall back on."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from doors import Door, Refused
from hostile import Call, Case
from onnx import helper
from ort_values import onnx_type, ort_value

from dsa_tvm.runtime import library
from dsa_tvm.spec import OpSpec


class OnnxRuntime(Door):
    """Models of one node, with inputs and outputs bound to the memory of the call."""

    name = "ONNX Runtime"
    # A model cannot contain lists and other objects, but attributes may be missing or have a wrong value.
    offers = frozenset({"missing"})

    def __init__(self) -> None:
        self.options = ort.SessionOptions()
        self.options.register_custom_ops_library(library.get_library_path())
        self.options.log_severity_level = 4
        self.options.intra_op_num_threads = 1
        self.sessions: dict[str, ort.InferenceSession] = {}

    def can(self, case: Case, spec: OpSpec) -> bool:
        attribute = case.argument in {a.name for a in spec.attrs} and case.kind.startswith(("str ", "float "))
        return super().can(case, spec) or (attribute and case.needs == {"objects"})

    def run(self, call: Call) -> list[np.ndarray]:
        try:
            session = self._session(call)
        except (errors.InvalidGraph, errors.InvalidArgument, errors.Fail, errors.RuntimeException) as error:
            raise Refused(str(error)) from error
        binding = session.io_binding()
        inputs = {name: ort_value(x.array) for name, x in call.inputs.items() if x is not None}
        for name, x in inputs.items():
            binding.bind_ortvalue_input(name, x)
        for name in call.outputs:
            binding.bind_ortvalue_output(name, ort_value(call.tensor(name).array))
        try:
            session.run_with_iobinding(binding)
        except RuntimeError:
            # With bindings, Python gets only the message. Without them it gets the status too.
            try:
                session.run_with_ort_values(list(call.outputs), inputs)
            except errors.InvalidArgument as error:
                raise Refused(str(error)) from error
            raise
        return [call.tensor(t.name).array for t in call.spec.outputs]

    def blames(self, message: str, call: Call, name: str) -> bool:
        # The message about an unreadable attribute has no "got".
        if f"{call.spec.name}: {name}: expected " in message or f"input parameter ({name})" in message:
            return True
        # Checks of ONNX Runtime: it names a missing required input by its position, and of types that do not go
        # together it names only the operator.
        position = list(call.inputs).index(name) if name in call.inputs else -1
        return f"input {position} is marked single but has an empty string" in message or (
            "no kernel def matches node inputs for Op: " + call.spec.onnx_name in message
        )

    def _session(self, call: Call) -> ort.InferenceSession:
        inputs = {n: None if x is None else onnx_type(x.array.dtype) for n, x in call.inputs.items()}
        outputs = {n: onnx_type(call.tensor(n).array.dtype) for n in call.outputs}
        key = repr((call.spec.name, inputs, outputs, call.attrs))
        if key not in self.sessions:
            names = [n if kind else "" for n, kind in inputs.items()]
            while not names[-1] and call.spec.inputs[len(names) - 1].optional:
                names.pop()
            node = helper.make_node(call.spec.onnx_name, names, list(outputs), domain="ai.dsa", **call.attrs)
            # Without ranks, so that the kernel does all the checks.
            of_graph, results = ([value(n, kind) for n, kind in group.items() if kind] for group in (inputs, outputs))
            graph = helper.make_graph([node], "one", of_graph, results)
            opsets = [helper.make_opsetid("", 20), helper.make_opsetid("ai.dsa", 1)]
            model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
            providers = ["CPUExecutionProvider"]
            self.sessions[key] = ort.InferenceSession(model.SerializeToString(), self.options, providers=providers)
        return self.sessions[key]


errors: Any = ort.capi.onnxruntime_pybind11_state


def value(name: str, kind: int) -> onnx.ValueInfoProto:
    """A graph input or output of unknown rank."""
    return helper.make_tensor_value_info(name, kind, None)
