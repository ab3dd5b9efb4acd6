"""`python -m build.tools.quality.llama_process GGUF TYPE SLOTS BATCH THREADS`: llama.cpp reads what it is sent.

TYPE is `the file` for the GGUF as it is, or a type that llama.cpp requantizes it to. The process prints one line of
JSON, `Opened`. Then it takes lines of JSON, each a list with the ids that follow in each text, and answers with logits
(batch, vocab) as raw float32; an empty list empties the caches and has no answer. It ends with its input.
"""

import sys
from pathlib import Path

import llama_cpp
import msgspec

from build.tools.llama_engine import LlamaEngine, model_file, silenced
from build.tools.quality.llama import Opened
from runtime.errors import run_command


def main(gguf: str, kind: str, slots: str, batch: str, threads: str) -> int:
    """Answer until the input ends; returns the exit status."""
    llama_cpp.llama_backend_init()
    callback = silenced()
    path = model_file(Path(gguf), kind, int(threads))
    engine = LlamaEngine(path, int(slots), int(threads), int(batch))
    answer(msgspec.json.encode(Opened(engine.vocab_size, path.stat().st_size)) + b"\n")
    for line in sys.stdin.buffer:
        prompts = msgspec.json.decode(line, type=list[list[int]])
        if prompts:
            answer(engine.prefill(prompts).tobytes())
        else:
            engine.reset()
    del callback
    return 0


def answer(data: bytes) -> None:
    """Send all of it now."""
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    run_command(lambda: main(*sys.argv[1:]))
