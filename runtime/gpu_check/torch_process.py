"""The speed of torch and transformers on this GPU in fp16: matrix peak, a model's matrix products, and a whole model.

Each is measured in a separate process, with any Python on this machine that has it: a script that imports nothing of
this project, reads JSON and writes JSON. The whole model has the same sizes as ours.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runtime.artifact.manifest import ModelConfig

PYTHONS = (sys.executable, "python3", "/usr/bin/python3", "/usr/local/bin/python3")
TORCH_SCRIPT, TRANSFORMERS_SCRIPT = (
    Path(__file__).with_name(name) for name in ("torch_script.py", "transformers_script.py")
)
LONGEST = 150  # seconds


@dataclass(frozen=True)
class Product:
    """The product of (rows, k) and the transpose of (n, k), `calls` times in one pass of a graph."""

    graph: str
    rows: int
    n: int
    k: int
    calls: int


@dataclass(frozen=True)
class TorchTimes:
    """TFLOP/s of a large fp16 product, and the seconds of all products of a pass, by graph."""

    peak_tflop_s: float
    seconds: dict[str, float]


@dataclass(frozen=True)
class TransformersTimes:
    """Seconds of a prefill by prompt tokens and of a decode step by context.

    `graph` says whether a step was a launch of a CUDA graph.
    """

    ttft: dict[int, float]
    decode: dict[int, float]
    graph: bool


def ask_torch(products: Sequence[Product]) -> TorchTimes | None:
    """Measure with the first Python on this machine that has torch and a GPU.

    If there is none, returns None and writes the reason to standard error, in one line.
    """
    found = _ask(TORCH_SCRIPT, "torch", [asdict(product) for product in products])
    return None if found is None else TorchTimes(**found)


def ask_transformers(model: ModelConfig, prompts: Sequence[int], contexts: Sequence[int]) -> TransformersTimes | None:
    """Like `ask_torch`, for a Mistral model in transformers with random weights.

    Also None for a mixture, and for layers with different windows.
    """
    if model.n_experts is not None or len(set(model.sliding_window)) > 1:
        return None
    config = {
        "hidden_size": model.dim,
        "intermediate_size": model.hidden_dim,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.n_kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab_size,
        "sliding_window": model.sliding_window[0],
        "max_position_embeddings": max(*prompts, *contexts) * 2,
    }
    found = _ask(TRANSFORMERS_SCRIPT, "transformers", {"config": config, "prompts": prompts, "contexts": contexts})
    if found is None:
        return None
    ttft, decode = ({int(tokens): seconds for tokens, seconds in found[name].items()} for name in ("ttft", "decode"))
    return TransformersTimes(ttft, decode, found["graph"])


def _ask(script: Path, what: str, asked: Any) -> Any:  # noqa: ANN401 (JSON values)
    """A script's answer from the first Python that gives one, or None."""
    reasons = []
    for python in dict.fromkeys(filter(None, map(shutil.which, PYTHONS))):
        try:
            done = subprocess.run(
                [python, str(script)],
                input=json.dumps(asked),
                capture_output=True,
                text=True,
                check=False,
                timeout=LONGEST,
            )
        except subprocess.TimeoutExpired:
            reasons.append(f"{python}: nothing after {LONGEST} s")
            break
        if done.returncode == 0:
            return json.loads(done.stdout)
        reasons.append(f"{python}: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1]}")
    print(f"without {what} ({'; '.join(reasons) or 'no python3 here'})", file=sys.stderr)
    return None
