"""The parent's side of worker processes: requests with a deadline, and a new worker in place of one that died."""

from __future__ import annotations

import functools
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from types import TracebackType
from typing import Any

from ..errors import DsaError
from ..runtime.machine import available_memory
from .failures import FROM_OUTSIDE, PAUSES, SURROUNDINGS, WorkerError, complaint, patiently
from .worker import receive, send

#: Importing TVM takes five seconds on an idle machine.
_START_SECONDS = 180.0

Request = tuple[str, tuple[Any, ...]]

#: Candidates proposed, built and measured at a time.
BATCH = 8
#: Memory of a worker that has loaded TVM and compiles.
_WORKER_BYTES = 400 << 20


class Worker:
    """One worker process. It starts when it is first needed, and again after it has died.

    Parameters
    ----------
    environment : dict
        Environment variables in addition to those of this process.
    role : str
        Key of `worker.HANDLERS`.
    """

    def __init__(self, environment: dict[str, str] | None = None, role: str = "cpu") -> None:
        self._role = role
        self._environment = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.RLock()
        self._words: Any = None

    def ask(self, request: Request, seconds: float) -> Any:
        """The answer to a request.

        Raises
        ------
        WorkerError
            The handler raised, the process died, or `seconds` passed.
        DsaError
            No worker can be started.
        """
        with self._lock:
            self.start()
            process = self._process
            assert process is not None and process.stdin is not None
            # Forget what it said during earlier requests. Parent and worker share the position in the file.
            self._words.seek(0)
            self._words.truncate()
            try:
                send(process.stdin, request)
            except OSError:
                raise self._dead() from None
            kind, value = self._answer(seconds)
        if kind == "failed":
            raise WorkerError(*value)
        return value

    def kill(self) -> None:
        """End the process from another thread. Whoever waits for its answer is told that it crashed."""
        if (process := self._process) is not None:
            _kill(process)

    def stop(self) -> None:
        """End the process and forget it."""
        if self._process is not None:
            _kill(self._process)
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    # Unsent data is of no use any more.
                    with suppress(BrokenPipeError):
                        stream.close()
            self._process = None
        if self._words is not None:
            self._words.close()
            self._words = None

    def start(self) -> None:
        """Start the process unless it is running.

        Raises
        ------
        DsaError
            It does not come up.
        """
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                return
            self.stop()
            try:
                # In memory, because a worker on a full disk could not say so in a file.
                self._words = os.fdopen(os.memfd_create("words"), "w+b")
                self._process = subprocess.Popen(
                    # -P keeps out the package of a checkout in the working directory.
                    [sys.executable, "-P", "-m", "dsa_tvm.tuning.worker", self._role],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._words,
                    env=self._environment,
                    # Ctrl-C reaches only the job, which ends its workers itself.
                    start_new_session=True,
                )
            except OSError as error:
                # There is a limit on processes or open files, or too little memory.
                self.stop()
                raise WorkerError(SURROUNDINGS, f"no worker process can be started: {error}") from error
            try:
                self._answer(_START_SECONDS)
            except WorkerError as error:
                if error.is_surroundings:
                    raise
                raise DsaError(f"tune: expected a worker process to start, got: {error}") from error

    def _answer(self, seconds: float) -> Any:
        process = self._process
        assert process is not None and process.stdout is not None
        deadline = time.monotonic() + seconds
        # poll(), because select() takes no descriptor above 1023.
        waiting = select.poll()
        waiting.register(process.stdout, select.POLLIN)
        # Wait for the first byte. The rest comes at once.
        while not waiting.poll(200):
            if time.monotonic() > deadline:
                self.stop()
                raise WorkerError("timed out", f"timed out after {seconds:.0f} s")
        try:
            return receive(process.stdout)
        except EOFError:
            raise self._dead() from None

    def _dead(self) -> WorkerError:
        assert self._process is not None
        status = self._process.wait()
        self._words.seek(0)
        words = self._words.read().decode(errors="replace").strip()
        self.stop()
        said = "".join(f" ({line})" for line in [complaint(words) or words.rpartition("\n")[2]] if line)
        if -status in FROM_OUTSIDE:
            likely = "; the kernel does so where memory runs out" if -status == signal.SIGKILL else ""
            return WorkerError(SURROUNDINGS, f"ended from outside: {signal.Signals(-status).name}{said}{likely}")
        return WorkerError(
            "crashed", f"crashed: {_signal_name(-status) if status < 0 else f'exit status {status}'}{said}"
        )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and its children, such as a compiler. It leads its own process group."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def pool_size(wanted: int) -> int:
    """How many workers to start: no more than a job has requests for, and than fit in memory."""
    return max(1, min(wanted, BATCH, available_memory() // _WORKER_BYTES))


class Workers:
    """Several workers, as a context manager that kills them all at the end.

    A request that failed because of its surroundings (`WorkerError.is_surroundings`) is tried again a few times. That
    happens after all others and alone, because the others may have held what was missing.

    Parameters
    ----------
    count : int
    environment : dict, optional
    role : str
    """

    def __init__(self, count: int, environment: dict[str, str] | None = None, role: str = "cpu") -> None:
        self._all = [Worker(environment, role) for _ in range(count)]
        # These threads live as long as the workers. To Linux, the parent of a process has died when the thread that
        # started it ends.
        self._threads = ThreadPoolExecutor(count)

    def __enter__(self) -> Workers:
        # All at once and before they are needed, because the caller has to import TVM as well.
        for worker in self._all:
            self._threads.submit(worker.start)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for worker in self._all:
            worker.kill()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._all:
            worker.stop()

    def ask(self, request: Request, seconds: float) -> Any:
        """The answer to one request.

        Raises
        ------
        WorkerError
            The request failed.
        """
        ((_, answer),) = self.map([request], seconds, 1)
        if isinstance(answer, WorkerError):
            raise answer
        return answer

    def map(
        self, requests: Sequence[Request], seconds: float, parallel: int = 0
    ) -> Iterator[tuple[int, Any | WorkerError]]:
        """The answers as they come, each with the position of its request. A failed request answers with its error.

        Parameters
        ----------
        requests : sequence
        seconds : float
            Time limit of each request.
        parallel : int
            Number of workers to use; 0 for all.
        """
        free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        # Always the first ones, because they keep what they have loaded.
        for worker in self._all[: parallel or len(self._all)]:
            free.put(worker)

        def answer(request: Request) -> Any:
            worker = free.get()
            try:
                return worker.ask(request, seconds)
            except WorkerError as error:
                return error
            finally:
                free.put(worker)

        def alone(request: Request) -> Any:
            return self._threads.submit(answer, request).result()

        futures = {self._threads.submit(answer, request): i for i, request in enumerate(requests)}
        again: list[int] = []
        for future in as_completed(futures):
            outcome = future.result()
            if isinstance(outcome, WorkerError) and outcome.is_surroundings:
                again.append(futures[future])
            else:
                yield futures[future], outcome
        for i in again:
            yield i, patiently(functools.partial(alone, requests[i]), PAUSES)
