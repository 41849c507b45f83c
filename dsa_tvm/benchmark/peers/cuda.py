"""The same work done by other packages on a GPU: DeepGEMM, FlashMLA, vLLM and Triton; torch is in `torch_peer`.

None of them is needed. The benchmark imports them when it runs, and reports those that are missing.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ... import functions
from ...runtime.packing import unpack_mla_rows
from ..workload import Workload
from . import Peer, Skipped, torch_peer

_CACHE_PAGE = 64

#: Names in the results, and in the table.
TITLES = {
    "bf16": "ours, bf16",
    "torch": "torch",
    "triton": "Triton",
    "deep_gemm": "DeepGEMM",
    "flash_mla": "FlashMLA",
    "flash_mla_fp8": "FlashMLA fp8",
    "vllm": "vLLM",
    "vllm_prefill": "vLLM prefill",
}
#: The peers of each operator.
BY_OPERATOR: Mapping[str, tuple[str, ...]] = {
    "lightning_indexer": ("torch", "triton", "deep_gemm"),
    "topk": ("torch", "vllm", "vllm_prefill"),
    "indexer_topk": ("torch", "deep_gemm"),
    "sparse_mla": ("torch", "flash_mla", "vllm"),
    "sparse_mla_fp8": ("bf16", "torch", "flash_mla_fp8"),
    "dsa_attention": ("torch",),
}


def prepare(name: str, work: Workload, capability: int) -> Peer:
    """Prepare the work of a peer for timing.

    Parameters
    ----------
    name : str
        A key of `TITLES`.
    work : Workload
        torch tensors.
    capability : int
        Compute capability of the GPU, 90 for 9.0.

    Raises
    ------
    Skipped
        The peer is not installed, or does not take such arguments.
    """
    return _MAKERS[name](work, capability)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Skipped(_line(f"{name} does not import", error)) from error
    except Exception as error:  # whatever its initialization raises, from a missing libcudart to an assertion
        raise Skipped(_line(f"{name} does not start", error)) from error


def _line(what: str, error: BaseException) -> str:
    first = str(error).strip().partition("\n")[0]
    return f"{what} ({type(error).__name__}: {first[:200]})"


def _bf16(work: Workload, capability: int) -> Peer:
    """`sparse_mla` on the numbers of packed rows, which take nearly twice the memory."""
    t, kv = work.inputs, unpack_mla_rows(work.inputs["kv"], work.attrs["d_v"])
    return Peer(lambda: functions.sparse_mla(t["q"], kv, t["indices"], **work.attrs), lambda x: x[0])


def _torch(work: Workload, capability: int) -> Peer:
    return Peer(torch_peer.prepare(work, capability))


def _triton(work: Workload, capability: int) -> Peer:
    _import("triton")
    if work.lengths["s_q"] * work.lengths["h_idx"] * work.lengths["s_kv"] * 2 > torch_peer.LIMIT:
        raise Skipped("torch.compile's indexer holds every head's logits, which are too large")
    compiled = _compiled()
    queries, keys, weights = (torch_peer.as_bf16(work.inputs[n]) for n in ("q", "k", "weights"))
    hidden, scale = torch_peer.hidden(work), work.inputs.get("k_scale")
    return Peer(lambda: compiled(queries, keys, weights, hidden, scale))


@functools.cache
def _compiled() -> Callable[..., Any]:
    import torch

    return torch.compile(torch_peer.plain_indexer, dynamic=True)


def _deep_gemm(work: Workload, capability: int) -> Peer:
    t, lengths = work.inputs, work.lengths
    if str(t["q"].dtype) != "torch.float8_e4m3fn":
        raise Skipped("DeepGEMM's fp8_mqa_logits takes fp8 queries and keys")
    if capability < 90:
        raise Skipped("DeepGEMM begins at compute capability 9.0")
    import torch

    score = _import("deep_gemm").fp8_mqa_logits
    selecting, count = work.op == "indexer_topk", min(lengths["topk"], lengths["s_kv"])

    def logits() -> Any:
        # Without clean_logits, logits outside of a query's range are not written. torch.topk would read them.
        given = score(t["q"], (t["k"], t["k_scale"]), t["weights"], t["ks"], t["ke"], clean_logits=selecting)
        return given if isinstance(given, torch.Tensor) else torch.from_dlpack(given)

    return Peer((lambda: torch.topk(logits(), count, sorted=False)[1]) if selecting else logits)


def _one_kv_head(work: Workload) -> tuple[Any, Any, Any]:
    """q, kv [s_kv, 1, d_qk], indices [s_q, 1, topk] for FlashMLA, which takes few shapes."""
    t = work.inputs
    if str(t["q"].dtype) != "torch.bfloat16" or work.lengths["h_q"] not in (64, 128):
        raise Skipped("FlashMLA takes bfloat16 and 64 or 128 heads")
    return t["q"], t["kv"][:, None], t["indices"][:, None]


def _legacy(function: Callable[..., Any], work: Workload, capability: int) -> dict[str, bool]:
    """Which kernels of sgl-flash-mla to use. For Hopper, and for rows of 576, they are the older ones."""
    if "use_legacy" not in inspect.signature(function).parameters:
        return {}
    return {"use_legacy": capability < 100 or work.lengths["d_qk"] != 512}


def _flash_mla(work: Workload, capability: int) -> Peer:
    attend = _import("flash_mla").flash_mla_sparse_fwd
    q, kv, indices = _one_kv_head(work)
    options, attrs = _legacy(attend, work, capability), work.attrs
    return Peer(lambda: attend(q, kv, indices, attrs["sm_scale"], d_v=attrs["d_v"], **options), lambda x: x[0])


def _flash_mla_fp8(work: Workload, capability: int) -> Peer:
    """Decoding from its cache of 656 bytes per token, with each query as a separate sequence."""
    package = _import("flash_mla")
    q, _, indices = _one_kv_head(work)
    if work.lengths["d_qk"] != 576 or work.lengths["s_q"] > 256:
        raise Skipped("FlashMLA's decoding takes rows of 576, and few queries")
    attend = package.flash_mla_with_kvcache
    cache = flash_mla_cache(work.inputs["kv"])
    options: dict[str, Any] = _legacy(attend, work, capability)
    if options.get("use_legacy"):
        options["kv_format"] = "V32"
    schedule = package.get_mla_metadata()[0]

    def call() -> Any:
        arguments = (q[:, None], cache, None, None, work.attrs["d_v"], schedule)
        scale = work.attrs["sm_scale"]
        return attend(*arguments, softmax_scale=scale, is_fp8_kvcache=True, indices=indices, **options)

    return Peer(call, lambda x: x[0][:, 0])


@functools.cache
def _load_vllm(pattern: str) -> None:
    """Register the operators of one extension of vLLM, without importing the rest, which needs much more."""
    import torch

    found = importlib.util.find_spec("vllm")
    folders = found.submodule_search_locations if found else None
    libraries = sorted(path for folder in folders or () for path in Path(folder).glob(pattern))
    if not libraries:
        raise Skipped("vllm is not installed" if not folders else f"vllm has no {pattern}")
    for path in libraries:
        try:
            torch.ops.load_library(str(path))
        except OSError as error:
            raise Skipped(_line(f"vllm's {path.name} does not load", error)) from error


def _vllm_operator(pattern: str, namespace: str, name: str) -> Any:
    import torch

    _load_vllm(pattern)
    try:
        return getattr(getattr(torch.ops, namespace), name).default
    except AttributeError as error:
        raise Skipped(f"vllm has no operator {namespace}.{name}") from error


def _vllm(work: Workload, capability: int) -> Peer:
    t, lengths = work.inputs, work.lengths
    if work.op == "topk":
        if lengths["topk"] not in (512, 1024, 2048):
            raise Skipped("vLLM's persistent_topk takes topk 512, 1024 and 2048")
        select = _vllm_operator("_C*.so", "_C", "persistent_topk")
        out, memory = _indices_like(work), _bytes_like(work, 2**20)
        return Peer(lambda: select(t["logits"], t["ke"], out, memory, lengths["topk"], lengths["s_kv"]), lambda _: out)
    attend = _vllm_operator("_flashmla_C*.so", "_flashmla_C", "sparse_prefill_fwd")
    arguments = [*_one_kv_head(work), work.attrs["sm_scale"], work.attrs["d_v"]]
    # Optional arguments of later versions.
    arguments += [None] * (len(attend._schema.arguments) - len(arguments))
    return Peer(lambda: attend(*arguments), lambda x: x[0])


def _vllm_prefill(work: Workload, capability: int) -> Peer:
    t, lengths = work.inputs, work.lengths
    select = _vllm_operator("_C*.so", "_C", "top_k_per_row_prefill")
    out, sizes = _indices_like(work), (lengths["s_q"], lengths["s_kv"], 1, lengths["topk"])
    return Peer(lambda: select(t["logits"], t["ks"], t["ke"], out, *sizes), lambda _: out)


def _indices_like(work: Workload) -> Any:
    """Memory for `topk`'s output."""
    import torch

    shape = (work.lengths["s_q"], work.lengths["topk"])
    return torch.full(shape, -1, dtype=torch.int32, device=work.inputs["logits"].device)


def _bytes_like(work: Workload, size: int) -> Any:
    """Zeroed memory."""
    import torch

    return torch.zeros(size, dtype=torch.uint8, device=work.inputs["logits"].device)


def flash_mla_cache(rows: Any) -> Any:
    """Packed rows of 576 in the form of FlashMLA: a tensor [pages, 64, 1, 656], float8_e4m3fn."""
    import torch

    pages = -(-len(rows) // _CACHE_PAGE)
    cache = rows.new_zeros((pages * _CACHE_PAGE, rows.shape[1]))
    cache[: len(rows)] = rows
    return cache.view(pages, _CACHE_PAGE, 1, -1).view(torch.float8_e4m3fn)


_MAKERS: Mapping[str, Callable[[Workload, int], Peer]] = {
    "bf16": _bf16,
    "torch": _torch,
    "triton": _triton,
    "deep_gemm": _deep_gemm,
    "flash_mla": _flash_mla,
    "flash_mla_fp8": _flash_mla_fp8,
    "vllm": _vllm,
    "vllm_prefill": _vllm_prefill,
}
