"""A worker process compiles and measures candidates, so that a crash or a hang ends nothing else.

It is started as ``python -m dsa_tvm.tuning.worker ROLE``, and `HANDLERS` lists the requests of each role. Requests come
on standard input, and answers go to the original standard output, each as a length and a pickle. All other output goes
to standard error, whose last lines the parent reports after a crash.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import pickle
import signal
import struct
import sys
from collections.abc import Callable, Mapping
from typing import IO, Any

from ..gpu.driver import CudaError
from ..terminal.extras import keep_tvm_from_torch
from .failures import EXHAUSTED, SURROUNDINGS

LENGTH = struct.Struct("<Q")
_PR_SET_PDEATHSIG = 1


def send(file: IO[bytes], message: Any) -> None:
    """Write one message."""
    data = pickle.dumps(message)
    file.write(LENGTH.pack(len(data)) + data)
    file.flush()


def receive(file: IO[bytes]) -> Any:
    """Read one message.

    Raises
    ------
    EOFError
        The other side has closed its end.
    """
    head = file.read(LENGTH.size)
    if len(head) < LENGTH.size:
        raise EOFError
    length = LENGTH.unpack(head)[0]
    data = file.read(length)
    if len(data) < length:
        raise EOFError
    return pickle.loads(data)


def compile_object(
    module: str, op: str, variant: Mapping[str, str], target: str, decisions: Mapping[str, int], suffix: str, path: str
) -> None:
    """Compile the kernel of one candidate to an object file. `suffix` keeps its symbols apart from others."""
    from ..build.candidates import compile_kernel
    from ..schedules import CpuSpace, space

    kernels = importlib.import_module(module)
    chosen = space.kernel_decisions(CpuSpace(kernels, variant, target), decisions)
    compile_kernel(op, variant, target, chosen, suffix, path, kernels)


def _of_cpu() -> dict[str, Callable[..., Any]]:
    from .measure import machine, measure

    return {"compile": compile_object, "measure": measure, "machine": machine}


def _of_nvcc() -> dict[str, Callable[..., Any]]:
    from ..build.cuda.candidates import make

    return {"compile": make}


def _of_gpu() -> dict[str, Callable[..., Any]]:
    # No import of TVM, because the machine with the GPU may lack it.
    from .gpu.measure import facts, measure

    return {"facts": facts, "measure": measure}


#: Handlers of requests by role: compile and measure for a CPU, compile for a GPU, or measure on a GPU.
HANDLERS: Mapping[str, Callable[[], dict[str, Callable[..., Any]]]] = {
    "cpu": _of_cpu,
    "nvcc": _of_nvcc,
    "gpu": _of_gpu,
}


def main() -> None:
    """Answer requests until the parent closes its end."""
    # End with the parent if it is killed, even during a candidate that never returns.
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    requests = sys.stdin.buffer
    keep_tvm_from_torch()
    handlers = HANDLERS[sys.argv[1]]()
    send(answers, ("ready", None))
    while True:
        try:
            name, arguments = receive(requests)
        except EOFError:
            return
        try:
            answer = ("done", handlers[name](*arguments))
        except CudaError as error:
            # After this, the process can do nothing more on the GPU.
            print(error, flush=True)
            os._exit(1)
        except MemoryError as error:
            answer = ("failed", (SURROUNDINGS, f"out of memory: {error}"))
        except OSError as error:
            kind = SURROUNDINGS if error.errno in EXHAUSTED else type(error).__name__
            answer = ("failed", (kind, str(error)))
        except Exception as error:
            answer = ("failed", (type(error).__name__, str(error)))
        send(answers, answer)


if __name__ == "__main__":
    main()
