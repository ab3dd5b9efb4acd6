"""llama.cpp with the interface of our engine's slots, and the files that it makes of another type.

Needs llama-cpp-python, which `make setup BENCH=1` builds for exactly this processor. It belongs in a process of its
own: its threads, TVM's and torch's would get in each other's way.
"""

import ctypes
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from build.tools.llama_files import AS_IT_IS
from runtime.artifact.cpu import machine_features
from runtime.errors import UserError

TYPES = {
    "F32": llama_cpp.LLAMA_FTYPE_ALL_F32,
    "F16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16,
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
}
BATCH = 512  # tokens that are computed at once; llama.cpp's own tools do the same
ERROR_LEVEL = 4  # GGML_LOG_LEVEL_ERROR in ggml.h


class LlamaEngine:
    """A llama.cpp context with the interface of `runtime.engines.side_by_side.SideBySide`.

    Each of the `batch` texts has a cache of `context` slots. Everything else is as llama.cpp has it by default. Raises
    `UserError` for a file that llama.cpp cannot load, and for caches that it cannot make.
    """

    def __init__(self, path: Path, context: int, threads: int, batch: int = 1) -> None:
        model_parameters = llama_cpp.llama_model_default_params()
        model_parameters.n_gpu_layers = 0
        model_parameters.use_extra_bufts = may_rearrange()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_parameters)
        if not self._model:
            raise UserError(f"llama.cpp cannot load {path}; fetch the file again, or leave llama.cpp out")
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = context * batch, BATCH, BATCH
        parameters.n_seq_max = batch
        parameters.n_threads = parameters.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise UserError(f"llama.cpp cannot make {batch} caches of {context} slots; free some memory")
        self._tokens = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self.batch, self._slots, self._used = batch, context, [0] * batch

    def room(self) -> int:
        """How many more token ids fit in every cache."""
        return self._slots - max(self._used)

    def reset(self) -> None:
        """Forget every token id."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        self._used = [0] * self.batch

    def prefill(self, prompts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Append token ids to the first texts; returns the logits (len(prompts), vocab) after the last of each."""
        columns = [
            (token_id, self._used[row] + i, row, i == len(prompt) - 1)
            for row, prompt in enumerate(prompts)
            for i, token_id in enumerate(prompt)
        ]
        logits = np.empty((len(prompts), self.vocab_size), np.float32)
        for start in range(0, len(columns), BATCH):
            part = columns[start : start + BATCH]
            self._decode(part)
            for i, (_, _, row, last) in enumerate(part):
                if last:
                    found = llama_cpp.llama_get_logits_ith(self._context, i)
                    logits[row] = np.ctypeslib.as_array(found, (self.vocab_size,))
        for row, prompt in enumerate(prompts):
            self._used[row] += len(prompt)
        return logits

    def decode(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Append one token id to each of the first texts; returns the logits (len(ids), vocab)."""
        return self.prefill([[token_id] for token_id in ids])

    def share_first(self) -> None:
        """Let every text, all others being empty, hold what the first one does."""
        memory = llama_cpp.llama_get_memory(self._context)
        for row in range(1, self.batch):
            llama_cpp.llama_memory_seq_cp(memory, 0, row, -1, -1)
        self._used = self._used[:1] * self.batch

    def rewind(self, length: int) -> None:
        """Forget all token ids of every text from `length` on."""
        memory = llama_cpp.llama_get_memory(self._context)
        for row in range(self.batch):
            removed = llama_cpp.llama_memory_seq_rm(memory, row, length, -1)
            assert removed, "a cache without a window can be cut anywhere"
        self._used = [min(used, length) for used in self._used]

    def _decode(self, columns: Sequence[tuple[int, int, int, bool]]) -> None:
        """Compute (id, position, text, whether its logits are wanted), at most `BATCH` of them."""
        tokens = self._tokens
        tokens.n_tokens = len(columns)
        for i, (token_id, position, row, wanted) in enumerate(columns):
            tokens.token[i], tokens.pos[i], tokens.logits[i] = token_id, position, wanted
            tokens.n_seq_id[i] = 1
            tokens.seq_id[i][0] = row
        status = llama_cpp.llama_decode(self._context, tokens)
        assert status == 0, f"llama_decode ended with {status}"


def may_rearrange() -> bool:
    """Whether llama.cpp may rearrange weights for this processor as it loads them; if not, that is said.

    Where it does so for AMX, the first matrix product of several tokens crashes on many machines
    (https://github.com/ggml-org/llama.cpp/issues/20824).
    """
    crashes = "amx_int8" in machine_features()
    if crashes:
        print("llama.cpp runs without AMX, with which it crashes (ggml-org/llama.cpp#20824)", file=sys.stderr)
    return not crashes


def model_file(source: Path, kind: str, threads: int) -> Path:
    """The file to load: `source` as it is, or `requantized`."""
    return source if kind == AS_IT_IS else requantized(source, kind, threads)


def requantized(source: Path, kind: str, threads: int) -> Path:
    """The file of type `kind` that is made from `source`, now if it does not exist; it lies beside the original.

    Raises `UserError` if llama.cpp cannot make it.
    """
    target = source.with_name(f"{source.stem}.requantized-{kind}.gguf")
    if not target.is_file():
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype, parameters.allow_requantize, parameters.nthread = TYPES[kind], True, threads
        partial = target.with_suffix(".partial")
        status = llama_cpp.llama_model_quantize(str(source).encode(), str(partial).encode(), ctypes.byref(parameters))
        if status != 0:
            raise UserError(f"llama.cpp cannot requantize {source} to {kind}; check the file and the disk's free space")
        partial.replace(target)
    return target


def silenced() -> Any:  # noqa: ANN401 (a ctypes callback, which must outlive its use)
    """Keep llama.cpp's log off the terminal, but for its errors."""

    def show_errors(level: int, text: bytes, _data: object) -> None:
        if level == ERROR_LEVEL:
            sys.stderr.write(text.decode(errors="replace"))

    wrap: Callable[..., Any] = llama_cpp.llama_log_callback
    callback = wrap(show_errors)
    llama_cpp.llama_log_set(callback, None)
    return callback
