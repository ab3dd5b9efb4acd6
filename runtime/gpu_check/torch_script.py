"""Times matrix products with torch, for `runtime.gpu_check.torch_process`.

It reads a list of {graph, rows, n, k, calls} as JSON and writes {peak_tflop_s, seconds by graph}. It is a script, run
by a Python that has torch; nothing in the runtime imports it.
"""

import json
import sys
from collections import defaultdict
from statistics import median

import torch

PEAK = 8192  # rows, columns and depth of the product that shows the peak
PASSES, CALLS = 5, 64  # launches of a graph, and products in it
LARGE = 10**12  # operations of a product above which one in a graph is enough
COPIES_BYTES = 2**28  # total size of different weights, so that they do not stay in a cache


def seconds_of(rows: int, n: int, k: int) -> float:
    """Time of x (rows, k) times the transpose of w (n, k) in fp16, over copies of w.

    It is the median of several launches of a graph, which is how our kernels are timed.
    """
    calls = CALLS if 2 * rows * n * k < LARGE else 1
    copies = max(1, min(calls, COPIES_BYTES // (2 * n * k)))
    x = torch.randn(rows, k, device="cuda", dtype=torch.float16)
    weights = [torch.randn(n, k, device="cuda", dtype=torch.float16) for _ in range(copies)]
    torch.nn.functional.linear(x, weights[0])  # loads the library before anything is captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # otherwise small products would wait for Python
        for i in range(calls):
            torch.nn.functional.linear(x, weights[i % copies])
    samples = []
    for _ in range(PASSES):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        samples.append(start.elapsed_time(end) / 1e3 / calls)
    return median(samples)


def main() -> None:
    """Measure and print."""
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU")
    seconds: dict[str, float] = defaultdict(float)
    for product in json.loads(sys.argv[1]):
        seconds[product["graph"]] += product["calls"] * seconds_of(product["rows"], product["n"], product["k"])
    peak = 2 * PEAK**3 / seconds_of(PEAK, PEAK, PEAK) / 1e12
    print(json.dumps({"peak_tflop_s": peak, "seconds": seconds}))


if __name__ == "__main__":
    main()
