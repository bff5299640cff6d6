"""Times of several ways to do one thing, taken in turns.

Every round takes each way once, and the next round begins with another one: a machine that grows
slower or busier does so for all alike. Rounds go on until the medians are settled or time is up.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

Way = Callable[[], Any]

LEAST_ROUNDS = 5
MOST_ROUNDS = 200
# A median is settled when the quartiles' distance over the square root of the rounds is this small.
SETTLED = 0.01
_MOST_CALLS = 1000


class Timing(NamedTuple):
    """Seconds a call, one number a round; every round makes `calls` calls."""

    seconds: tuple[float, ...]
    calls: int

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Between them lies the middle half of the rounds."""
        if len(self.seconds) < 2:
            return self.seconds[0], self.seconds[0]
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high


def sample(way: Way, calls: int, *, chained: bool) -> float:
    """Seconds a call of `calls` calls.

    With `chained` the calls are sent one after the other and the last result is waited for: what
    the host does is hidden behind the device's work, where there is enough of it. Otherwise each
    result is waited for: a CPU would run several calls at once.
    """
    start = time.perf_counter()
    result = None
    for _ in range(calls):
        result = way()
        if not chained:
            jax.block_until_ready(result)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls


def calls_a_round(way: Way, *, chained: bool) -> int:
    """Warms up, and says how many calls a round must make for the clock to tell."""
    jax.block_until_ready(way())
    once = sample(way, 1, chained=chained)
    wanted = 0.02 if chained else 0.001
    return min(_MOST_CALLS, max(1, math.ceil(wanted / max(once, 1e-9))))


def in_turns(
    ways: dict[str, tuple[Way, int]],
    *,
    seconds: float,
    chained: bool,
    least: int = LEAST_ROUNDS,
    most: int = MOST_ROUNDS,
) -> dict[str, Timing]:
    """Times all ways.

    Args:
      ways: name to a way that is warm and its calls a round.
      seconds: after so many no further round begins, once there are `least`.
      chained: as in `sample`.
      least: rounds.
      most: rounds.
    """
    names = list(ways)
    taken: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for number in range(most):
        spent = time.perf_counter() - start
        if number >= least and (spent >= seconds or all(map(settled, taken.values()))):
            break
        first = number % len(names)
        for name in names[first:] + names[:first]:
            way, calls = ways[name]
            taken[name].append(sample(way, calls, chained=chained))
    return {name: Timing(tuple(taken[name]), ways[name][1]) for name in names}


def settled(seconds: Sequence[float]) -> bool:
    """Whether another round would hardly move the median."""
    timing = Timing(tuple(seconds), 1)
    low, high = timing.quartiles
    return (high - low) / math.sqrt(len(seconds)) <= SETTLED * timing.median
