"""A process for each contender: its memory is its own, and what does not fit is an error and kills nothing."""

from __future__ import annotations

import ctypes
import multiprocessing
import resource
import signal
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ...errors import DsaError
from ...runtime import machine
from .. import clock
from .problem import Problem

_CLEAR = Path("/proc/self/clear_refs")
#: What an importing process needs at most, and what is left of memory for everything else.
_START_SECONDS, _SPARE = 300.0, 0.05
#: What allocators say.
_NO_MEMORY = ("allocate memory", "out of memory", "bad_alloc", "not enough memory", "Cannot allocate")


class Left(Exception):
    """A method has no figure here; the message says why."""


class Process:
    """A contender in a process of its own, started when it is asked, and again after it was stopped.

    Parameters
    ----------
    problem : Problem
    method : str
    """

    def __init__(self, problem: Problem, method: str) -> None:
        self._problem, self.method = problem, method
        self._process: Any = None
        self._connection: Any = None

    def ask(self, name: str, *arguments: Any, seconds: float = _START_SECONDS) -> Any:
        """What a method of `_Server` returns.

        Raises
        ------
        Left
            It needs more memory than there is, more time than `seconds`, or its process died.
        DsaError
            What it raised.
        """
        self._start()
        try:
            self._connection.send((name, arguments))
            kind, value = self._answer(seconds)
        except (EOFError, OSError):
            status = self._ended()
            raise Left(f"its process ended with {status}") from None
        if kind == "left":
            raise Left(value)
        if kind == "failed":
            raise value
        return value

    @property
    def running(self) -> bool:
        """Whether it was started and not stopped."""
        return self._process is not None

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None

    def _start(self) -> None:
        if self._process is not None:
            return
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, self._problem, self.method), daemon=True)
        self._process.start()
        other.close()

    def _answer(self, seconds: float) -> Any:
        if not self._connection.poll(seconds):
            self.stop()
            raise Left(f"a call took more than {seconds:g} s")
        return self._connection.recv()

    def _ended(self) -> str:
        self._process.join(5)
        code = self._process.exitcode
        self.stop()
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            return f"signal {name}" + (", as where memory is short" if -code == signal.SIGKILL else "")
        return f"status {code}"


def _serve(connection: Connection, problem: Problem, method: str) -> None:
    """Answer requests until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command, which ends its processes
    server = _Server(problem, method)
    with suppress(EOFError, BrokenPipeError):
        while True:
            name, arguments = connection.recv()
            try:
                answer = ("done", getattr(server, name)(*arguments))
            except Exception as error:
                answer = _reason(error, server.left)
            connection.send(answer)


def _reason(error: Exception, left: machine.Memory) -> tuple[str, Any]:
    """Why there is no answer: memory is short, or something that ends the command."""
    if isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY):
        return "left", f"does not fit into what was left: {left}"
    if isinstance(error, DsaError):
        return "failed", error
    text = str(error).strip().partition("\n")[0][:200]
    return "failed", DsaError(text if isinstance(error, OSError) else f"cost: {type(error).__name__}: {text}")


class _Server:
    """What a process is asked for."""

    def __init__(self, problem: Problem, method: str) -> None:
        self._problem, self._method = problem, method
        self._limits = resource.getrlimit(resource.RLIMIT_DATA)
        #: What memory was left before this process took of it.
        self.left = machine.memory()
        self._contender: Any = None

    def load(self) -> dict[str, Any]:
        """Make the layer; its sizes, and the bytes that it and its libraries take."""
        import torch

        from ... import set_num_threads
        from ...runtime import library
        from .contenders import Contender

        torch.set_num_threads(self._problem.threads)
        set_num_threads(self._problem.threads)
        self._limit()
        self._contender = Contender(self._problem, self._method)
        layer, taken = self._contender.describe(), machine.of_process("VmRSS")
        return {"target": library.active_target(), "layer": layer, "bytes": taken}

    def checked(self) -> dict[str, Any]:
        """As `Contender.checked`."""
        return self._contender.checked()

    def prepare(self, phase: str, position: int) -> dict[str, Any]:
        """Fill the cache and call once; the seconds of that, and bytes that are left."""
        self.release()
        self._limit()
        try:
            self._contender.prepare(phase, position)
            _trim()
            with suppress(OSError):
                _CLEAR.write_text("5")  # the peak is that of what follows
            (seconds,) = self.time(0.0)
            _trim()
        except BaseException:
            self.release()
            raise
        return {"seconds": seconds, "form": self._contender.form}

    def time(self, seconds: float) -> list[float]:
        """Times of calls, at least one, for about so long."""
        return clock.timed(self._contender.call, seconds)

    def peak(self) -> int:
        """Bytes that the process had at most since `prepare`."""
        return machine.of_process("VmHWM")

    def shares(self) -> dict[str, float]:
        """As `Contender.shares`."""
        return self._contender.shares()

    def release(self) -> None:
        """Give back what the position took."""
        self._contender.release()
        _trim()

    def _limit(self) -> None:
        """Let allocations fail where they would take more than is left, before the kernel kills somebody."""
        soft, hard = self._limits
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        self.left = machine.memory()
        most = machine.of_process("VmData") + int((1 - _SPARE) * self.left.bytes)
        if hard == resource.RLIM_INFINITY or most < hard:
            resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


def _trim() -> None:
    """Give freed memory back to the system; only glibc has a call for that."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
