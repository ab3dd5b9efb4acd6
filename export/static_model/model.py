"""The static Mistral: a torch module in which batch, chunk and cache lengths fix every shape.

Parameters have the project's tensor names (`layers.0.attention.wqkv.weight`), so a state dict, the ONNX initializers
and the artifact's weights all use the same name for a tensor. Constants that depend only on the configuration are
buffers and come from `constants`.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from export.static_model import cache, rope
from export.static_model.constants import MASKED_SCORE, SMALLEST_PEAK
from export.static_model.rope_scaling import attention_factor
from runtime.artifact.manifest import HEADS, ModelConfig
from runtime.artifact.schemes import ROUNDING_LEVELS, TokenRounding


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis (Zhang and Sennrich, 2019), in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., dim) to (..., dim)."""
        return self.weight * (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.eps))


class Attention(nn.Module):
    """Grouped-query attention over a rolling cache; keys are shared by broadcasting, never repeated."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        q_width, kv_width = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.k_start, self.v_start = q_width, q_width + kv_width
        self.wqkv = nn.Linear(config.dim, q_width + 2 * kv_width, bias=False)
        self.wo = nn.Linear(q_width, config.dim, bias=False)

    def heads(self, x: torch.Tensor, n: int) -> torch.Tensor:
        """(B, T, n * head_dim) to (B, n, T, head_dim)."""
        batch, tokens, _ = x.shape
        return x.view(batch, tokens, n, self.config.head_dim).transpose(1, 2)

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *rest: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Compute the output and the new caches from x (B, T, dim) and the layer's caches.

        The mask is (B, T, W + T), cos and sin are (B, 1, T, head_dim / 2). If queries are scaled, their factors
        (B, 1, T, 1) follow. Caches (B, n_kv_heads, W, width) are the parts of their format
        (`runtime.artifact.caches`), each of the keys and then of the values.
        """
        c = self.config
        factors, past = (rest[:1], rest[1:]) if c.query_scaling else ((), rest)
        batch, tokens, _ = x.shape
        qkv = self.wqkv(x)  # (B, T, (n_heads + 2 n_kv_heads) * head_dim)
        q, k, v = qkv[..., : self.k_start], qkv[..., self.k_start : self.v_start], qkv[..., self.v_start :]
        query = rope.rotate(self.heads(q, c.n_heads), cos, sin)  # (B, n_heads, T, head_dim)
        for factor in factors:
            query = query * factor
        new_key = cache.stored(rope.rotate(self.heads(k, c.n_kv_heads), cos, sin), past[0].dtype)
        new_value = cache.stored(self.heads(v, c.n_kv_heads), past[1].dtype)
        keys = tuple(cache.append(*pair) for pair in zip(past[0::2], new_key, strict=True))
        values = tuple(cache.append(*pair) for pair in zip(past[1::2], new_value, strict=True))
        grouped = query.view(batch, c.n_kv_heads, c.group, tokens, c.head_dim)
        columns = cache.shared(keys, query.dtype).transpose(-2, -1)  # (B, n_kv_heads, 1, head_dim, W + T)
        scores = grouped @ columns * c.head_dim**-0.5  # (B, n_kv_heads, group, T, W + T)
        weights = torch.where(mask[:, None, None], scores, MASKED_SCORE).softmax(-1)
        mixed = weights @ cache.shared(values, query.dtype)  # (B, n_kv_heads, group, T, head_dim)
        merged = mixed.view(batch, c.n_heads, tokens, c.head_dim).transpose(1, 2).reshape(batch, tokens, -1)
        joined = (columns for pair in zip(keys, values, strict=True) for columns in pair)
        present = (cache.keep_last(new, tokens, old.dtype) for new, old in zip(joined, past, strict=True))
        return self.wo(merged), *present


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, 2020): w2(silu(w1 x) * w3 x), with w1 and w3 stacked in one matrix."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.hidden_dim = config.hidden_dim
        self.w13 = nn.Linear(config.dim, 2 * config.hidden_dim, bias=False)
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, dim) to (B, T, dim)."""
        both = self.w13(x)  # (B, T, 2 * hidden_dim)
        return self.w2(functional.silu(both[..., : self.hidden_dim]) * both[..., self.hidden_dim :])


class Experts(nn.Module):
    """The feed-forwards of a mixture, with the experts' matrices stacked by rows."""

    def __init__(self, config: ModelConfig, n_experts: int) -> None:
        super().__init__()
        self.w13 = nn.Linear(config.dim, n_experts * 2 * config.hidden_dim, bias=False)
        self.w2 = nn.Linear(config.hidden_dim, n_experts * config.dim, bias=False)


