"""The signatures of functions in other packages that the benchmark calls, as these packages declare them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

#: By distribution, version and source file: the parameters of functions, without their annotations.
FUNCTIONS = {
    ("sgl-deep-gemm", "0.1.5", "deep_gemm/__init__.py"): {
        "fp8_mqa_logits": "q, kv, weights, ks, ke, clean_logits=False, max_seqlen_k=0",
    },
    ("sgl-flash-mla", "1.0.0", "flash_mla/flash_mla_interface.py"): {
        "flash_mla_sparse_fwd": "q, kv, indices, sm_scale, d_v=512, attn_sink=None, topk_length=None, "
        "use_legacy=False, return_log2_lse=None",
        "flash_mla_with_kvcache": "q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, "
        "num_splits=None, softmax_scale=None, causal=False, is_fp8_kvcache=None, indices=None, attn_sink=None, "
        "extra_k_cache=None, extra_indices_in_kvcache=None, topk_length=None, extra_topk_length=None, "
        "enable_batch_invariant=False, use_legacy=False, kv_format=None, descale_q=None, descale_k=None",
        "get_mla_metadata": "*args, **kwargs",
    },
    # github.com/deepseek-ai/FlashMLA at that commit, which has no older kernels to choose.
    ("flash-mla", "9241ae3", "flash_mla/flash_mla_interface.py"): {
        "flash_mla_sparse_fwd": "q, kv, indices, sm_scale, d_v=512, attn_sink=None, topk_length=None",
        "flash_mla_with_kvcache": "q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, "
        "num_splits=None, softmax_scale=None, causal=False, is_fp8_kvcache=False, indices=None, attn_sink=None, "
        "extra_k_cache=None, extra_indices_in_kvcache=None, topk_length=None, extra_topk_length=None",
        "get_mla_metadata": "*args, **kwargs",
    },
}

#: vLLM's operators: csrc/libtorch_stable/torch_bindings.cpp of github.com/vllm-project/vllm at 0135b6c0e1e1.
VLLM = {
    "_C::persistent_topk": "(Tensor logits, Tensor lengths, Tensor! output, Tensor workspace, int k, int max_seq_len) "
    "-> ()",
    "_C::top_k_per_row_prefill": "(Tensor logits, Tensor rowStarts, Tensor rowEnds, Tensor! indices, int numRows, "
    "int stride0, int stride1, int topK) -> ()",
}
#: And that of its copy of FlashMLA, whose optional arguments came one after another; they have no defaults.
VLLM_SPARSE_PREFILL = [
    f"(Tensor q, Tensor kv, Tensor indices, float sm_scale, int d_v{optional}) -> Tensor[]"
    for optional in (
        "",
        ", Tensor? attn_sink, Tensor? topk_length",
        ", Tensor? attn_sink, Tensor? topk_length, Tensor(a!)? out_",
    )
]


def stand_in(parameters: str, body: Callable[..., Any]) -> Callable[..., Any]:
    """A function that only accepts calls with a given signature. `body` gets every argument by name."""
    signature = inspect.signature(eval(f"lambda {parameters}: None"))

    def function(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return body(**bound.arguments)

    function.__signature__ = signature  # type: ignore[attr-defined]
    return function
