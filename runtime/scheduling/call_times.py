"""How long a call takes, predicted from the calls so far."""

import math

LEAST_WEIGHT = 0.1  # of the newest time in the mean: about the last ten count


class CallTimes:
    """An exponential mean of measured seconds for each size of one kind of call."""

    def __init__(self) -> None:
        self._means: dict[int, float] = {}
        self._counts: dict[int, int] = {}

    def add(self, size: int, seconds: float) -> None:
        """Take note of a call; the first few have equal weights, since one of them may pay for a cold start."""
        count = self._counts[size] = self._counts.get(size, 0) + 1
        mean = self._means.get(size, 0.0)
        self._means[size] = mean + max(1 / count, LEAST_WEIGHT) * (seconds - mean)

    def at_most(self, size: int) -> float:
        """Seconds that a call of this size is expected to take at most; infinity if no call was measured.

        A larger call takes no less time than a smaller one, and no more for each token. This bounds sizes that were
        not measured yet, and those whose one measurement was so slow that they would not be tried again.
        """
        if size in self._means:
            return min(self._means[size], self._scaled_up(size))
        larger = [seconds for other, seconds in self._means.items() if other > size]
        return min(self._scaled_up(size), *larger, math.inf)

    def about(self, size: int) -> float:
        """As `at_most`, but that of the nearest measured size where this one was not; infinity if there is none.

        So whoever hopes that a size costs no more than its neighbour tries it once, and then knows.
        """
        if not self._means:
            return math.inf
        return self.at_most(min(self._means, key=lambda other: (abs(other - size), other)))

    def _scaled_up(self, size: int) -> float:
        scaled = (seconds * size / other for other, seconds in self._means.items() if other < size)
        return min(scaled, default=math.inf)
