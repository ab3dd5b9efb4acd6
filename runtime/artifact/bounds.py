"""How far apart two correct implementations of one model may be, from the arithmetic alone."""

from math import log, sqrt

from runtime.artifact.caches import CACHE_FORMATS
from runtime.artifact.manifest import ModelConfig
from runtime.artifact.schemes import ROUNDING_LEVELS, Rounding
from runtime.artifact.targets import CacheDType

BFLOAT16_ROUNDOFF = 2.0**-8
SUMS_PER_LAYER = 8  # two norms, wqkv, scores, mixed values, wo, w13, w2


def relative_bound(model: ModelConfig, cache_len: int, dtype: CacheDType, rounding: Rounding = "none") -> float:
    """How far apart two orders of the same arithmetic may end up: a bound on max |a - b| / max |b| over the logits.

    A float32 sum of K terms is off by about sqrt(K) u, u = 2**-24 (Higham and Mary, "A new approach to probabilistic
    rounding error analysis", 2019); the errors of the `SUMS_PER_LAYER` sums of each layer, the final norm and the head
    add up. Values that are stored narrower than float32 between the sums are rounded once more for each sum,
    independently, with that type's own u. A CPU multiplies int8 and int4 caches by queries and shares of 16 bits,
    whose u, 2**-16, is nothing beside the cache's own. Both sides err, hence the factor 2. If activations are rounded,
    a difference in the last bit can put one on either side of a half, which adds half a level for each sum: see
    `_half_level`.
    """
    sums = SUMS_PER_LAYER * model.n_layers + 2
    terms = max(model.dim, model.hidden_dim, model.n_heads * model.head_dim, *model.cache_lens(cache_len))
    bound = sums * sqrt(terms) * CACHE_FORMATS["fp32"].unit_roundoff
    if dtype != "fp32":
        bound += sqrt(sums) * CACHE_FORMATS[dtype].unit_roundoff
    if rounding != "none":
        bound += sqrt(sums) * _half_level(rounding, bound, terms)
    return 2 * bound


def _half_level(rounding: Rounding, drift: float, terms: int) -> float:
    """Half a level of rounded activations, in proportion to a sum of `terms` products.

    A level is measured by the largest number of a group. If a single number of a sum is on the other side of a half,
    that is also how much the sum is off. Levels of 16 bits are so narrow that the `drift` of float32 puts a good part
    of all numbers there, drift / level of them at most: their errors add up as the products themselves do, of which
    each has the size of the root mean square, and the largest of K normal numbers is about sqrt(2 ln K) times that.

    A level of bfloat16 is measured by the number itself, so that no number on the other side, nor all of them, takes a
    sum further off than half a level of the sum.
    """
    if rounding not in ROUNDING_LEVELS:
        return BFLOAT16_ROUNDOFF
    level = 0.5 / ROUNDING_LEVELS[rounding]
    crossing = min(drift / level, 1.0)
    return level * max(1.0, sqrt(2 * log(terms) * crossing))
