"""Structured kernel arguments (shapes and options), the same for every target."""

from dataclasses import dataclass
from math import prod

from export.weights.format import Storage
from export.weights.table import format_of, panel_layout
from runtime.artifact.caches import CacheFormat, cache_format
from runtime.artifact.rotary import QueryScaling
from runtime.artifact.tensor_file import bits_dtype


@dataclass(frozen=True)
class Linear:
    """Shapes of one matrix product and of the work fused into the same launch."""

    lead: tuple[int, ...]  # leading dimensions of y: rows and tokens
    n: int
    k: int
    weight: Storage
    one_of: int | None = None  # tokens in x, where only the one at an index, `column`, is multiplied
    norm_eps: float | None = None  # RMSNorm applied to x first
    swiglu: bool = False  # silu(first half of the outputs) * second half
    residual: bool = False  # added at the end

    @property
    def rows(self) -> int:
        """Number of rows of y."""
        return prod(self.lead)

    @property
    def x_lead(self) -> tuple[int, ...]:
        """Leading dimensions of x."""
        return self.lead if self.one_of is None else (1, self.one_of)

    @property
    def n_out(self) -> int:
        """Number of columns of y."""
        return self.n // 2 if self.swiglu else self.n


@dataclass(frozen=True)
class Embedding:
    """Shapes of an embedding lookup: a gather of rows."""

    lead: tuple[int, ...]
    n: int  # vocabulary size
    k: int
    weight: Storage

    @property
    def rows(self) -> int:
        """Number of tokens, one row each."""
        return prod(self.lead)


@dataclass(frozen=True)
class RollingAttention:
    """Shapes of one layer's attention in one function."""

    rows: int  # of a step, one token each; or one, of several tokens
    tokens: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    slots: int  # sequences whose columns the rings hold
    window: int  # positions that a query sees, its own among them
    ring_len: int  # columns of one sequence
    cache_dtype: str  # of the numbers in the rings
    scale: float
    query_scaling: QueryScaling | None = None

    @property
    def qkv_dim(self) -> int:
        """Width of the stacked query, key and value projections."""
        return (self.n_heads + 2 * self.n_kv_heads) * self.head_dim

    @property
    def stored(self) -> CacheFormat:
        """How a column of the rings is stored."""
        return cache_format(self.cache_dtype)

    @property
    def element_dtype(self) -> str:
        """Dtype in which kernels take the numbers in the rings: of 8-bit floats, that of their bits."""
        return str(bits_dtype(self.cache_dtype))


MIXTURE_SCRATCH = {
    "chosen": "int32",  # expert of each pair
    "share": "float32",  # weight of that expert in the token's sum
    "count": "int32",  # number of pairs of each expert
    "members": "int32",  # the pairs of each expert, in order
    "both": "float32",  # w13 x
    "gated": "float32",  # silu(w1 x) * w3 x
    "mixed": "float32",  # w2 gated
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
        """Dtype of the packed panels."""
        return panel_layout(self.weight, self.dim, self.dim).dtype

    @property
    def scaled(self) -> bool:
        """Whether the weights come with a scale per output channel of each expert."""
        return format_of(self.weight).scaled

    @property
    def tokens(self) -> int:
        """Number of tokens in one call, one row each."""
        return prod(self.lead)

    @property
    def pairs(self) -> int:
        """Number of (token, expert) pairs; pair i * experts_per_token + j is token i with its j-th best expert."""
        return self.tokens * self.experts_per_token

    @property
    def scratch(self) -> tuple[tuple[tuple[int, ...], str], ...]:
        """Shapes and dtypes of tensors kept between steps, ordered as the last parameters; see `MIXTURE_SCRATCH`."""
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
