"""`python -m build.bench.sampling`: what drawing the ids of a step costs, by vocabulary and options.

Logits are random, with a head that makes about as many ids likely as SmolLM2-135M does on English text: the likeliest
0.9 of the mass are from one id to some hundreds.
"""

import argparse
import time
from collections.abc import Sequence
from statistics import median

import numpy as np
from numpy.typing import NDArray

from runtime.decoding.logprobs import row_logprobs
from runtime.decoding.options import SamplingOptions
from runtime.decoding.sampler import SampledRow, Sampler, sample_rows
from runtime.errors import run_command

VOCABULARIES = (32768, 49152, 131072)
GENERATED = 300  # tokens of each text before, which penalties count
OPTIONS = {
    "greedy": SamplingOptions(),
    "temperature 1": SamplingOptions(temperature=1.0),
    "top_k 40": SamplingOptions(temperature=1.0, top_k=40),
    "min_p 0.05": SamplingOptions(temperature=1.0, min_p=0.05),
    "top_p 0.9, temperature 0.7": SamplingOptions(temperature=0.7, top_p=0.9),
    "top_p 0.9": SamplingOptions(temperature=1.0, top_p=0.9),
    "top_p 0.9, presence and frequency": SamplingOptions(
        temperature=1.0, top_p=0.9, presence_penalty=0.5, frequency_penalty=0.5
    ),
    "top_p 0.9, repetition": SamplingOptions(temperature=1.0, top_p=0.9, repetition_penalty=1.1),
}


def random_logits(rows: int, vocab_size: int, seed: int = 0) -> NDArray[np.float32]:
    """Logits (rows, vocab_size): normal, and a head of 2000 ids whose likelihoods fall as a power of their rank."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2.5, (rows, vocab_size))
    steepness = np.linspace(1.1, 3.0, rows)
    for row, slope in zip(logits, steepness, strict=True):
        head = rng.choice(vocab_size, 2000, replace=False)
        row[head] = 17 - slope * np.log(np.arange(1, 2001)) + rng.normal(0, 0.5, 2000)
    return logits.astype(np.float32)


def measure(logits: NDArray[np.float32], options: SamplingOptions, repeats: int) -> list[float]:
    """Seconds that `sample_rows` takes for logits (n, vocab), once for each repeat."""
    ids = np.random.default_rng(1).integers(0, logits.shape[1], GENERATED).tolist()
    rows = [SampledRow(Sampler(options, prompt=ids)) for _ in logits]
    for row in rows:
        for token_id in ids:
            row.sampler.append(token_id)
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        drawn = sample_rows(logits, rows)
        taken.append(time.perf_counter() - start)
        for row, token_id in zip(rows, drawn.tolist(), strict=True):
            row.sampler.append(token_id)
    return taken


def measure_logprobs(logits: NDArray[np.float32], count: int, repeats: int) -> list[float]:
    """Seconds that the `count` highest log probabilities of each row take, once for each repeat."""
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        row_logprobs(logits, logits.argmax(axis=1), [count] * len(logits))
        taken.append(time.perf_counter() - start)
    return taken


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, as `python -m build.bench.sampling --help` describes."""
    parser = argparse.ArgumentParser(
        prog="python -m build.bench.sampling", description="Measure how long it takes to draw the ids of a step."
    )
    parser.add_argument("--rows", type=int, default=16, metavar="N", help="rows of a step (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=100, metavar="N", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    print("| rows | vocabulary | options | median ms | least ms |\n|---:|---:|---|---:|---:|")
    for vocab_size in VOCABULARIES:
        logits = random_logits(args.rows, vocab_size)
        found = {name: measure(logits, options, args.repeats) for name, options in OPTIONS.items()}
        found["20 log probabilities"] = measure_logprobs(logits, 20, args.repeats)
        for name, taken in found.items():
            times = f"{1000 * median(taken):.2f} | {1000 * min(taken):.2f}"
            print(f"| {args.rows} | {vocab_size} | {name} | {times} |")
    return 0


if __name__ == "__main__":
    run_command(main)
