"""Runs of the bench's contenders with figures that are made up."""

from build.bench.contenders import Contender, PeakShare
from build.bench.machine_limits import Limit, MachineLimits
from build.bench.rounds import Outcome, Run
from runtime.bench import DecodeSpeed, Measured, PrefillSpeed, Speeds

LEVEL = "avx2"


def limits(read, peak=100.0):
    """Limits whose typical figures are half of the best ones."""
    return MachineLimits(Limit(read, read / 2), {LEVEL: {"float32": Limit(peak, peak / 2)}})


def measured(prefill, decode, gb_s=10.0, held_mb=None):
    """One measurement: tokens per second of a prompt of 512 and, by context, of decode."""
    speeds = Speeds(
        (PrefillSpeed(512, 512 / prefill, prefill),),
        tuple(DecodeSpeed(context, 1 / tok_s, tok_s, 1, gb_s) for context, tok_s in decode.items()),
        (),
    )
    return Measured(speeds, 300.0, held_mb)


def contender(what, scheme, **more):
    """A contender whose matrices take a billion operations for each token; ours multiplies in float32 on AVX2."""
    peak = PeakShare(LEVEL, "float32", 1) if what == "ours" else None
    return Contender(what, scheme, (), peak=peak, operations=1e9, **more)


def outcome(entry, *figures, read=20.0, disturbed=False):
    """A contender with one run for each of its measurements, at limits that do not move."""
    runs = [Run(figure, limits(read), limits(read), disturbed) for figure in figures]
    return Outcome(entry, tuple(runs))