class MixtureOfExperts(nn.Module):
    """A sum over each token's `experts_per_token` best experts, weighted by the softmax over their scores.

    Source: Jiang et al., 2024, "Mixtral of Experts", equation 2. Since a static graph cannot choose, it computes every
    expert for every token and multiplies those not chosen by an exact zero; the kernel that the build stage puts in its
    place computes only the chosen ones.
    """

    def __init__(self, config: ModelConfig, n_experts: int, experts_per_token: int) -> None:
        super().__init__()
        self.dim, self.hidden_dim, self.n_experts, self.experts_per_token = (
            config.dim,
            config.hidden_dim,
            n_experts,
            experts_per_token,
        )
        self.gate = nn.Linear(config.dim, n_experts, bias=False)
        self.experts = Experts(config, n_experts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, dim) to (B, T, dim)."""
        scores, chosen = self.gate(x).topk(self.experts_per_token)  # (B, T, experts_per_token) each
        shares = torch.where(
            chosen[..., None] == torch.arange(self.n_experts, device=x.device), scores.softmax(-1)[..., None], 0.0
        ).sum(-2)  # (B, T, n_experts)
        tokens = x.reshape(-1, self.dim)  # (B T, dim)
        both = tokens @ self.experts.w13.weight.view(self.n_experts, 2 * self.hidden_dim, self.dim).transpose(1, 2)
        # (n_experts, B T, hidden_dim), then (n_experts, B T, dim)
        hidden = functional.silu(both[..., : self.hidden_dim]) * both[..., self.hidden_dim :]
        outputs = hidden @ self.experts.w2.weight.view(self.n_experts, self.dim, self.hidden_dim).transpose(1, 2)
        return (outputs * shares.view(-1, self.n_experts).transpose(0, 1)[..., None]).sum(0).view(x.shape)


def feed_forward(config: ModelConfig) -> nn.Module:
    """The layer's feed-forward: one, or a mixture."""
    if config.n_experts is None or config.experts_per_token is None:
        return FeedForward(config)
    return MixtureOfExperts(config, config.n_experts, config.experts_per_token)


def head(config: ModelConfig) -> nn.Module:
    """The module from a normed state (..., dim) to outputs (..., n_outputs); the identity if the head has no tensor."""
    tensors = HEADS[config.head].tensors
    return nn.Linear(config.dim, config.n_outputs, bias="output.bias" in tensors) if tensors else nn.Identity()


