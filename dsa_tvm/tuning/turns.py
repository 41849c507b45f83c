"""Two kernels timed in turns."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from .tasks import Effort

#: The shortest sample, so that neither the clock nor cold caches count.
_SAMPLE_SECONDS = 0.01
#: A candidate that is this much slower than DEFAULT after two rounds gets no third one.
_HOPELESS = 1.4

#: Takes a number of calls and returns the seconds of one.
Timer = Callable[[int], float]


def in_turns(
    timers: Sequence[Timer], effort: Effort, *, least: int = 1, most: int | None = None
) -> list[tuple[float, float]]:
    """Time two kernels in turns.

    Parameters
    ----------
    timers : sequence of two callables
        For DEFAULT and for the candidate.
    effort : Effort
    least, most : int
        The fewest and the most calls of a sample.

    Returns
    -------
    list of (default, candidate)
        Seconds of one call in each round.
    """
    default, candidate = timers
    once = default(least), candidate(least)
    number = max(least, math.ceil(_SAMPLE_SECONDS / max(min(once), 1e-9)))
    number = number if most is None else min(number, most)
    low, high = effort.rounds
    rounds = min(max(low, int(effort.seconds / (number * sum(once)))), high)
    # The first calls do not count, unless they are long, because then they need no warm-up.
    pairs = [once] if number == 1 else []
    while len(pairs) < rounds:
        # The order alternates, so that what the first call leaves in the caches favours neither.
        if len(pairs) % 2:
            second = candidate(number)
            pairs.append((default(number), second))
        else:
            pairs.append((default(number), candidate(number)))
        if len(pairs) == 2 and min(b / a for a, b in pairs) > _HOPELESS:
            break
    return pairs
