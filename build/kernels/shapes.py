"""Arguments of kernels that are more than a few numbers, the same for every target."""

from dataclasses import dataclass
from math import prod

from export.weights.format import Storage
from export.weights.table import format_of, panel_layout

RING_BLOCK = 16  # slots of a cache whose keys lie together, so that neighbouring numbers belong to neighbouring slots


def ring_block(cache_len: int) -> int:
    """Slots of a block of a ring of keys: a power of two that divides the ring."""
    return next(n for n in (RING_BLOCK, 8, 4, 2, 1) if cache_len % n == 0)


@dataclass(frozen=True)
class Linear:
    """Shapes of one matrix product and what is computed in the same launch."""

    lead: tuple[int, ...]  # of y: batch and tokens
    n: int
    k: int
    weight: Storage
    last_of: int | None = None  # tokens of each sequence in x, of which only the last is multiplied
    norm_eps: float | None = None  # RMSNorm of x in front
    swiglu: bool = False  # silu(first half of the outputs) * second half
    residual: bool = False  # added at the end

    @property
    def rows(self) -> int:
        """Rows of y."""
        return prod(self.lead)

    @property
    def x_lead(self) -> tuple[int, ...]:
        """Leading dimensions of x."""
        return self.lead if self.last_of is None else (self.lead[0], self.last_of)

    @property
    def x_rows(self) -> int:
        """Rows of x."""
        return prod(self.x_lead)

    def x_row(self, row: int) -> int:
        """The row of x that row `row` of y is made of; takes a TIR expression too."""
        return row if self.last_of is None else row * self.last_of + self.last_of - 1

    @property
    def n_out(self) -> int:
        """Columns of y."""
        return self.n // 2 if self.swiglu else self.n


@dataclass(frozen=True)
class Embedding:
    """Shapes of a gather of rows."""

    lead: tuple[int, ...]
    n: int  # the vocabulary
    k: int
    weight: Storage

    @property
    def rows(self) -> int:
        """Tokens."""
        return prod(self.lead)


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


MIXTURE_SCRATCH = {
    "chosen": "int32",  # the expert of each pair
    "share": "float32",  # and its weight in the token's sum
    "count": "int32",  # pairs of each expert
    "members": "int32",  # which pairs these are, in order
    "both": "float32",  # w13 x
    "gated": "float32",  # silu(w1 x) * w3 x
    "mixed": "float32",  # w2 of that
}


@dataclass(frozen=True)
class Mixture:
    """Shapes of one layer's mixture of experts in one graph."""

    lead: tuple[int, ...]  # batch and tokens
    dim: int
    hidden_dim: int
    n_experts: int
    experts_per_token: int
    weight: Storage

    @property
    def weight_dtype(self) -> str:
        """Of the packed panels."""
        return panel_layout(self.weight, self.dim, self.dim).dtype

    @property
    def scaled(self) -> bool:
        """Whether a scale per output channel of each expert goes with the weights."""
        return format_of(self.weight).scaled

    @property
    def tokens(self) -> int:
        """Rows of one call."""
        return prod(self.lead)

    @property
    def pairs(self) -> int:
        """Tokens times experts of each: pair i * experts_per_token + j is token i with its j-th best expert."""
        return self.tokens * self.experts_per_token

    @property
    def scratch(self) -> tuple[tuple[tuple[int, ...], str], ...]:
        """What a kernel keeps between its steps, in the order of its last parameters; see `MIXTURE_SCRATCH`."""
        sizes = {
            "chosen": (self.pairs,),
            "share": (self.pairs,),
            "count": (self.n_experts,),
            "members": (self.n_experts, self.pairs),
            "both": (self.pairs, 2 * self.hidden_dim),
            "gated": (self.pairs, self.hidden_dim),
            "mixed": (self.pairs, self.dim),
        }
        return tuple((sizes[name], dtype) for name, dtype in MIXTURE_SCRATCH.items())
