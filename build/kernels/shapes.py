"""Arguments of kernels that are more than a few numbers, the same for every target."""

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class RollingAttention:
    """Shapes of one layer's attention in one graph."""

    batch: int
    tokens: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    cache_len: int  # W: slots of the ring, and the window
    cache_dtype: str
    scale: float

    @property
    def qkv_dim(self) -> int:
        """Width of the stacked projections."""
        return (self.n_heads + 2 * self.n_kv_heads) * self.head_dim


@dataclass(frozen=True)
class Mixture:
    """Shapes of one layer's mixture of experts in one graph."""

    lead: tuple[int, ...]  # batch and tokens
    dim: int
    hidden_dim: int
    n_experts: int
    experts_per_token: int
    weight_dtype: str
    scaled: bool  # a scale per output channel of each expert goes with the weights

    @property
    def tokens(self) -> int:
        """Rows of one call."""
        return prod(self.lead)
