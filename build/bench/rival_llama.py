"""`python -m build.bench.rival_llama GGUF WORKLOAD THREADS TYPE`: time llama.cpp once on the same weights, as JSON.

llama.cpp itself requantizes the GGUF file to TYPE, once; the result lies beside the original. `the file` is as it is.
"""

import sys
from pathlib import Path

import llama_cpp
import msgspec

from build.tools.llama_engine import LlamaEngine, model_file, silenced
from runtime.bench import Measured, Workload, measure
from runtime.errors import run_command
from runtime.process_memory import peak_memory


def main(gguf: str, workload: str, threads: str, kind: str) -> int:
    """Time one type of weights and print `Measured` as JSON; a step reads the whole file."""
    llama_cpp.llama_backend_init()
    callback = silenced()
    path = model_file(Path(gguf), kind, int(threads))
    asked = msgspec.json.decode(workload, type=Workload)
    engine = LlamaEngine(path, asked.slots, int(threads))
    speeds = measure(engine, engine.vocab_size, asked, lambda _: path.stat().st_size)
    print(msgspec.json.encode(Measured(speeds, peak_memory() / 1e6)).decode())
    del callback
    return 0


if __name__ == "__main__":
    run_command(lambda: main(*sys.argv[1:]))
