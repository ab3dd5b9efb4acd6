"""`python -m build.bench.rival_llama_sequences GGUF WORKLOAD THREADS TYPE`: time llama.cpp's batched decode, as JSON.

As in llama.cpp's own `llama-batched-bench`, one context has room for the most sequences, and fewer of them are decoded
in it. The context of all is computed once and copied.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import llama_cpp
import msgspec
import numpy as np
from numpy.typing import NDArray

from build.tools.llama_engine import LlamaEngine, model_file, silenced
from runtime.benchmarks.sequences import SequencesWorkload, measure_sequences
from runtime.errors import run_command


class LlamaSequences:
    """A llama.cpp context as `runtime.benchmarks.sequences.Sequences`."""

    def __init__(self, engine: LlamaEngine) -> None:
        self._engine = engine
        self._context = 0
        engine.reset()
        self._capacity = engine.room()

    @property
    def most(self) -> int:
        """How many sequences there are."""
        return self._engine.batch

    def capacity(self) -> int:
        """How many tokens a sequence holds."""
        return self._capacity

    def fill(self, ids: Sequence[int]) -> None:
        """Take these ids as the context of every sequence."""
        self._engine.reset()
        self._engine.prefill([ids])
        self._engine.share_first()
        self._context = len(ids)

    def restart(self, count: int) -> None:
        """Let the first `count` sequences, and all others, hold the context and nothing else."""
        assert count <= self.most
        self._engine.rewind(self._context)

    def decode(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Append one id to each of the first len(ids) sequences; returns logits (len(ids), vocab)."""
        return self._engine.decode(ids)


def main(gguf: str, workload: str, threads: str, kind: str) -> int:
    """Time one type of weights and print a `SequencesReport` as JSON."""
    llama_cpp.llama_backend_init()
    callback = silenced()
    path = model_file(Path(gguf), kind, int(threads))
    asked = msgspec.json.decode(workload, type=SequencesWorkload)
    engine = LlamaEngine(path, asked.columns, int(threads), batch=max(asked.counts))
    report = measure_sequences(LlamaSequences(engine), engine.vocab_size, asked)
    print(msgspec.json.encode(report).decode())
    del callback
    return 0


if __name__ == "__main__":
    run_command(lambda: main(*sys.argv[1:]))
