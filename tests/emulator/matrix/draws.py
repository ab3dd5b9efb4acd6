"""Draws of ids at the sizes of real vocabularies, against the host's filters in float64.

Logits have ties, extremes and equal values throughout, and draws lie at both ends. A draw is right where it is the id
that the host's sums of weights pick, or, within the error of float32's sums, its neighbour.
"""

from collections.abc import Iterator

import numpy as np

from build.kernels.cuda import sample
from build.kernels.cuda.binding import GPU
from runtime.decoding.filters import candidates
from runtime.decoding.options import SamplingOptions
from tests.emulator.gpu import EmulatorError
from tests.emulator.kernels import Array, EmulatedKernels, Kernel
from tests.emulator.matrix.rows import RUNS, Row

VOCABULARIES = (1, 2, 31, 1023, 1024, 1025, 4097, 32000, 32001, 32002, 32003, 32768, 131072)
OPTIONS = ((1.0, 1), (0.7, 5), (1.3, 40), (1.0, None), (0.01, 7), (0.9, 10**6))  # temperature and top-k
ALMOST_ONE = float(np.nextafter(np.float32(1), np.float32(0)))
EPS = float(np.finfo(np.float32).eps)


def rows(kernels: EmulatedKernels) -> Iterator[Row]:
    """A row for each vocabulary and run, of all logits, options and draws."""
    for vocab_size in VOCABULARIES:
        kernel = kernels.compiled(sample.sample(vocab_size, on=GPU))
        for run in RUNS:
            kernels.gpu.set(run)
            wrong = [text for text in _draws(kernels, kernel, vocab_size, run) if text]
            found = f"{len(wrong)} wrong, such as {wrong[0]}" if wrong else "right"
            yield Row("sample", f"vocabulary {vocab_size}", str(run), found, not wrong)


def _draws(kernels: EmulatedKernels, kernel: Kernel, vocab_size: int, run) -> Iterator[str]:
    """What is wrong with each draw; empty text if nothing is."""
    rng = np.random.default_rng(vocab_size)
    logits = {
        "random": 3 * rng.standard_normal(vocab_size),
        "ties": np.round(2 * rng.standard_normal(vocab_size)),
        "equal": np.full(vocab_size, -7.5),
        "steep": np.linspace(-80, 80, vocab_size),
    }
    for kind, values in logits.items():
        for temperature, top_k in OPTIONS:
            for draw in (0.0,) if top_k == 1 else (0.0, 0.37, float(rng.random()), ALMOST_ONE):
                options = SamplingOptions(temperature=temperature, top_k=top_k)
                found = _wrong(kernels, kernel, values.astype(np.float32), options, np.float32(draw), run)
                yield f"{kind}, temperature {temperature}, top-k {top_k}, draw {draw}: {found}" if found else ""


def _wrong(
    kernels: EmulatedKernels, kernel: Kernel, logits: Array, options: SamplingOptions, draw: np.float32, run
) -> str:
    settings = np.array([options.temperature, options.top_k or 0, draw], np.float32)
    arrays = [logits.reshape(1, 1, -1), settings, np.array([[3]]), np.array([[7]]), np.array([9])]
    try:
        *_, ids, positions, token = kernels.run(kernel, arrays, run)
    except EmulatorError as error:
        return str(error)
    kept, weights = candidates(logits.astype(np.float64), options)
    mass = np.cumsum(weights) / weights.sum()
    place = int(np.searchsorted(kept, token[0]))
    if place == len(kept) or kept[place] != token[0]:
        return f"{token[0]} is drawn, which is none of the {len(kept)} candidates"
    # a thread sums vocab / 1024 weights, and then there are 1024 sums
    slack = EPS * (len(kept) / 1024 + 64)
    below = mass[place - 1] if place else 0.0
    if not below - slack <= draw <= mass[place] + slack:
        return f"{token[0]} is drawn, whose share is from {below} to {mass[place]}"
    return "" if (ids[0, 0], positions[0, 0]) == (token[0], 8) else f"the next step's inputs are {ids}, {positions}"
