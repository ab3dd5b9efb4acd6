"""Times a transformers model with random weights in fp16, for `runtime.gpu_check.torch_process`.

It uses the fastest attention of transformers that needs no compiler. It reads {config, prompts, contexts} as JSON:
arguments of MistralConfig, and numbers of tokens. It writes {ttft, decode, graph}: seconds of a prefill by prompt,
seconds of a decode step by context, and whether the steps were launches of a CUDA graph, so that they did not wait for
Python. It is a script, run by a Python that has torch and transformers; nothing in the runtime imports it.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from inspect import signature
from statistics import median
from typing import Any

import torch
from transformers import MistralConfig, MistralForCausalLM, StaticCache

WARM_UPS, STEPS, PASSES = 3, 32, 3
# Columns after a context: one for each warm-up step, for the recorded one, and for each timed one or replay of it.
SPARE = WARM_UPS + 1 + PASSES * STEPS


def random_model(config: dict[str, Any], device: str, dtype: torch.dtype) -> MistralForCausalLM:
    """A model whose random weights are created on the device."""
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return MistralForCausalLM(MistralConfig(**config, attn_implementation="sdpa")).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def static_cache(model: MistralForCausalLM, columns: int) -> StaticCache:
    """A cache of fixed size; its arguments differ between releases of transformers."""
    wanted = {
        "config": model.config,
        "max_batch_size": 1,
        "max_cache_len": columns,
        "device": model.device,
        "dtype": model.dtype,
    }
    return StaticCache(
        **{name: value for name, value in wanted.items() if name in signature(StaticCache.__init__).parameters}
    )


def prefill_seconds(model: MistralForCausalLM, tokens: int) -> float:
    """Time of one forward pass over a prompt, up to the likeliest next id."""
    ids = torch.randint(model.config.vocab_size, (1, tokens), device=model.device)
    samples = []
    for _ in range(PASSES + 1):
        start = time.perf_counter()
        model(input_ids=ids, use_cache=True, logits_to_keep=1).logits.argmax(-1).item()
        samples.append(time.perf_counter() - start)
    return median(samples[1:])


def step_seconds(model: MistralForCausalLM, context: int) -> tuple[float, bool]:
    """Time of a decode step after a context, and whether it could be recorded as a graph."""
    ids = torch.randint(model.config.vocab_size, (1, context), device=model.device)
    cache = static_cache(model, context + SPARE)
    model(input_ids=ids, past_key_values=cache, logits_to_keep=1)

    def step() -> None:
        model(input_ids=ids[:, :1], past_key_values=cache, logits_to_keep=1).logits.argmax(-1)

    for _ in range(WARM_UPS):
        step()
    replay = recorded(step)
    return seconds_of(replay or step, model.device, STEPS if replay else 1), replay is not None


def recorded(step: Callable[[], None]) -> Callable[[], None] | None:
    """A function that replays a step's launches; None if they cannot be recorded, as on a CPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as error:
        print(f"no CUDA graph of transformers: {error}", file=sys.stderr)
        return None
    return graph.replay


def seconds_of(step: Callable[[], None], device: torch.device, steps: int) -> float:
    """Mean time of a step: the median over several passes."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    samples = []
    for _ in range(PASSES):
        wait()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        wait()
        samples.append((time.perf_counter() - start) / steps)
    return median(samples)


def measured(model: MistralForCausalLM, prompts: Sequence[int], contexts: Sequence[int]) -> dict[str, Any]:
    """The script's answer."""
    with torch.inference_mode():
        ttft = {tokens: prefill_seconds(model, tokens) for tokens in prompts}
        decode = {context: step_seconds(model, context) for context in contexts}
    return {
        "ttft": ttft,
        "decode": {n: s for n, (s, _) in decode.items()},
        "graph": all(graph for _, graph in decode.values()),
    }


def main() -> None:
    """Measure and print."""
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU")
    asked = json.loads(sys.argv[1])
    print(
        json.dumps(measured(random_model(asked["config"], "cuda", torch.float16), asked["prompts"], asked["contexts"]))
    )


if __name__ == "__main__":
    main()
