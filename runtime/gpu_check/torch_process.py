"""The speed of torch and transformers on this GPU in fp16: matrix peak, a model's matrix products, and a whole model.

Each is measured in a separate process, with any Python on this machine that has it: a script that imports nothing of
this project, takes JSON as its argument and writes JSON. The whole model has the same sizes as ours.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from runtime.artifact.manifest import Manifest, ModelConfig
from runtime.gpu_check.process_group import UnfinishedError, run_group

FOLDERS = ("/usr/bin", "/usr/local/bin")  # where a python3 may be that PATH does not name
TORCH_SCRIPT, TRANSFORMERS_SCRIPT = (
    Path(__file__).with_name(name) for name in ("torch_script.py", "transformers_script.py")
)
LONGEST = 150  # seconds for an answer


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


def products_of(manifest: Manifest, prompt_tokens: int) -> list[Product]:
    """The matrix products of one token and of a prompt, with their number per call.

    Empty for a mixture, and for a model that generates no text.
    """
    if manifest.model.n_experts is not None or not manifest.model.generates:
        return []
    found = []
    longest = max(manifest.functions, key=lambda function: function.tokens).name
    for label, function, rows in (("decode", "step_1", 1), ("prefill", longest, prompt_tokens)):
        for call in manifest.calls:
            if call.op == "linear" and function in call.calls:
                first = call.arguments[0]
                one = prod(first["lead"]) == 1  # as for the head, which only a prompt's last token needs
                found.append(
                    Product(
                        f"{manifest.name} {label}", 1 if one else rows, first["n"], first["k"], call.calls[function]
                    )
                )
    return found


def ask_torch(products: Sequence[Product], seconds: float) -> TorchTimes:
    """Measure with the first Python on this machine that has torch and a GPU.

    Raises `UnfinishedError` with the reasons if there is none, and `OutOfTimeError`.
    """
    return TorchTimes(**_ask(TORCH_SCRIPT, [asdict(product) for product in products], seconds))


def is_comparable(model: ModelConfig) -> bool:
    """Whether `ask_transformers` can make such a model: it generates text, has no experts, and one window for all."""
    return model.generates and model.n_experts is None and len(set(model.sliding_window)) == 1


def ask_transformers(
    model: ModelConfig, prompts: Sequence[int], contexts: Sequence[int], seconds: float
) -> TransformersTimes:
    """Like `ask_torch`, for a Mistral model in transformers with random weights; it must be a comparable one."""
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
    found = _ask(TRANSFORMERS_SCRIPT, {"config": config, "prompts": prompts, "contexts": contexts}, seconds)
    ttft, decode = ({int(tokens): seconds for tokens, seconds in found[name].items()} for name in ("ttft", "decode"))
    return TransformersTimes(ttft, decode, found["graph"])


def pythons() -> Iterator[str]:
    """This Python, and every python3 that PATH or `FOLDERS` has."""
    yield sys.executable
    for folder in dict.fromkeys(map(os.path.realpath, (*os.get_exec_path(), *FOLDERS))):
        found = shutil.which("python3", path=folder)
        if found:
            yield found


def _ask(script: Path, asked: Any, seconds: float) -> Any:  # noqa: ANN401 (JSON values)
    """A script's answer from the first Python that gives one within the time."""
    end = time.monotonic() + seconds
    reasons = []
    for python in pythons():
        said: list[str] = []
        command = [python, str(script), json.dumps(asked)]
        try:
            run_group(command, said.append, seconds=end - time.monotonic(), silence=LONGEST)
        except UnfinishedError as error:
            reasons.append(f"{python}: {error}")
            continue
        for line in said:
            if line.startswith("{"):
                return json.loads(line)
        reasons.append(f"{python}: it gave no answer")
    raise UnfinishedError("; ".join(reasons))
