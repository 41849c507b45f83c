"""The same work done on a CPU by torch, plain ONNX Runtime and NumPy; and the sessions of ONNX Runtime."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from ...errors import DsaError
from ...runtime.machine import available_memory, in_units
from ...runtime.packing import unpack_mla_rows
from ..workload import Workload, widened
from . import Peer, Skipped, torch_peer

#: Names in the results, and in the table.
TITLES = {"torch": "torch", "ort": "ORT", "numpy": "numpy"}
#: A peer that would need more than this is left out.
MEMORY_LIMIT = 6 * 2**30
#: The memory that importing a peer takes.
_LOADED_BYTES = {"torch": 160 << 20}


def prepare(name: str, work: Workload, threads: int) -> Peer:
    """The work of one call by a peer, ready to be timed.

    Parameters
    ----------
    name : str
        A key of `TITLES`; ``"numpy"`` for `topk` alone.
    work : Workload
        Arrays of any element types. torch gets them as they are, and multiplies in the type that it is fastest in on
        this machine. The others get the same numbers in float32.
    threads : int

    Raises
    ------
    Skipped
        The package is not installed, or the peer would need too much memory.
    """
    if work.op == "sparse_mla_fp8" and name != "torch":
        # The peers know no packed rows, so they get the numbers that the rows stand for.
        kv = unpack_mla_rows(work.inputs["kv"], work.attrs["d_v"])
        work = Workload("sparse_mla", {**work.inputs, "kv": kv}, work.attrs, work.lengths)
    if name != "torch":
        work = widened(work)
    if name in _LOADED_BYTES and name not in sys.modules:
        check_bytes(_LOADED_BYTES[name])
    check_memory(work.op, work.lengths, held=1 if name == "torch" else 3)
    return {"torch": _torch, "ort": _ort, "numpy": _numpy}[name](work, threads)


def check_memory(op: str, lengths: Mapping[str, int], held: int) -> None:
    """Raise `Skipped` where the logits, those of every head and the gathered keys, held so many times, are too large.

    ONNX Runtime holds them three times: before and after an elementwise operator, and in its arena's slack.
    """
    heads = lengths["s_q"] * lengths["h_idx"] * lengths["s_kv"] * 4
    gathered = lengths["s_q"] * lengths["topk"] * lengths["d_qk"] * 4
    indexer = op in ("lightning_indexer", "indexer_topk", "dsa_attention")
    attention = op in ("sparse_mla", "dsa_attention")
    # Logits, and positions of 64 bits beside them.
    logits = lengths["s_q"] * lengths["s_kv"] * 12
    check_bytes(held * (heads * indexer + logits * (indexer or op == "topk") + gathered * attention))


def check_bytes(needed: int) -> None:
    """Raise `Skipped` if a peer may not use that much memory."""
    limit = min(MEMORY_LIMIT, int(0.8 * available_memory()))
    if needed > limit:
        raise Skipped(f"would need {in_units(needed)}, the limit is {in_units(limit)}")


@contextmanager
def onnxruntime_errors() -> Iterator[None]:
    """Turn what ONNX Runtime raises, for lack of memory perhaps, into a `DsaError`."""
    try:
        yield
    except Exception as error:
        # Its exceptions have no common base, but they come from one module.
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        raise DsaError(f"onnxruntime: {error}") from error


def session(model: Any, threads: int, library: str | None = None) -> Any:
    """An `onnxruntime.InferenceSession` on the CPU.

    Parameters
    ----------
    model : onnx.ModelProto
    threads : int
    library : str, optional
        Custom operators to register.

    Raises
    ------
    DsaError
        onnxruntime is not installed, or refuses the library or the model.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise DsaError("onnxruntime: expected it to be installed, got none; pip install 'dsa_tvm[onnx]'") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    # Contenders take turns, so the threads of one must not spin while the next is timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        if library is not None:
            options.register_custom_ops_library(library)
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own exceptions have no common base but this
        raise DsaError(f"onnxruntime: {error}") from error


def _ort(work: Workload, threads: int) -> Peer:
    try:
        import onnxruntime  # noqa: F401

        model = _plain_model(work)
    except ImportError as error:
        raise Skipped(f"{error.name} is not installed") from error
    running = session(model, threads)
    output = [running.get_outputs()[0].name]
    feeds = dict(work.inputs)
    # The output of the whole attention does not tell what it selected.
    result = None if work.op == "dsa_attention" else lambda x: x[0]
    return Peer(lambda: running.run(output, feeds), result, "" if work.op == "topk" else "float32")


