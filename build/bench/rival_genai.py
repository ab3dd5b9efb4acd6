"""`python -m build.bench.rival_genai CHECKPOINT WORKLOAD THREADS SCHEME`: time ONNX Runtime GenAI once, as JSON.

It runs on the same weights. Its own builder makes the graph from a Hugging Face folder, once for each checkpoint and
precision; a GGUF file is converted to such a folder first.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime_genai as genai
from numpy.typing import NDArray

from export.checkpoints.location import checkpoint_files
from export.checkpoints.source import identity
from export.workspace import made_whole
from runtime.bench import Measured, Workload, measure
from runtime.errors import UserError, run_command
from runtime.process_memory import peak_memory

BUILDER = Path(genai.__file__).parent / "models" / "builder.py"
ROOT = Path("out/.work/genai")


class GenaiEngine:
    """A generator with the interface of `runtime.engines.engine.Engine`, for one sequence."""

    batch = 1

    def __init__(self, folder: Path, slots: int, threads: int) -> None:
        config = genai.Config(str(folder))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self._model, self._slots = genai.Model(config), slots
        self.reset()

    def room(self) -> int:
        """How many more token ids fit in the cache."""
        return self._slots - int(self._generator.token_count())

    def reset(self) -> None:
        """Forget every token id."""
        parameters = genai.GeneratorParams(self._model)
        parameters.set_search_options(max_length=self._slots, batch_size=1)
        self._generator: Any = genai.Generator(self._model, parameters)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Append token ids; returns the logits (1, vocab) after the last."""
        self._generator.append_tokens(np.array(prompts[0], np.int32))
        logits: NDArray[np.float32] = self._generator.get_logits()
        return logits[:, -1]

    def decode(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Append one token id; returns the logits (1, vocab)."""
        return self.prefill([ids])


def built(checkpoint: Path, scheme: str) -> Path:
    """The folder with the graph of this checkpoint, made now, in separate processes, if it does not exist."""
    key = identity(checkpoint_files(checkpoint))[:12]
    source = checkpoint
    if checkpoint.suffix == ".gguf":
        source = _made(ROOT / key, lambda folder: (sys.executable, "-m", "build.bench.from_gguf", checkpoint, folder))
    options = ("-p", scheme, "-e", "cpu", "-c", ROOT / "cache")
    return _made(
        ROOT / f"{key}-{scheme}", lambda folder: (sys.executable, BUILDER, "-i", source, "-o", folder, *options)
    )


def _made(target: Path, command: Callable[[Path], Sequence[object]]) -> Path:
    """The folder that a program fills; the program's output is long, and is shown only if it fails."""

    def fill(folder: Path) -> None:
        done = subprocess.run([str(part) for part in command(folder)], check=False, capture_output=True, text=True)
        if done.returncode:
            print(done.stdout, done.stderr, sep="", file=sys.stderr)
            raise UserError("building the graph of ONNX Runtime GenAI failed; its own message is above")

    return made_whole(target, fill)


def main(checkpoint: str, workload: str, threads: str, scheme: str) -> int:
    """Time one precision and print `Measured` as JSON; a step reads the whole file of weights."""
    folder = built(Path(checkpoint), scheme)
    asked = msgspec.json.decode(workload, type=Workload)
    vocab_size = int(json.loads((folder / "genai_config.json").read_text())["model"]["vocab_size"])
    nbytes = sum(path.stat().st_size for path in folder.glob("*.onnx.data"))
    speeds = measure(GenaiEngine(folder, asked.slots, int(threads)), vocab_size, asked, lambda _: nbytes)
    print(msgspec.json.encode(Measured(speeds, peak_memory() / 1e6)).decode())
    return 0


if __name__ == "__main__":
    run_command(lambda: main(*sys.argv[1:]))
