"""Every contender at every position, in turns, as far as time and memory allow."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from ...errors import ArgumentError, DsaError
from ...runtime import machine
from .. import clock
from . import gate
from .problem import PHASES, Problem
from .processes import Left, Process

#: A call that took so many times the time for a figure is not repeated.
_ONCE = 3.0
#: So many times the limit pass before a call is given up that was expected to stay below it.
_PATIENCE = 3.0
#: Of the memory that is left, what a method may be expected to take.
_FILLED = 0.9


@dataclass
class Growth:
    """What a method took so far in one phase, by position, and what it will take by that."""

    seen: list[tuple[int, float, int]] = field(default_factory=list)

    def add(self, position: int, seconds: float, grown: int) -> None:
        """Note the seconds of a token, and the bytes of a call."""
        self.seen.append((position, seconds, grown))

    def seconds(self, position: int) -> float:
        """Of a token: by the line through the last two, and no more than in proportion to the position.

        0 where nothing can be said yet: one position does not tell what is constant.
        """
        if len(self.seen) < 2:
            return 0.0
        (before, earlier, _), (last, taken, _) = self.seen[-2:]
        slope = max(taken - earlier, 0.0) / (last - before)
        return min(taken + slope * (position - last), taken * position / last)

    def bytes(self, position: int) -> int:
        """By the line through the last two."""
        if not self.seen:
            return 0
        last, _, grown = self.seen[-1]
        before, smaller = (self.seen[-2][0], self.seen[-2][2]) if len(self.seen) > 1 else (0, 0)
        return int(grown + max(grown - smaller, 0) * (position - last) / (last - before))


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Parameters
    ----------
    problem : Problem
    methods, phases : sequence of str
    positions : sequence of int
        Ascending.
    seconds : float
        Time for each figure.
    limit : float
        Seconds that a call may be expected to take.
    """

    problem: Problem
    methods: Sequence[str]
    phases: Sequence[str]
    positions: Sequence[int]
    seconds: float
    limit: float


