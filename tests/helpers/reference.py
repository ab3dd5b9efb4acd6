"""Mistral in numpy float64, from its definition.

Every token attends to the whole sequence at once, without caches, chunks, padding or batches.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.artifact.manifest import ModelConfig
from tests.helpers.rotary_reference import frequencies, magnitude, query_factor

Float64 = NDArray[np.float64]
FLOAT32_ROUNDOFF = 2.0**-24
FLOAT16_ROUNDOFF = 2.0**-11


def logits(model: ModelConfig, weights: Mapping[str, NDArray[Any]], ids: Sequence[int]) -> Float64:
    """Logits (tokens, vocab) after each token of one sequence.

    `model.sliding_window` holds one window, or None, for each layer.
    """
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    x = w["tok_embeddings.weight"][list(ids)]
    for i, window in enumerate(model.sliding_window):
        layer = f"layers.{i}."
        normed = rms_norm(x, w[layer + "attention_norm.weight"], model.norm_eps)
        x = (
            x
            + attention(model, window, normed @ w[layer + "attention.wqkv.weight"].T)
            @ w[layer + "attention.wo.weight"].T
        )
        normed = rms_norm(x, w[layer + "ffn_norm.weight"], model.norm_eps)
        if model.n_experts is None:
            x = x + swiglu(normed, w[layer + "feed_forward.w13.weight"], w[layer + "feed_forward.w2.weight"])
        else:
            x = x + mixture(
                model,
                {
                    name.removeprefix(layer + "feed_forward."): array
                    for name, array in w.items()
                    if name.startswith(layer)
                },
                normed,
            )
    return rms_norm(x, w["norm.weight"], model.norm_eps) @ w.get("output.weight", w["tok_embeddings.weight"]).T


def swiglu(x: Float64, w13: Float64, w2: Float64) -> Float64:
    gate, up = np.split(x @ w13.T, 2, axis=-1)
    return (gate / (1 + np.exp(-gate)) * up) @ w2.T


def mixture(model: ModelConfig, w: Mapping[str, Float64], x: Float64) -> Float64:
    """Mix experts token by token: those with the best scores, weighted by the softmax over their scores."""
    w13, w2 = (np.split(w[f"experts.{name}.weight"], model.n_experts) for name in ("w13", "w2"))
    result = np.zeros_like(x)
    for i, row in enumerate(x):
        scores = w["gate.weight"] @ row
        best = np.argsort(-scores)[: model.experts_per_token]
        shares = np.exp(scores[best] - scores.max())
        result[i] = sum(
            share * swiglu(row, w13[e], w2[e]) for e, share in zip(best, shares / shares.sum(), strict=True)
        )
    return result


def rms_norm(x: Float64, weight: Float64, eps: float) -> Float64:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def attention(model: ModelConfig, window: int | None, qkv: Float64) -> Float64:
    """Map (tokens, q + k + v) to (tokens, n_heads * head_dim), one head and one query at a time."""
    tokens, d = len(qkv), model.head_dim
    heads = qkv.reshape(tokens, model.n_heads + 2 * model.n_kv_heads, d)
    out = np.empty((tokens, model.n_heads, d))
    for h in range(model.n_heads):
        kv = model.n_heads + h // (model.n_heads // model.n_kv_heads)
        query, key, value = (
            rotated(heads[:, h], model),
            rotated(heads[:, kv], model),
            heads[:, kv + model.n_kv_heads],
        )
        for i in range(tokens):
            seen = slice(0 if window is None else max(0, i - window + 1), i + 1)
            scores = key[seen] @ query[i] * query_factor(model.query_scaling, i) / np.sqrt(d)
            shares = np.exp(scores - scores.max())
            out[i, h] = shares @ value[seen] / shares.sum()
    return out.reshape(tokens, -1)


def rotated(x: Float64, model: ModelConfig) -> Float64:
    """Rotate (tokens, head_dim).

    Each pair (d, d + head_dim / 2), as a complex number, is turned by its position times its frequency.
    """
    half = x.shape[1] // 2
    angles = np.arange(len(x))[:, None] * frequencies(x.shape[1], model.rope_theta, model.rope_scaling)
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angles) * magnitude(model.rope_scaling)
    return np.concatenate([turned.real, turned.imag], axis=1)


# Of a cache's number, relative to its column's largest.
NARROW_ROUNDOFF = {"float8_e4m3fn": 2.0**-4, "int8": 0.5 / 127, "uint8": 1 / 15}
IN_WHOLE_NUMBERS = ("int8", "uint8")  # caches that a CPU multiplies so


def bound(
    model: ModelConfig,
    longest: int,
    dtype: str = "float32",
    rounding: str = "none",
    *,
    on_cpu: bool = False,
    on_tensor_cores: bool = False,
) -> float:
    """Largest difference between two correct float32 implementations: max |a - b| / max |b| over the logits.

    A sum of K terms in any order has an error of about sqrt(K) u (Higham and Mary, 2019). Each layer has 8 sums in a
    row (2 norms, wqkv, scores, mix, wo, w13, w2), followed by the last norm and the head. Both sides err, hence the
    factor of two. float16 caches round each key and value once more; where the two sides differ before that rounding,
    they may end up one float16 step apart. These errors are independent, hence their root. Where tokens are
    rounded to 127 or 32512 levels before products, the two sides may likewise end up half a level apart, and where they
    are rounded to bfloat16, a unit roundoff of its 8 bits.

    A CPU (`on_cpu`) multiplies int8 and int4 caches by queries and shares of 16 bits, which onnxruntime does not round.
    Tensor cores (`on_tensor_cores`) take the inputs of each sum as float16: as many roundings again as float16 caches
    have. Two sides that differ so much before they store a number may well take neighbouring levels, as with float16.
    """
    sums = 8 * model.n_layers + 2
    terms = max(model.dim, model.hidden_dim, model.n_heads * model.head_dim, longest)
    error = sums * np.sqrt(terms) * FLOAT32_ROUNDOFF
    # Levels of 16 bits are crossed by many numbers of a sum, each of which is smaller than the largest by the crest of
    # normal numbers.
    half_levels = {"none": 0, "bfloat16": 2.0**-8, "int8": 0.5 / 127, "int16": 0.5 / 32512 * np.sqrt(2 * np.log(terms))}
    error += np.sqrt(sums * ((dtype == "float16") + on_tensor_cores)) * FLOAT16_ROUNDOFF
    coarser = on_tensor_cores or (on_cpu and dtype in IN_WHOLE_NUMBERS)
    error += np.sqrt(sums) * (NARROW_ROUNDOFF.get(dtype, 0) if coarser else 0)
    return float(2 * (error + np.sqrt(sums) * half_levels[rounding]))


def difference(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """max |a - b| / max |b|; NaN, which passes no comparison, if either holds a NaN."""
    assert found.shape == expected.shape, f"{found.shape} against {expected.shape}"
    return float(np.max(np.abs(found.astype(np.float64) - expected)) / np.max(np.abs(expected)))
