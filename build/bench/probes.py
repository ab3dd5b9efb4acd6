"""The limits of this machine as calls that can be timed beside kernels: reading memory, and the peaks of arithmetic."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from build.bench.timing import Call, compiled, in_turns, tensor
from build.kernels.cpu.level import Level
from build.kernels.cpu.limits import READERS, Peak, Reader, peaks, read_all

READ_BYTES = 2**29  # of memory that readers go through, piece by piece; more than the part of a cache that we are given
# Calls are short, so that on a shared machine many of them are not interrupted.
PIECE = 2**25  # bytes that one call reads, unless told otherwise
SURVEY_SECONDS = 3.0  # in which the readers are compared


@dataclass(frozen=True, eq=False)
class Probe:
    """A limit: a call, and how much work it does, in bytes or operations."""

    name: str
    call: Call
    work: float

    def rate(self, seconds: float) -> float:
        """Bytes or operations per nanosecond of a call that takes so long: GB/s or GFLOP/s."""
        return self.work / seconds / 1e9


def read_probes(level: Level, threads: int, chosen: Sequence[Reader], piece: int = PIECE) -> list[Probe]:
    """Ways of reading, all in the same memory, of which each call reads the next `piece` bytes."""
    pieces = [tensor(np.ones(piece // 4, np.float32)) for _ in range(max(READ_BYTES // piece, 1))]
    out, turn = tensor(np.zeros(threads * level.lanes, np.float32)), count()

    def probe(reader: Reader) -> Probe:
        kernel = compiled(read_all(level, reader, threads, piece), level.processor)
        work = reader.bytes_read(piece, threads)
        return Probe("reading", lambda: kernel(pieces[next(turn) % len(pieces)], out), work)

    return [probe(reader) for reader in chosen]


def best_reader(level: Level, threads: int) -> Reader:
    """The fastest way of reading."""
    probes = read_probes(level, threads, READERS)
    samples = in_turns([probe.call for probe in probes], SURVEY_SECONDS)
    rates = [probe.rate(min(taken)) for probe, taken in zip(probes, samples, strict=True)]
    return READERS[rates.index(max(rates))]


def peak_probes(level: Level, threads: int) -> dict[str, Probe]:
    """The peaks of a level, by their names."""
    return {name: _peak_probe(level, threads, peak) for name, peak in peaks(level).items()}


def _peak_probe(level: Level, threads: int, peak: Peak) -> Probe:
    arguments = [tensor(np.ones(size, dtype)) for size, dtype in peak.arguments]
    size, dtype = peak.out
    out = tensor(np.zeros(threads * size, dtype))
    kernel = compiled(peak.kernel(threads, peak.passes), level.processor)
    return Probe(peak.name, lambda: kernel(*arguments, out), threads * peak.passes * peak.operations)
