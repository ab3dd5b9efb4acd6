"""`python -m build.bench.rival_transformers CHECKPOINT WORKLOAD THREADS SCHEME`: time transformers once, as JSON.

It runs on the same weights, in its fastest ordinary way on a CPU: scaled dot product attention, a cache that grows, no
gradients, and logits of only the last token.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.utils import logging

from runtime.bench import Measured, Workload, measure
from runtime.errors import run_command
from runtime.process_memory import peak_memory

DTYPES = {"fp32": torch.float32}


def load_model(checkpoint: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a Hugging Face folder or a GGUF file."""
    logging.disable_progress_bar()
    folder, file = (checkpoint.parent, checkpoint.name) if checkpoint.suffix == ".gguf" else (checkpoint, None)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=dtype, attn_implementation="sdpa"
    )
    return model.eval()


class TransformersEngine:
    """A model and its cache with the interface of `runtime.engines.engine.Engine`, for one sequence."""

    batch = 1

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self.reset()

    def room(self) -> int | None:
        """How many more token ids fit in the cache: None, since it grows."""
        return None

    def reset(self) -> None:
        """Forget every token id."""
        self._cache = DynamicCache(config=self._model.config)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Append token ids; returns the logits (1, vocab) after the last."""
        ids = torch.tensor([list(prompts[0])])
        with torch.inference_mode():
            logits = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits
        found: NDArray[np.float32] = logits[:, -1].float().numpy()
        return found

    def decode(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Append one token id; returns the logits (1, vocab)."""
        return self.prefill([ids])


def main(checkpoint: str, workload: str, threads: str, scheme: str) -> int:
    """Time the model and print `Measured` as JSON; a step reads every parameter."""
    torch.set_num_threads(int(threads))
    model = load_model(Path(checkpoint), DTYPES[scheme])
    nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
    speeds = measure(
        TransformersEngine(model),
        model.config.vocab_size,
        msgspec.json.decode(workload, type=Workload),
        lambda _: nbytes,
    )
    print(msgspec.json.encode(Measured(speeds, peak_memory() / 1e6)).decode())
    return 0


if __name__ == "__main__":
    run_command(lambda: main(*sys.argv[1:]))
