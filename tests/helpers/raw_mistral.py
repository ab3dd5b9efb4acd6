"""Checkpoints in Mistral's own format, written by simple code, and the model's mathematics in numpy float64.

The mathematics is as mistral-inference defines it, with YaRN and scaled queries as vLLM reads them. Nothing here calls
the project's code.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from runtime.artifact.rotary import QueryScaling, YarnScaling
from tests.helpers.rotary_reference import frequencies, magnitude, query_factor

Float64 = NDArray[np.float64]
Tensors = dict[str, torch.Tensor]
PARAMS: dict[str, Any] = {
    "dim": 24,
    "n_layers": 2,
    "head_dim": 8,
    "hidden_dim": 40,
    "n_heads": 4,
    "n_kv_heads": 2,
    "norm_eps": 1e-5,
    "vocab_size": 50,
    "rope_theta": 1e4,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2}


def raw_tensors(params: Mapping[str, Any], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensors:
    """Random tensors with the names and shapes of mistral-inference's modules.

    Matrices are scaled so that every part of the model affects the result.
    """
    p = dict(params)
    q, kv = p["n_heads"] * p["head_dim"], p["n_kv_heads"] * p["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (p["vocab_size"], p["dim"])}
    for i in range(p["n_layers"]):
        layer = f"layers.{i}."
        shapes |= {
            f"{layer}attention.{name}.weight": shape
            for name, shape in (("wq", (q, p["dim"])), ("wk", (kv, p["dim"])), ("wv", (kv, p["dim"])))
        }
        shapes |= {
            f"{layer}attention.wo.weight": (p["dim"], q),
            f"{layer}attention_norm.weight": (p["dim"],),
            f"{layer}ffn_norm.weight": (p["dim"],),
        }
        where = [f"{layer}feed_forward."]
        if p.get("moe"):
            where = [f"{layer}feed_forward.experts.{e}." for e in range(p["moe"]["num_experts"])]
            shapes[f"{layer}feed_forward.gate.weight"] = (p["moe"]["num_experts"], p["dim"])
        for name in where:
            shapes |= {
                f"{name}w1.weight": (p["hidden_dim"], p["dim"]),
                f"{name}w2.weight": (p["dim"], p["hidden_dim"]),
                f"{name}w3.weight": (p["hidden_dim"], p["dim"]),
            }
    shapes |= {"norm.weight": (p["dim"],), "output.weight": (p["vocab_size"], p["dim"])}
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.rand(shape, generator=generator) + 0.5
            if len(shape) == 1
            else torch.randn(shape, generator=generator) * 2 / shape[1] ** 0.5
        ).to(dtype)
        for name, shape in shapes.items()
    }


def write_raw(folder: Path, params: Mapping[str, Any], tensors: Tensors, *, pth_files: int = 0) -> Path:
    """Write params.json, and consolidated.safetensors or `pth_files` files consolidated.NN.pth that share tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    if not pth_files:
        save_file(tensors, folder / "consolidated.safetensors")
    for i in range(pth_files):
        torch.save({name: tensors[name] for name in list(tensors)[i::pth_files]}, folder / f"consolidated.{i:02d}.pth")
    return folder


