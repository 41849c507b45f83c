"""The operators, one file each, and `OPS`, which lists them."""

from __future__ import annotations

from collections.abc import Mapping

from ..spec import OpSpec
from . import dsa_attention, indexer_topk, lightning_indexer, sparse_mla, sparse_mla_fp8, topk, write_rows

#: Every operator by name, in the order of the pipeline.
OPS: Mapping[str, OpSpec] = {
    module.SPEC.name: module.SPEC
    for module in (lightning_indexer, topk, indexer_topk, sparse_mla, sparse_mla_fp8, dsa_attention, write_rows)
}
