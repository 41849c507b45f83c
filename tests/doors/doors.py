"""The four doors. Each takes a `Call` of `hostile.samples` and returns its outputs as NumPy arrays."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hostile import Argument, Call, Case
from hostile.samples import memory_of

import dsa_tvm
from dsa_tvm.benchmark.workload import to_numpy
from dsa_tvm.errors import ArgumentError
from dsa_tvm.spec import OpSpec


class Refused(Exception):
    """Stands for the error of a door, whose class depends on the door."""


class Door:
    """One way to call an operator.

    `offers` lists the needs of cases that it can express. If "outputs" is among them, `run` writes to the outputs of
    the call.
    """

    name: str
    offers: frozenset[str]

    def can(self, case: Case, spec: OpSpec) -> bool:
        """Whether this door can express the case."""
        return case.needs <= self.offers

    def run(self, call: Call) -> list[np.ndarray]:
        """The outputs of a call. Raises `Refused` if the door refuses it."""
        raise NotImplementedError

    def blames(self, message: str, call: Call, name: str) -> bool:
        """Whether a message names this argument. All our messages have the same form."""
        return bool(re.search(rf"{call.spec.name}: {name}: expected .*, got ", message))


class OnDevice:
    """A tensor that says it is on a GPU."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self.array.__dlpack__()


class Impostor(OnDevice):
    """A tensor on the CPU whose capsule is missing, or belongs to something else."""

    def __init__(self, array: np.ndarray, capsule: Any) -> None:
        super().__init__(array)
        self.capsule = capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self.capsule


class Functions(Door):
    """The Python functions, with arguments that `convert` has made."""

    _common = frozenset({"outputs", "strides", "objects", "bool", "double", "missing", "options", "device"})

    def __init__(self, name: str, convert: Callable[[Argument], Any], offers: set[str]) -> None:
        self.name, self.convert, self.offers = name, convert, self._common | offers

    def can(self, case: Case, spec: OpSpec) -> bool:
        if case.kind == "missing":
            parameters = inspect.signature(getattr(dsa_tvm, spec.name)).parameters
            return parameters[case.argument].default is inspect.Parameter.empty
        return super().can(case, spec)

    def run(self, call: Call, *, allocate: bool = False) -> list[np.ndarray]:
        tensors = {name: self._pass(argument) for name, argument in {**call.inputs, **call.outputs}.items()}
        inputs = {name: tensors[name] for name in call.inputs}
        out = None if allocate else tuple(tensors[name] for name in call.outputs)
        try:
            result = getattr(dsa_tvm, call.spec.name)(**inputs, **call.attrs, **call.options, out=out)
        except ArgumentError as error:
            raise Refused(str(error)) from error
        except TypeError as error:
            # Python itself refuses a missing argument.
            if "missing 1 required" in str(error):
                raise Refused(str(error)) from error
            raise
        if allocate:
            return [to_numpy(x) for x in (result if isinstance(result, tuple) else (result,))]
        return [call.tensor(t.name).array for t in call.spec.outputs]

    def blames(self, message: str, call: Call, name: str) -> bool:
        return super().blames(message, call, name) or message.endswith(f"argument: '{name}'")

    def _pass(self, argument: Argument | None) -> Any:
        if argument is None or not isinstance(argument.array, np.ndarray) or argument.array.dtype.kind in "UO":
            return argument and argument.array
        return self.convert(argument)


def to_numpy_door(argument: Argument) -> Any:
    """The array itself, or an object around it."""
    import datetime

    forms: dict[str, Callable[[np.ndarray], Any]] = {
        "strided": lambda x: x,
        "device": OnDevice,
        "no capsule": lambda x: Impostor(x, 5),
        "other capsule": lambda x: Impostor(x, datetime.datetime_CAPI),
        "used capsule": lambda x: Impostor(x, used_capsule()),
    }
    return forms[argument.form](argument.array)


