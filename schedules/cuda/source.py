"""From a kernel in TensorIR to CUDA source.

TVM's own pipeline splits a function into a host part and a device part, chooses the parameters of the device part, and
launches it. Here the function is already the device part. Its parameters are those of the CUDA kernel, in order, and
the launcher decides the grid. Compiling needs neither a GPU nor a driver.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import tvm
import tvm_ffi
from tvm import s_tir, tirx

#: Directory of the headers that generated source includes: primitives.cuh, then helpers.cuh and hopper.cuh.
DEVICE_HEADERS = Path(__file__).parent / "headers"

_PRELUDE = "#include <primitives.cuh>\n#include <helpers.cuh>\n#include <hopper.cuh>\n"

# Without storage rewrite and merging of shared allocations: both reuse memory by a liveness analysis that does not know
# what device functions do with addresses.
_PASSES = (
    s_tir.transform.LowerInitBlock,
    s_tir.transform.PlanAndUpdateBufferAllocationLocation,
    s_tir.transform.ConvertBlocksToOpaque,
    s_tir.transform.LowerOpaqueBlock,
    tirx.transform.FlattenBuffer,
    lambda: tirx.transform.NarrowDataType(32),
    lambda: tirx.transform.VectorizeLoop(True),
    tirx.transform.UnrollLoop,
    tirx.transform.StmtSimplify,
    tirx.transform.CommonSubexprElim,
    tirx.transform.LowerIntrin,
)

_CUDA_KERNEL_LAUNCH = 2  # tvm::CallingConv::kDeviceKernelLaunch

# nvcc would unroll a serial loop by as much as it likes, and the code would not fit the instruction cache.
_SERIAL_LOOP = re.compile(r"(?<!#pragma unroll\n)^( *)for \(", re.MULTILINE)

_SHARED = re.compile(r"extern __shared__ [^;]*?(\w+)\[\];")


def _generate(symbol: str, func: tirx.PrimFunc) -> str:
    # The architecture decides nothing in the text: what differs between them is in the device headers.
    target = tvm.target.Target({"kind": "cuda", "arch": "sm_80"}).with_host(tvm.target.Target("llvm"))
    attributes = {"target": target, "global_symbol": symbol, "tirx.noalias": True, "tirx.is_global_func": True}
    func = func.with_attr({**attributes, "calling_conv": _CUDA_KERNEL_LAUNCH})
    module = tvm.IRModule({symbol: func})
    # Loops are left to `#pragma unroll`: the text stays readable and a third of the size.
    with target, tvm.transform.PassContext(config={"tirx.UnrollLoop": {"explicit_unroll": False}}):
        module = tvm.ir.transform.Sequential([make() for make in _PASSES])(module)
        return tvm.get_global_func("target.build.cuda")(module, target).inspect_source("cuda")


def device_code(symbol: str, func: tirx.PrimFunc) -> str:
    """The definition of one kernel.

    Parameters
    ----------
    symbol : str
    func : PrimFunc
        Its parameters are typed handles and scalars, its threads are bound with ``T.launch_thread``, and its shared
        memory is one buffer of scope ``shared.dyn`` at most.
    """
    compile_callback = "tvm_callback_cuda_compile"
    previous = tvm.get_global_func(compile_callback, allow_missing=True)
    tvm_ffi.register_global_func(compile_callback, lambda code: b"not compiled", override=True)
    try:
        text = _generate(symbol, func)
    finally:
        if previous is not None:
            tvm_ffi.register_global_func(compile_callback, previous, override=True)
    # Behind TVM's own prelude come a declaration and the definition, each opening alike.
    text = _SHARED.sub(r"DSA_SHARED_POOL(\1);", text[text.rindex('extern "C" __global__') :])
    return _SERIAL_LOOP.sub(r"\1#pragma unroll 1\n\1for (", text)


def translation_unit(definitions: Iterable[str]) -> str:
    """Source to compile with `DEVICE_HEADERS`, or with other headers of the same names, on the include path."""
    return _PRELUDE + "\n".join(definitions)


def cuda_source(functions: Iterable[tuple[str, tirx.PrimFunc]]) -> str:
    """One translation unit with a kernel for each symbol and function."""
    return translation_unit(device_code(symbol, func) for symbol, func in functions)
