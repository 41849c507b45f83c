"""Two kernels timed in turns."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from .tasks import Effort

#: A sample lasts at least this long, so that the clock and the first touch of the caches do not count.
_SAMPLE_SECONDS = 0.01
#: A candidate this much slower than the default after two rounds is not worth a third.
_HOPELESS = 1.4

#: Seconds of one call, of so many calls.
Timer = Callable[[int], float]


def in_turns(
    timers: Sequence[Timer], effort: Effort, *, least: int = 1, most: int | None = None
) -> list[tuple[float, float]]:
    """Seconds of one call in each round.

    Parameters
    ----------
    timers : sequence of two callables
        Of DEFAULT and of the candidate.
    effort : Effort
    least, most : int
        Calls of a sample.

    Returns
    -------
    list of (default, candidate)
    """
    default, candidate = timers
    once = default(least), candidate(least)
    number = max(least, math.ceil(_SAMPLE_SECONDS / max(min(once), 1e-9)))
    number = number if most is None else min(number, most)
    low, high = effort.rounds
    rounds = min(max(low, int(effort.seconds / (number * sum(once)))), high)
    # The first calls are not counted, but for long ones, which need no warming up.
    pairs = [once] if number == 1 else []
    while len(pairs) < rounds:
        # The order alternates: what the first leaves in the caches must not favour one of them.
        if len(pairs) % 2:
            second = candidate(number)
            pairs.append((default(number), second))
        else:
            pairs.append((default(number), candidate(number)))
        if len(pairs) == 2 and min(b / a for a, b in pairs) > _HOPELESS:
            break
    return pairs