def used_capsule() -> Any:
    """A capsule whose tensor another consumer has taken."""
    producer = Impostor(np.zeros(4, np.float32), None)
    producer.capsule = producer.array.__dlpack__()
    np.from_dlpack(producer)
    return producer.capsule


def to_torch(argument: Argument) -> Any:
    """A torch tensor in the array's memory."""
    import torch

    array = argument.array
    name = array.dtype.name
    if name in ("bfloat16", "float8_e4m3fn"):
        tensor = torch.from_numpy(array.view(np.uint16 if name == "bfloat16" else np.uint8)).view(getattr(torch, name))
    else:
        tensor = torch.from_numpy(array)
    if argument.form == "device":
        return tensor.to("meta")
    if argument.form == "sparse":
        positions = torch.empty((tensor.dim(), 0), dtype=torch.int64)
        values = torch.empty(0, dtype=tensor.dtype)
        return torch.sparse_coo_tensor(positions, values, tensor.shape, check_invariants=True)
    return tensor.requires_grad_() if argument.form == "requires grad" else tensor


class TorchOps(Door):
    """``torch.ops.dsa_tvm.*``."""

    name = "torch.ops"
    offers = frozenset({"strides", "objects", "double", "missing", "sparse"})

    def run(self, call: Call) -> list[np.ndarray]:
        import torch

        importlib.import_module("dsa_tvm.torch_ops")  # registers them

        inputs = [
            x and (to_torch(x) if isinstance(x.array, np.ndarray) and x.array.dtype.kind not in "UO" else x.array)
            for x in call.inputs.values()
        ]
        try:
            result = getattr(torch.ops.dsa_tvm, call.spec.name)(*inputs, **call.attrs)
        except ArgumentError as error:
            raise Refused(str(error)) from error
        except RuntimeError as error:
            # From torch's check against the schema.
            if "Expected a value of type" in str(error) or "missing value for argument" in str(error):
                raise Refused(str(error)) from error
            raise
        return [to_numpy(x) for x in (result if isinstance(result, tuple) else (result,))]

    def blames(self, message: str, call: Call, name: str) -> bool:
        return super().blames(message, call, name) or f"argument '{name}'" in message


def memories(call: Call) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The memory around every argument, and a copy of it."""
    found = {name: memory_of(array) for name, array in call.arrays().items()}
    return {name: (memory, memory.copy()) for name, memory in found.items() if memory.dtype == np.uint8}


def check_memory(call: Call, before: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Raise `AssertionError` if anything but the outputs' own bytes has changed."""
    for name, (memory, old) in before.items():
        for output in call.outputs:
            array = call.tensor(output).array
            start = array.ctypes.data - memory.ctypes.data
            # An output may lie in the memory of an input.
            if 0 <= start <= len(memory) - array.nbytes:
                old[start : start + array.nbytes] = memory[start : start + array.nbytes]
        assert np.array_equal(old, memory), f"memory around or in {name} was written to"


#: Every door, by its name.
DOORS = ("functions, NumPy", "functions, torch", "torch.ops", "ONNX Runtime", "C functions", "dsa_tvm_call")


def make_door(name: str) -> Door:
    """A door by its name. Skips the test if its package is not installed."""
    if "torch" in name:
        pytest.importorskip("torch")
    if name == "ONNX Runtime":
        pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")
        from ort_door import OnnxRuntime

        return OnnxRuntime()
    from c_door import CDoor

    numpy_needs = {"negative strides", "bytes", "read-only", "other capsule", "no capsule", "used capsule"}
    doors = {
        "functions, NumPy": lambda: Functions("functions, NumPy", to_numpy_door, numpy_needs),
        "functions, torch": lambda: Functions("functions, torch", to_torch, {"sparse", "requires grad"}),
        "torch.ops": TorchOps,
        "C functions": lambda: CDoor(typed=True),
        "dsa_tvm_call": lambda: CDoor(typed=False),
    }
    return doors[name]()
