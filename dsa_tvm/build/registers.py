"""Small buffers of a kernel on its stack, where LLVM finds registers for them."""

from __future__ import annotations

import math

import tvm
import tvm_ffi
from tvm import tirx

#: The name of the passes that lower CPU kernels.
PIPELINE = "dsa_tvm.cpu"
#: Larger ones stay workspaces, as the indexer's tile of 12 keys by 32 heads does: with it on the stack, LLVM has too
#: few registers for what is alive around the innermost loop, and spills there.
_MOST_BYTES = 1024


def _stays(alloc: tirx.AllocBuffer) -> tirx.AllocBuffer:
    buffer = alloc.buffer
    if (
        buffer.scope() != "local"
        or math.prod(map(int, buffer.shape)) * tvm.DataType(buffer.dtype).itemsize > _MOST_BYTES
    ):
        return alloc
    return tirx.AllocBuffer(alloc.buffer, annotations={"disable_lower_builtin": tirx.IntImm("bool", 1)})


@tirx.transform.prim_func_pass(opt_level=0)
def _keep(function, module, context):
    """Exempt buffers of scope "local" from becoming workspaces, as TVM makes all of them whatever their size."""
    return function.with_body(tvm_ffi.structural_map(function.body, (tirx.AllocBuffer, _stays), order="post"))


def _pipeline():
    lower, *finish = tirx.get_tir_pipeline("s_tir")
    return tvm.transform.Sequential([lower, _keep]), *finish


tirx.register_tir_pipeline(PIPELINE, _pipeline)