class Block(nn.Module):
    """One decoder layer: attention and feed-forward, each applied after a norm and added to its input."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = feed_forward(config)

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor,
        *rest: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """As `Attention.forward`, but with x (B, T, dim) before the norm, and the output of the whole layer."""
        mixed, *present = self.attention(self.attention_norm(x), mask, *rest)
        x = x + mixed
        return x + self.feed_forward(self.ffn_norm(x)), *present


def rounded_tokens(x: torch.Tensor, how: TokenRounding) -> torch.Tensor:
    """Round x (..., K), half to even: to bfloat16, or to whole multiples of a scale for `how.together` neighbours.

    The scale is (max |x| + smallest) / levels.
    """
    if how.rounding not in ROUNDING_LEVELS:
        return x.bfloat16().float()
    order = None if how.order is None else torch.from_numpy(how.order).long()
    groups = (x if order is None else x[..., order]).unflatten(-1, (-1, how.together))
    scale = (groups.abs().amax(-1, keepdim=True) + SMALLEST_PEAK) / ROUNDING_LEVELS[how.rounding]
    found = ((groups / scale).round() * scale).flatten(-2)
    return found if order is None else found[..., order.argsort()]


class StaticModel(nn.Module):
    """`forward(input_ids, position_ids, *caches) -> outputs of the head, *new caches`.

    Caches are those of layer 0, of layer 1, ...; see `Attention.forward`.
    """

    def __init__(self, config: ModelConfig, cache_lens: tuple[int, ...]) -> None:
        super().__init__()
        self.config = config
        self.cache_lens = cache_lens
        self.rounds_head: TokenRounding | None = None  # of a tied head; see `round_products`
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        if not config.tied_embeddings:
            self.output = head(config)
        for name, values in constants(config, cache_lens).items():
            self.register_buffer(name, torch.empty(values.shape, dtype=getattr(torch, str(values.dtype))))

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, *caches: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Compute the result of `finish` and the new caches.

        Ids and positions are (B, T), caches (B, n_kv_heads, W_i, width).
        """
        x, *shared = self.begin(input_ids, position_ids)
        lengths = distinct(self.cache_lens)
        masks = dict(zip(lengths, shared[: len(lengths)], strict=True))
        rotation = shared[len(lengths) :]
        present: list[torch.Tensor] = []
        each = len(caches) // len(self.layers)
        for i, block in enumerate(self.layers):
            x, *new = block(x, masks[self.cache_lens[i]], *rotation, *caches[each * i : each * (i + 1)])
            present += new
        return self.finish(x), *present

    def round_products(self, weights: Mapping[str, TokenRounding]) -> None:
        """Round the activations that are multiplied with these weights, as ONNX graphs with dynamic formats do.

        `weights` says how, by the name of the weight.
        """
        for name, rounded in weights.items():
            if name == "tok_embeddings.weight":
                self.rounds_head = rounded
            else:
                linear = self.get_submodule(name.removesuffix(".weight"))
                linear.register_forward_pre_hook(
                    lambda _, inputs, rounded=rounded: (rounded_tokens(inputs[0], rounded),)
                )

    def begin(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Compute the inputs of the layers, shared by all of them.

        They are the embeddings (B, T, dim), a mask (B, T, W + T) for each distinct W, ascending, cos and sin
        (B, 1, T, head_dim / 2) and, if queries are scaled, their factors (B, 1, T, 1).
        """
        c = self.config
        masks = [cache.visible(position_ids, self.get_buffer(slot_ages_name(w))) for w in distinct(self.cache_lens)]
        rotation = rope.rotation(position_ids, self.get_buffer("inv_freq"), attention_factor(c.rope_scaling))
        factors = (rope.query_factors(position_ids, c.query_scaling),) if c.query_scaling else ()
        return self.tok_embeddings(input_ids), *masks, *rotation, *factors

    def finish(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the outputs (B, T, n_outputs) from x (B, T, dim).

        If only the last token is sampled from, only its outputs (B, 1, n_outputs).
        """
        normed = self.norm(x if HEADS[self.config.head].every_token else x[:, -1:])
        if self.config.tied_embeddings:
            return functional.linear(
                rounded_tokens(normed, self.rounds_head) if self.rounds_head else normed, self.tok_embeddings.weight
            )
        outputs: torch.Tensor = self.output(normed)
        return outputs


def distinct(cache_lens: tuple[int, ...]) -> list[int]:
    """The different cache lengths, ascending."""
    return sorted(set(cache_lens))


def slot_ages_name(cache_len: int) -> str:
    """Name of the buffer that `cache.visible` needs for a cache of `cache_len` slots."""
    return f"slot_ages_{cache_len}"


def constants(config: ModelConfig, cache_lens: tuple[int, ...]) -> dict[str, NDArray[np.generic]]:
    """The small tensors that depend only on the configuration, by buffer name."""
    frequencies = rope.inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    values: dict[str, NDArray[np.generic]] = {"inv_freq": frequencies}
    for cache_len in distinct(cache_lens):
        values[slot_ages_name(cache_len)] = np.arange(cache_len, 0, -1, dtype=np.int64)
    return values