class Measurement:
    """Rows of figures, one for each phase, position and method; a context manager that ends its processes.

    Parameters
    ----------
    plan : Plan

    Attributes
    ----------
    rows : list of dict
        phase, position, method, queries; seconds (of a token), call_seconds, calls, peak_bytes, form and shares (None
        where there are none); "left_out" says why there are no figures, else None.
    about : dict
        The library's target and the sizes of the layer.
    checked : str
        What the check said.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.rows: list[dict[str, Any]] = []
        self.about: dict[str, Any] = {}
        self.checked = ""
        self._held = ExitStack()
        self._processes = {method: self._started(method) for method in plan.methods}
        self._bytes: dict[str, int] = {}
        self._growth = {(method, phase): Growth() for method in plan.methods for phase in PHASES}
        self._failed: dict[tuple[str, str], str] = {}

    def _started(self, method: str) -> Process:
        process = Process(self.plan.problem, method)
        self._held.callback(process.stop)
        return process

    def __enter__(self) -> Measurement:
        return self

    def __exit__(self, *_: Any) -> None:
        self._held.close()

    @property
    def steps(self) -> int:
        """How often `check` and `run` say what they do."""
        return len(self.plan.methods) + 1 + len(self.plan.phases) * len(self.plan.positions)

    def check(self, say: Callable[[str], None]) -> None:
        """Load the layer, and compare every method with eager attention.

        Raises
        ------
        ArgumentError
            A position that the model does not have.
        CheckError
            As `gate.compare`.
        DsaError
            A method does not get that far.
        """
        for method, process in self._processes.items():
            say(f"{method}: load the layer")
            self._load(method, process)
        last, most = self.plan.positions[-1], self.about["layer"]["max_position_embeddings"]
        if last > most:
            raise ArgumentError(f"cost: positions: expected at most {most}, which the model has, got {last}")
        say("compare all with eager attention")
        processes = dict(self._processes)
        if "eager" not in processes:
            processes["eager"] = Process(self.plan.problem, "eager")
        try:
            results = {}
            for method, process in processes.items():
                if method not in self._processes:
                    self._expect("load", process)
                results[method] = self._expect("checked", process)
        finally:
            if "eager" not in self._processes:
                processes["eager"].stop()
        self.checked = gate.compare(results, self.plan.problem.dtype)

    def run(self, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
        """Measure, and hand out each row when it is known; it is in `rows`, too."""
        for phase, position in itertools.product(self.plan.phases, self.plan.positions):
            say(f"{phase} at {position}")
            for row in self._at(phase, position):
                self.rows.append(row)
                yield row

    def _load(self, method: str, process: Process) -> None:
        answer = self._expect("load", process)
        self._bytes[method] = answer.pop("bytes")
        self.about = answer

    def _expect(self, name: str, process: Process) -> Any:
        try:
            return process.ask(name)
        except Left as reason:
            raise DsaError(
                f"cost: {process.method}: expected a layer that can be loaded and run, got: {reason}"
            ) from None

    def _at(self, phase: str, position: int) -> Iterator[dict[str, Any]]:
        queries = self.plan.problem.queries(phase, position)
        rows = {method: self._blank(phase, position, method, queries) for method in self.plan.methods}
        short = []
        for method, row in rows.items():
            try:
                first = self._prepare(phase, position, method, row)
            except Left as reason:
                row["left_out"] = str(reason)
                continue
            if first <= _ONCE * self.plan.seconds:
                short.append(method)
            else:  # it stands for itself, and its memory is the next one's
                self._finish(method, row, [first])
        times = self._take_turns(short, rows)
        for method in short:
            if rows[method]["left_out"] is None:
                self._finish(method, rows[method], times[method])
        yield from rows.values()

    def _blank(self, phase: str, position: int, method: str, queries: int) -> dict[str, Any]:
        names = ("seconds", "call_seconds", "calls", "peak_bytes", "form", "shares", "left_out")
        return {"phase": phase, "position": position, "method": method, "queries": queries, **dict.fromkeys(names)}

    def _prepare(self, phase: str, position: int, method: str, row: dict[str, Any]) -> float:
        """Seconds of the first call."""
        growth, limit = self._growth[method, phase], self.plan.limit
        expected, needed = row["queries"] * growth.seconds(position), growth.bytes(position)
        left = machine.memory()
        if needed > _FILLED * left.bytes:
            raise Left(f"would need about {machine.in_units(needed)} by its growth; {left} is left")
        if expected > limit:
            raise Left(f"a call would take about {expected:.0f} s by its growth; --limit is {limit:g} s")
        if (method, phase) in self._failed:
            raise Left(self._failed[method, phase])
        process = self._processes[method]
        if not process.running:
            self._load(method, process)
        try:
            answer = process.ask("prepare", phase, position, seconds=self._patience)
        except Left as reason:
            self._failed[method, phase] = f"{reason} (at {position})"
            raise
        row["form"] = answer["form"]
        return answer["seconds"]

    @property
    def _patience(self) -> float:
        return max(60.0, _PATIENCE * self.plan.limit)

    def _take_turns(self, methods: Sequence[str], rows: Mapping[str, dict[str, Any]]) -> dict[str, list[float]]:
        turns = {method: lambda _, method=method: self._turn(method, rows[method]) for method in methods}
        taken: dict[str, list[float]] = {method: [] for method in methods}
        for times in clock.take_turns(turns, clock.ROUNDS, alternate=True):
            for method, those in times.items():
                taken[method] += those
        return taken

    def _turn(self, method: str, row: dict[str, Any]) -> list[float]:
        if row["left_out"] is not None:
            return []
        try:
            return self._processes[method].ask("time", self.plan.seconds / clock.ROUNDS, seconds=self._patience)
        except Left as reason:
            row["left_out"] = str(reason)
            return []

    def _finish(self, method: str, row: dict[str, Any], times: Sequence[float]) -> None:
        """Put the figures of a method in its row, and free its memory."""
        process = self._processes[method]
        try:
            peak = process.ask("peak")
            shares = process.ask("shares", seconds=self._patience) if method == "ours" else None
            process.ask("release")
        except Left as reason:
            row["left_out"] = str(reason)
            return
        seconds = statistics.median(times)
        row.update(seconds=seconds / row["queries"], call_seconds=seconds, calls=len(times))
        row.update(peak_bytes=peak, shares=shares)
        grown = max(peak - self._bytes[method], 1)
        self._growth[method, row["phase"]].add(row["position"], row["seconds"], grown)
