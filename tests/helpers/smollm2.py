"""SmolLM2, a real model of 135 million parameters: compiled once in a test run, and as `transformers` computes it."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from filelock import FileLock
from transformers import LlamaForCausalLM

from build.compile import compile_job
from export.checkpoints.checkpoint import open_checkpoint
from export.fetch import DOWNLOADS, fetch
from export.job import Job
from export.pipeline import export_model
from export.proof.reference_model import load_reference
from export.stage import ROOT
from tests.helpers.artifacts import ONE_LEVEL

WINDOW = 64
CACHE_LEN = 1024
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    # ten prompts at once, so that each reading of the weights serves five
    "fp32": {"quantize": {"scheme": "none"}, "shape": {"slots": 5, "step_rows": [1, 5]}},
    "windowed": {"overrides": {"sliding_window": WINDOW}, "quantize": {"scheme": "none"}},
    "int8": {"quantize": {"scheme": "int8"}},
}


def checkpoint() -> Path:
    """The GGUF file, downloaded only once."""
    return fetch(DOWNLOADS["demo"], ROOT / "out" / "downloads")


def smollm2(name: str, shared: Path) -> Path:
    """The artifact of one of `VARIANTS`, compiled in this process from `NAME.yaml` in a folder `shared`.

    All processes of a test run share that folder. There is only one prefill graph, to save time.
    """
    changes = dict(VARIANTS[name])
    config = {
        "name": name,
        "frontend": {"checkpoint": str(checkpoint()), "type": "gguf", "overrides": changes.pop("overrides", {})},
        "shape": {"prefill_chunk": [128], "cache_len": CACHE_LEN, **changes.pop("shape", {})},
        "backend": {"target": "llvm", "cpu": ONE_LEVEL, "dtype": "fp32"},
        **changes,
    }
    shared.mkdir(parents=True, exist_ok=True)
    path = shared / f"{name}.yaml"
    with FileLock(shared / f"{name}.lock"), contextlib.chdir(shared):
        path.write_text(json.dumps(config))  # JSON is YAML
        job = Job.load(Path(path.name))
        export_model(job)
        compile_job(job)
    return shared / "out" / name


def saved_by_transformers(shared: Path) -> Path:
    """A folder with the GGUF file's weights as `transformers` reads them: ten seconds, once in a run."""
    folder = shared / "transformers"
    shared.mkdir(parents=True, exist_ok=True)
    with FileLock(shared / "transformers.lock"):
        if not folder.is_dir():
            path = checkpoint()
            with pytest.MonkeyPatch.context() as patch:
                # transformers makes this table, of a model's tensors, again for each of its 397 modules
                patch.setattr(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map))
                loaded = LlamaForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
            loaded.hf_quantizer = None  # transformers refuses to save weights marked as GGUF, which these no longer are
            del loaded.config.quantization_config
            loaded.save_pretrained(shared / "transformers.tmp")
            (shared / "transformers.tmp").rename(folder)
    return folder


def transformers_model(name: str, shared: Path) -> torch.nn.Module:
    """A variant's weights and windows in `transformers`, in float32."""
    overrides = dict(VARIANTS[name].get("overrides", {}))
    model = open_checkpoint(checkpoint(), "gguf", overrides).model
    return load_reference(saved_by_transformers(shared), "huggingface", model)


def greedy(model: torch.nn.Module, prompt: Sequence[int], answer: Sequence[int]) -> list[int]:
    """Tokens that `transformers` ranks first after the prompt and after each answer token but the last.

    Greedy decoding by `transformers` gives the answer if and only if these are the answer's own tokens: the first is
    its choice after the prompt, and each later one its choice after all before it. One pass shows this, in a tenth of
    the time that a pass for each token takes.
    """
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *answer[:-1]]]), use_cache=False).logits[0]
    return logits[len(prompt) - 1 :].argmax(-1).tolist()
