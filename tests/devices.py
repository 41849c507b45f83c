"""Calls of the operators with arrays, on the CPU or on a GPU, so that both devices share their tests."""

from __future__ import annotations

import importlib
import inspect
import sys
from typing import Any

import numpy as np
import pytest

import dsa_tvm
from dsa_tvm.benchmark.workload import to_numpy
from dsa_tvm.ops import OPS
from dsa_tvm.ops.element_types import STORAGE

needs_inductor = pytest.mark.skipif(
    "'" in sys.prefix, reason="torch's inductor cannot compile from a folder with an apostrophe"
)


def dots_of_bf16(device: str) -> bool:
    """Whether the CPU's bf16 dot products are used, which treat subnormal numbers as 0."""
    return device == "cpu" and dsa_tvm.active_target().endswith(("-bf16", "-amx"))


def dots_of_8_bits(name: str) -> bool:
    """Whether a CPU multiplies this type of 8 bits by dot products, whose sums over the heads have another order."""
    targets = ("-amx", "-bf16", "-vnni") if name == "int8" else ("-amx", "-bf16")
    return dsa_tvm.active_target().endswith(targets)


def float_target() -> str:
    """The CPU target whose kernels serve float32."""
    from dsa_tvm.schedules import chain

    return chain(dsa_tvm.active_target())[-1]


def run(op: str, device: str, *args: Any, **kwargs: Any) -> Any:
    """Call ``dsa_tvm.<op>(*args, **kwargs)``, on a GPU through `run_torch`.

    Parameters
    ----------
    op : str
    device : str
        "cpu" or "cuda".
    *args, **kwargs
        Arguments of the function, with tensors as arrays.
    """
    return getattr(dsa_tvm, op)(*args, **kwargs) if device == "cpu" else run_torch(op, device, *args, **kwargs)


def run_torch(op: str, device: str, *args: Any, **kwargs: Any) -> Any:
    """`run`, with torch tensors on any device.

    The function and ``torch.ops`` must give the same bits, which is also to say that two calls do, and leave their
    inputs as they are.
    """
    import torch

    importlib.import_module("dsa_tvm.torch_ops")  # registers them
    function = getattr(dsa_tvm, op)
    given = inspect.signature(function).bind(*args, **kwargs).arguments
    tensors = {n: to_device(x, device) if isinstance(x, np.ndarray) else x for n, x in given.items()}
    before = {n: x.clone() for n, x in tensors.items() if isinstance(x, torch.Tensor)}
    results = as_tuple(function(**tensors))
    again = as_tuple(getattr(torch.ops.dsa_tvm, op)(**complete(op, tensors)))
    assert all(x.device == next(iter(before.values())).device for x in results)
    assert all(same_bits(x, y) for x, y in zip(results, again, strict=True)), f"{op}: two calls differ"
    assert all(same_bits(tensors[n], x) for n, x in before.items()), f"{op}: an input has changed"
    arrays = tuple(to_numpy(x) for x in results)
    return arrays if len(arrays) > 1 else arrays[0]


def complete(op: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments including d_v, which has a default in the functions but not in torch.ops."""
    if not any(attr.name == "d_v" for attr in OPS[op].attrs):
        return arguments
    return {"d_v": 512, **arguments}


def as_tuple(x: Any) -> tuple[Any, ...]:
    """The outputs of an operator as a tuple, even if there is only one."""
    return tuple(x) if isinstance(x, tuple | list) else (x,)


def same_bits(x: Any, y: Any) -> bool:
    """Whether two tensors are equal, NaN included."""
    import torch

    return x.shape == y.shape and torch.equal(*(z.reshape(-1).view(torch.uint8) for z in (x, y)))


def to_device(array: np.ndarray, device: str) -> Any:
    """A copy of an array as a torch tensor."""
    import torch

    bits = array.view(STORAGE.get(array.dtype.name, array.dtype))
    return torch.tensor(bits, device=device).view(getattr(torch, array.dtype.name))
