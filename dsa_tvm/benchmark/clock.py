"""Contenders that take turns: their times on the host's clock, or on that of a device."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

#: Turns that every contender of a benchmark gets.
ROUNDS = 5
#: The most calls of a turn on a device. The driver's memory holds what is enqueued.
MOST_CALLS = 400
#: Seconds before a turn. The threads of OpenBLAS, with which results are checked, and of other contenders spin for so
#: long after their last work. Meanwhile a call with as many threads as CPUs takes up to twice its time.
SETTLE = 0.1
#: The longest time, in seconds, for which a device waits while a call is enqueued.
LONGEST_HOLD = 5e-3

_Name = TypeVar("_Name")
_Taken = TypeVar("_Taken")


def take_turns(
    contenders: Mapping[_Name, Callable[[int], _Taken]], rounds: int, alternate: bool = False
) -> Iterator[dict[_Name, _Taken]]:
    """Measure contenders in turns, so that a change of the machine's speed meets all of them.

    Parameters
    ----------
    contenders : mapping
        Functions by name. Each takes the number of the round, from 0, and returns what it measured.
    rounds : int
        The most rounds. A caller that has seen enough stops earlier.
    alternate : bool
        Go through the contenders backwards in every second round, so that no contender always profits from what
        the one before it left in the caches or did to the clock rate.

    Yields
    ------
    dict
        What each contender measured in a round, in the order of `contenders`.
    """
    names = list(contenders)
    for i in range(rounds):
        taken = {name: contenders[name](i) for name in (reversed(names) if alternate and i % 2 else names)}
        yield {name: taken[name] for name in names}


class Clock(Protocol):
    """How the calls of a benchmark are timed."""

    def turns(self, call: Callable[[], Any], seconds: float) -> Callable[[int], list[float]]:
        """Warm a call up, and make a function for `take_turns` that times it for about that long, call by call."""


def medians(clock: Clock, calls: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Median time of each call, taken in turns.

    Parameters
    ----------
    clock : Clock
    calls : mapping
        Functions without arguments, by name.
    seconds : float
        Time for each, spread over `ROUNDS` turns; a turn has at least one call.

    Returns
    -------
    dict
        Seconds by name.
    """
    turns = {name: clock.turns(call, seconds / ROUNDS) for name, call in calls.items()}
    taken = list(take_turns(turns, ROUNDS))
    return {name: statistics.median(itertools.chain.from_iterable(times[name] for times in taken)) for name in calls}


def timed(call: Callable[[], Any], seconds: float) -> list[float]:
    """Times of calls that are done when they return: at least one, for about so many seconds."""
    taken: list[float] = []
    begin = now = time.perf_counter()
    while not taken or now - begin < seconds:
        start = now
        call()
        now = time.perf_counter()
        taken.append(now - start)
    # The first call of a turn finds the caches and the spinning threads of the contender before it.
    return taken[1:] or taken


class HostClock:
    """For calls that are done when they return."""

    def turns(self, call: Callable[[], Any], seconds: float) -> Callable[[int], list[float]]:
        """As `Clock`."""
        call()

        def turn(_: int) -> list[float]:
            time.sleep(SETTLE)
            return timed(call, seconds)

        return turn


class Device(Protocol):
    """What a `DeviceClock` needs of a device."""

    def now(self) -> float:
        """The host's time in seconds."""

    def synchronize(self) -> None:
        """Wait for everything that was enqueued."""

    def hold(self, seconds: float) -> None:
        """Enqueue that much waiting."""

    def flush(self) -> None:
        """Enqueue what throws everything out of the L2 cache."""

    def mark(self) -> Any:
        """Enqueue a mark."""

    def elapsed(self, begin: Any, end: Any) -> float:
        """Seconds between two marks that have been passed."""


@dataclass(frozen=True)
class DeviceClock:
    """For calls that enqueue work on a device: its time alone, each call with a cold L2 cache.

    The device is held until a call is enqueued, so that what the host takes to launch it does not count.

    Parameters
    ----------
    device : Device
    """

    device: Device

    def turns(self, call: Callable[[], Any], seconds: float) -> Callable[[int], list[float]]:
        """As `Clock`."""
        device = self.device
        for _ in range(2):  # the first call compiles, loads and allocates
            device.synchronize()
            begin = device.now()
            call()
            enqueued = device.now() - begin
            device.synchronize()
            taken = device.now() - begin
        hold = min(1.5 * enqueued, LONGEST_HOLD)
        calls = min(max(int(seconds / max(taken + hold, 1e-6)), 1), MOST_CALLS)

        def turn(_: int) -> list[float]:
            marks = []
            for _ in range(calls):
                device.hold(hold)
                device.flush()
                begin = device.mark()
                call()
                marks.append((begin, device.mark()))
            device.synchronize()
            return [device.elapsed(*pair) for pair in marks]

        return turn
