"""Arguments of kernels that are more than a few numbers, the same for every target."""

from dataclasses import dataclass


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
