"""The median of several measurements, with its quartiles."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Self


@dataclass(frozen=True)
class Spread:
    """Half of all measurements lie between the quartiles `low` and `high`."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Self:
        """The spread of at least one measurement; quartiles are interpolated between the measurements."""
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0])
        low, _, high = quantiles(samples, n=4, method="inclusive")
        return cls(low, median(samples), high)

    @classmethod
    def of_ratios(cls, ours: Sequence[float], others: Sequence[float]) -> Self:
        """The spread of what each measurement of ours is over the other one beside it."""
        return cls.of([one / other for one, other in zip(ours, others, strict=True)])

    def __format__(self, spec: str) -> str:
        """Such as `1.52 (1.49-1.54)`; `spec` is that of each number."""
        return f"{self.median:{spec}} ({self.low:{spec}}-{self.high:{spec}})"
