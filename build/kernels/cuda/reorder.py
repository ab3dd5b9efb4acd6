"""The columns of x in the order in which a weight's columns lie; one thread per number."""

from tvm.script import tirx as T

from build.kernels.cuda.binding import Binding

THREADS = 256


def reordered_rows(rows: int, k: int, on: Binding):
    """A launch, inline `reorder(x, order, y)`: y[i, c] = x[i, order[c]] for y (rows, k)."""
    parts = -(-k // THREADS)

    @T.inline
    def reorder(x, order, y):
        for block in on.blocks(rows * parts):
            for t in on.threads(THREADS):
                i = block // parts
                c = block % parts * THREADS + t
                if c < k:
                    y[i, c] = x[i, order[c]]

    return reorder