def interleaved(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """wq or wk of transformers as Mistral stores it.

    In each head, dimensions d and d + head_dim / 2 become neighbours.
    """
    head_dim = len(rows) // heads
    order = [
        head * head_dim + d + half * head_dim // 2
        for head in range(heads)
        for d in range(head_dim // 2)
        for half in (0, 1)
    ]
    return rows[order].contiguous()


def raw_of_transformers(state: Tensors, n_heads: int, n_kv_heads: int) -> Tensors:
    """A dense model's state dict under Mistral's names.

    The names come from the table in transformers' own conversion script, `convert_mistral_weights_to_hf.py`.
    """
    words = {
        "model.": "",
        "lm_head": "output",
        "embed_tokens": "tok_embeddings",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.": "attention.",
        **{f"{c}_proj": f"w{c}" for c in "qkvo"},
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
    }
    result = {}
    for name, tensor in state.items():
        for theirs, mistrals in words.items():
            name = name.replace(theirs, mistrals)
        heads = {"wq.weight": n_heads, "wk.weight": n_kv_heads}.get(name.rpartition("attention.")[2])
        result[name] = interleaved(tensor, heads) if heads else tensor.contiguous()
    return result


def raw_logits(params: Mapping[str, Any], tensors: Tensors, ids: Sequence[int]) -> Float64:
    """Logits (tokens, vocab) of one sequence.

    Neighbours are rotated as complex numbers; windows are those of `get_cache_sizes`, experts those of `MoeLayer`.
    """
    w = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    window = params.get("sliding_window") or params.get("_sliding_window")
    windows = (
        window * (params["n_layers"] // len(window)) if isinstance(window, list) else [window] * params["n_layers"]
    )
    theta = params.get("rope_theta") or (1e6 if window is None else 1e4)
    x = w["tok_embeddings.weight"][list(ids)]
    for i in range(params["n_layers"]):
        layer = f"layers.{i}."
        h = normed(x, w[layer + "attention_norm.weight"], params["norm_eps"])
        q, k, v = (h @ w[f"{layer}attention.w{c}.weight"].T for c in "qkv")
        x = x + attended(params, windows[i], theta, q, k, v) @ w[layer + "attention.wo.weight"].T
        h = normed(x, w[layer + "ffn_norm.weight"], params["norm_eps"])
        x = x + (mixed(params["moe"], w, layer, h) if params.get("moe") else swiglu(w, layer + "feed_forward.", h))
    return normed(x, w["norm.weight"], params["norm_eps"]) @ w.get("output.weight", w["tok_embeddings.weight"]).T


def normed(x: Float64, weight: Float64, eps: float) -> Float64:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def attended(
    params: Mapping[str, Any], window: int | None, theta: float, q: Float64, k: Float64, v: Float64
) -> Float64:
    tokens, d, group = len(q), params["head_dim"], params["n_heads"] // params["n_kv_heads"]
    scaling, queries_scaling = rotary_of(params)
    angles = np.arange(tokens)[:, None] * frequencies(d, theta, scaling)
    turns = np.exp(1j * angles) * magnitude(scaling)  # (tokens, head_dim / 2)

    def by_head(x: Float64, rotated: bool) -> list[Float64]:
        heads = np.split(x, x.shape[1] // d, axis=1)
        return [((h[:, 0::2] + 1j * h[:, 1::2]) * turns if rotated else h) for h in heads]

    distance = np.arange(tokens)[:, None] - np.arange(tokens)
    hidden = (distance < 0) | (distance >= (window or tokens))
    factors = np.array([query_factor(queries_scaling, i) for i in range(tokens)])
    queries, keys, values = by_head(q * factors[:, None], True), by_head(k, True), by_head(v, False)
    out = []
    for h in range(params["n_heads"]):
        scores = np.where(hidden, -np.inf, (queries[h] @ keys[h // group].conj().T).real / np.sqrt(d))
        shares = np.exp(scores - scores.max(1, keepdims=True))
        out.append(shares / shares.sum(1, keepdims=True) @ values[h // group])
    return np.concatenate(out, axis=1)


def rotary_of(params: Mapping[str, Any]) -> tuple[YarnScaling | None, QueryScaling | None]:
    """The objects `yarn` and `llama_4_scaling`, as vLLM reads them."""
    yarn, llama4 = params.get("yarn"), params.get("llama_4_scaling")
    scaling = yarn and YarnScaling(
        factor=yarn["factor"],
        original_context=yarn["original_max_position_embeddings"],
        beta_fast=yarn["beta"],
        beta_slow=yarn["alpha"],
        attention_factor=0.1 * np.log(yarn["factor"]) + 1 if yarn["apply_scale"] else 1.0,
    )
    queries = llama4 and QueryScaling(beta=llama4["beta"], original_context=llama4["original_max_position_embeddings"])
    return scaling, queries


def swiglu(w: Mapping[str, Float64], prefix: str, x: Float64) -> Float64:
    gate, up = x @ w[prefix + "w1.weight"].T, x @ w[prefix + "w3.weight"].T
    return (gate / (1 + np.exp(-gate)) * up) @ w[prefix + "w2.weight"].T


def mixed(moe: Mapping[str, int], w: Mapping[str, Float64], layer: str, x: Float64) -> Float64:
    out = np.zeros_like(x)
    for t, row in enumerate(x @ w[layer + "feed_forward.gate.weight"].T):
        chosen = np.argsort(-row)[: moe["num_experts_per_tok"]]
        shares = np.exp(row[chosen] - row[chosen].max())
        for e, share in zip(chosen, shares / shares.sum(), strict=True):
            out[t] += share * swiglu(w, f"{layer}feed_forward.experts.{e}.", x[t : t + 1])[0]
    return out