def _plain_model(work: Workload) -> Any:
    from onnx import TensorProto, helper

    from ...export import build_plain_model

    # A single query has a faster form of its own.
    dims = {"s_q": 1} if work.lengths["s_q"] == 1 else {}
    if work.op != "indexer_topk":
        return build_plain_model(work.op, dims=dims, **work.attrs)
    model = build_plain_model("lightning_indexer", dims=dims)
    count = min(work.lengths["topk"], work.lengths["s_kv"])
    model.graph.node.extend(
        [
            helper.make_node("Constant", [], ["count"], value_ints=[count]),
            helper.make_node("TopK", ["logits", "count"], ["values", "indices"], largest=1, sorted=0),
        ]
    )
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("indices", TensorProto.INT64, ["s_q", "selected"]))
    return model


def dense_model(sm_scale: float, lengths: Mapping[str, int], one_query: bool) -> Any:
    """Causal attention over every earlier key, as standard ONNX.

    Parameters
    ----------
    sm_scale : float
    lengths : mapping
        h_q, d_qk and d_v.
    one_query : bool
        For s_q = 1, where nothing has to be masked.

    Returns
    -------
    onnx.ModelProto
        Inputs q [s_q, h_q, d_qk], kv [s_kv, d_qk] float32, ke [s_q] int32; output out [s_q, h_q, d_v]. Of ke, a model
        for one query has no use.
    """
    from onnx import TensorProto, helper

    from ...export.onnx.body import Body
    from ...export.onnx.nodes import make_model

    h_q, d_qk, d_v = (lengths[n] for n in ("h_q", "d_qk", "d_v"))
    b = Body()
    rows = b("Reshape", b("Mul", "q", b.const(np.float32(sm_scale))), b.const([-1, d_qk]))
    scores = b("Gemm", rows, "kv", transB=1)
    if not one_query:
        hidden = b("GreaterOrEqual", b.positions(scores), b.unsqueeze("ke", 1))
        bias = b("Where", hidden, b.const(np.float32(-np.inf)), b.const(np.float32(0)))
        by_query = b("Reshape", scores, b("Concat", b.const([-1, h_q]), b.length("kv", 0), axis=0))
        masked = b("Add", by_query, b.unsqueeze(bias, 1))
        scores = b("Reshape", masked, b("Concat", b.const([-1]), b.length("kv", 0), axis=0))
    # The product over d_qk and a cut after it beat a cut of the keys, which is a copy.
    values = b("Slice", b("MatMul", b("Softmax", scores, axis=-1), "kv"), b.const([0]), b.const([d_v]), b.const([1]))
    b.rename(b("Reshape", values, b.const([-1, h_q, d_v])), "out")
    shapes: dict[str, list] = {"q": ["s_q", h_q, d_qk], "kv": ["s_kv", d_qk], "out": ["s_q", h_q, d_v]}
    q, kv, out = (helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in shapes.items())
    ke = helper.make_tensor_value_info("ke", TensorProto.INT32, ["s_q"])
    return make_model("dense_attention", b.nodes, [q, kv, ke], [out])


def _numpy(work: Workload, threads: int) -> Peer:
    logits, topk = work.inputs["logits"], work.lengths["topk"]
    if topk >= logits.shape[1]:
        raise Skipped("argpartition has nothing to leave out")
    return Peer(lambda: np.argpartition(logits, -topk, axis=-1)[:, -topk:])


def _torch(work: Workload, threads: int) -> Peer:
    try:
        import torch
    except ImportError as error:
        raise Skipped("torch is not installed") from error
    torch.set_num_threads(threads)
    tensors = {name: _tensor(x) for name, x in work.inputs.items()}
    product = torch_peer.fastest_form(_dtype(work), threads)
    call = torch_peer.prepare(Workload(work.op, tensors, work.attrs, work.lengths), product=product)
    return Peer(call, product="" if work.op == "topk" else product)


def _tensor(x: np.ndarray) -> Any:
    """The same memory as a torch tensor, whose types are more than those that it takes from NumPy."""
    import torch

    carriers = {"bfloat16": np.int16, "float8_e4m3fn": np.uint8}
    if x.dtype.name not in carriers:
        return torch.from_numpy(x)
    return torch.from_numpy(x.view(carriers[x.dtype.name])).view(getattr(torch, x.dtype.name))


def _dtype(work: Workload) -> str:
    """Element type of the queries, and float32 where there are none."""
    first = work.spec.inputs[0]
    return str(work.inputs[first.name].dtype) if first.dtype == "T" else "float32"
