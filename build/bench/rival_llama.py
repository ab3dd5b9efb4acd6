"""`python -m build.bench.rival_llama GGUF WORKLOAD THREADS TYPE`: time llama.cpp once on the same weights, as JSON.

Needs llama-cpp-python, which `make setup BENCH=1` builds for exactly this processor. llama.cpp itself requantizes the
GGUF file to TYPE, once; the result lies beside the original. Batches have 512 tokens; otherwise the defaults apply.
"""

import ctypes
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import msgspec
import numpy as np
from numpy.typing import NDArray

from runtime.bench import Measured, Workload, measure
from runtime.errors import run_command
from runtime.process_memory import peak_memory

TYPES = {
    "F32": llama_cpp.LLAMA_FTYPE_ALL_F32,
    "F16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16,
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
}
BATCH = 512


class LlamaEngine:
    """A llama.cpp context with the interface of `runtime.engines.engine.Engine`, for one sequence."""

    batch = 1

    def __init__(self, path: Path, context: int, threads: int) -> None:
        model_parameters = llama_cpp.llama_model_default_params()
        model_parameters.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_parameters)
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = context, BATCH, BATCH
        parameters.n_threads = parameters.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._slots, self._used = context, 0

    def room(self) -> int:
        """How many more token ids fit in the cache."""
        return self._slots - self._used

    def reset(self) -> None:
        """Forget every token id."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        self._used = 0

    def prefill(self, prompts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Append token ids; returns the logits (1, vocab) after the last."""
        ids = list(prompts[0])
        for start in range(0, len(ids), BATCH):
            part = ids[start : start + BATCH]
            tokens = (llama_cpp.llama_token * len(part))(*part)
            status = llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(tokens, len(part)))
            assert status == 0, f"llama_decode ended with {status}"
        self._used += len(ids)
        logits = llama_cpp.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, (1, self.vocab_size)).copy()

    def decode(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Append one token id; returns the logits (1, vocab)."""
        return self.prefill([ids])


def requantized(source: Path, kind: str, threads: int) -> Path:
    """The file of type `kind` that is made from `source`, now if it does not exist."""
    target = source.with_name(f"{source.stem}.requantized-{kind}.gguf")
    if not target.is_file():
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype, parameters.allow_requantize, parameters.nthread = TYPES[kind], True, threads
        partial = target.with_suffix(".partial")
        status = llama_cpp.llama_model_quantize(str(source).encode(), str(partial).encode(), ctypes.byref(parameters))
        assert status == 0, f"llama_model_quantize ended with {status}"
        partial.replace(target)
    return target


def silenced() -> Any:  # noqa: ANN401 (a ctypes callback, which must outlive its use)
    """Keep llama.cpp's log off the terminal."""

    def ignore(_level: int, _text: bytes, _data: object) -> None:
        return None

    wrap: Callable[..., Any] = llama_cpp.llama_log_callback
    callback = wrap(ignore)
    llama_cpp.llama_log_set(callback, None)
    return callback


def main(gguf: str, workload: str, threads: str, kind: str) -> int:
    """Time one type of weights and print `Measured` as JSON; a step reads the whole file."""
    llama_cpp.llama_backend_init()
    callback = silenced()
    path = requantized(Path(gguf), kind, int(threads))
    asked = msgspec.json.decode(workload, type=Workload)
    engine = LlamaEngine(path, asked.slots, int(threads))
    speeds = measure(engine, engine.vocab_size, asked, lambda _: path.stat().st_size)
    print(msgspec.json.encode(Measured(speeds, peak_memory() / 1e6)).decode())
    del callback
    return 0


if __name__ == "__main__":
    run_command(lambda: main(*sys.argv[1:]))
