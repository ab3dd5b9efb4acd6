"""llama.cpp beside our variants: the same GGUF, as it is and requantized, each in a process of its own."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import msgspec
import numpy as np
from numpy.typing import NDArray

from build.tools.llama_files import AS_IT_IS, EIGHT_BITS, FOUR_BITS
from build.tools.quality.measuring import Contestant
from build.tools.quality.texts import ROWS
from export.configuration.config import CompileConfig
from export.console import console
from runtime.errors import UserError

KINDS = (AS_IT_IS, EIGHT_BITS, FOUR_BITS)
# Threads of OpenMP that wait would take the cores from whoever reads the text next.
SLEEPING_THREADS = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
BYTES_OF_A_LOGIT = np.dtype(np.float32).itemsize


class Opened(msgspec.Struct, frozen=True):
    """What llama.cpp says of a file that it has opened."""

    vocab_size: int
    weight_bytes: int


class LlamaProcess:
    """llama.cpp in another process, as `build.tools.quality.measuring.Reader`."""

    def __init__(self, config: CompileConfig, kind: str, slots: int) -> None:
        self.batch, self._kind = ROWS, kind
        threads = len(os.sched_getaffinity(0))
        arguments = (str(config.frontend.checkpoint), kind, str(slots), str(self.batch), str(threads))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "build.tools.quality.llama_process", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **SLEEPING_THREADS},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._asked, self._answered = self._process.stdin, self._process.stdout
        line = self._answered.readline()
        self.opened = msgspec.json.decode(line, type=Opened) if line else self._failed()

    def reset(self) -> None:
        """Forget every id."""
        self._send([])

    def prefill(self, prompts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Append ids to each text; returns logits (batch, vocab) after the last."""
        self._send(prompts)
        shape = (self.batch, self.opened.vocab_size)
        data = self._answered.read(shape[0] * shape[1] * BYTES_OF_A_LOGIT)
        if len(data) != shape[0] * shape[1] * BYTES_OF_A_LOGIT:
            self._failed()
        return np.frombuffer(data, np.float32).reshape(shape)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _send(self, prompts: Sequence[Sequence[int]]) -> None:
        try:
            self._asked.write(msgspec.json.encode(prompts) + b"\n")
            self._asked.flush()
        except BrokenPipeError:
            self._failed()

    def _failed(self) -> "Opened":
        status = self._process.wait()
        raise UserError(
            f"llama.cpp ended with status {status} on {self._kind}; its own message is above, "
            "or pass --no-llama to leave it out"
        )


def reason_to_leave_out(config: CompileConfig) -> str | None:
    """Why llama.cpp cannot read what a config names; None if it can."""
    frontend = config.frontend
    if frontend.checkpoint.suffix != ".gguf":
        return "it reads only GGUF checkpoints"
    changed = next((key for key in ("overrides", "adapter") if getattr(frontend, key)), None)
    if changed is not None:
        return f"it does not support frontend.{changed}"
    if importlib.util.find_spec("llama_cpp") is None:
        return "it needs `make setup BENCH=1`"
    return None


@contextmanager
def llama_contestants(config: CompileConfig, slots: int, vocab_size: int) -> Iterator[dict[str, Contestant]]:
    """llama.cpp on the config's checkpoint in each of `KINDS`, with caches of `slots`; they end with the block.

    There are none if it cannot take part, which is said. Raises `UserError` if one fails.
    """
    reason = reason_to_leave_out(config)
    if reason is not None:
        console.print(f"llama.cpp is left out: {reason}")
    with ExitStack() as stack:
        contestants = {}
        for kind in KINDS if reason is None else ():
            process = LlamaProcess(config, kind, slots)
            stack.callback(process.close)
            if process.opened.vocab_size != vocab_size:
                raise UserError(
                    f"llama.cpp reads {process.opened.vocab_size} tokens from the vocabulary of "
                    f"{config.frontend.checkpoint}, expected {vocab_size}; pass --no-llama to leave it out"
                )
            contestants[f"llama.cpp, {kind}"] = Contestant(process, process.opened.weight_bytes)
        yield contestants
