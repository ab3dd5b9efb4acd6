"""How a graph stores columns in a cache and reads them back, by the format of the cache."""

from collections.abc import Callable, Mapping

from build.rules.context import Context
from build.rules.dataflow import END, Expr, NoMatch, dtype, expect_constant, integer, shape
from build.rules.shared import expect_last_axis, levels_of
from export.static_model.constants import CACHE_LEVELS, DYNAMIC_LEVELS, LARGEST_FLOAT8, SMALLEST_STEP
from runtime.artifact.caches import FLOAT8, GROUP, HALF


def stored_columns(c: Context, value: Expr) -> tuple[tuple[Expr, ...], Expr]:
    """Trace shared columns to their caches, the tensors of one format, and to the new columns before storing."""
    call = c.dataflow.calls.get(value)
    name = getattr(getattr(call, "op", None), "name", "")
    return _MATCHERS.get(name, _as_they_are)(c, value)


def _as_they_are(c: Context, value: Expr) -> tuple[tuple[Expr, ...], Expr]:
    past, new = _appended(c, _columns(c, value))
    return (past,), _float8_source(c, new) if dtype(past) == FLOAT8 else c.dataflow.through(new, "astype")


def _float8_source(c: Context, new: Expr) -> Expr:
    """Match numbers that are rounded to e4m3, within its largest, and widened again; what they were rounded from."""
    p = c.dataflow
    (rounded,) = p.args(new, "astype")
    beyond, low, between = p.args(p.args(rounded, "astype")[0], "where")
    above, high, source = p.args(between, "where")
    compared_low, low_limit = p.args(beyond, "less")
    compared_high, high_limit = p.args(above, "greater")
    for found, sign in ((low, -1), (low_limit, -1), (high, 1), (high_limit, 1)):
        expect_constant(found, sign * LARGEST_FLOAT8)
    if dtype(rounded) != FLOAT8 or compared_low != between or compared_high != source:
        raise NoMatch("expected numbers to be rounded to e4m3 within its limits")
    return source


def _int8(c: Context, value: Expr) -> tuple[tuple[Expr, ...], Expr]:
    """Match numbers * scale, and what they were rounded from."""
    numbers, scales = (_columns(c, part) for part in c.dataflow.args(value, "multiply"))
    (past, new), (past_scale, scale) = _appended(c, numbers), _appended(c, scales)
    if dtype(past) != "int8":
        raise NoMatch(f"expected scales only with an int8 cache, found {dtype(past)}")
    return (past, past_scale), levels_of(c, _int8_source(c, new), scale, count=DYNAMIC_LEVELS)


def _int4(c: Context, value: Expr) -> tuple[tuple[Expr, ...], Expr]:
    """Match levels * scale + minimum in groups, with two levels in a byte, and what they were rounded from."""
    p = c.dataflow
    scaled, minima = p.args(p.args(value, "reshape")[0], "add")
    levels, scales = p.args(scaled, "multiply")
    low, high = p.concatenated(levels, len(shape(levels)) - 1)
    halves, above = p.args(low, "subtract")
    repeated, sixteen = p.args(above, "multiply")
    divided, of_sixteen = p.args(p.args(high, "floor")[0], "divide")
    expect_constant(sixteen, 16)
    expect_constant(of_sixteen, 16)
    if not (repeated == high and divided == halves and shape(halves)[-1] == HALF):
        raise NoMatch(f"expected the low and the high four bits of {HALF} bytes side by side")
    pairs = _columns(c, p.args(halves, "reshape")[0])
    scales, minima = (_columns(c, _of_groups(c, part)) for part in (scales, minima))
    (past, new), (past_scale, scale), (past_minimum, minimum) = (_appended(c, x) for x in (pairs, scales, minima))
    return (past, past_scale, past_minimum), _grouped_source(c, new, scale, minimum)


_MATCHERS: Mapping[str, Callable[[Context, Expr], tuple[tuple[Expr, ...], Expr]]] = {
    "relax.multiply": _int8,
    "relax.reshape": _int4,
}  # by the operation that ends a format's way back to numbers; other formats need none


def _of_groups(c: Context, value: Expr) -> Expr:
    """One number for each group, before it is shared by the group's neighbours."""
    source = c.dataflow.args(value, "expand_dims")[0]
    expect_last_axis(value, *c.dataflow.calls[value].attrs.axis)
    return source


def _grouped_source(c: Context, pairs: Expr, scale: Expr, minimum: Expr) -> Expr:
    """The columns that new pairs of levels, with their groups' scales and minima, were rounded from."""
    p = c.dataflow
    low, shifted = p.args(_uint8_source(c, p.args(pairs, "reshape")[0]), "add")
    high, sixteen = p.args(shifted, "multiply")
    levels = p.sliced(low, 4, 0, HALF)
    fits, above, highest = p.args(levels, "where")
    compared, limit = p.args(fits, "less")
    differences, steps = p.args(p.args(p.args(above, "nn.relu")[0], "round")[0], "divide")
    groups, base = p.args(differences, "subtract")
    own_scale, own_minimum = (p.args(part, "reshape")[0] for part in (scale, minimum))
    for found, expected in ((sixteen, 16), (highest, CACHE_LEVELS), (limit, CACHE_LEVELS)):
        expect_constant(found, expected)
    if not (
        p.sliced(high, 4, HALF, END) == levels
        and compared == above
        and p.args(steps, "astype")[0] == own_scale
        and p.args(base, "astype")[0] == own_minimum
        and _extreme(c, p.args(own_minimum, "astype")[0], "min") == groups
        and _ranged_source(c, p.args(own_scale, "astype")[0], base) == groups
        and shape(groups)[-1] == GROUP
    ):
        raise NoMatch(f"expected groups of {GROUP} to be rounded with their own scale and minimum")
    return p.args(groups, "reshape")[0]


def _ranged_source(c: Context, step: Expr, base: Expr) -> Expr:
    """The groups whose range above `base` gives a step, (max - base) / levels but no less than the smallest one."""
    p = c.dataflow
    enough, wanted, smallest = p.args(step, "where")
    compared, limit = p.args(enough, "greater")
    span, levels = p.args(wanted, "divide")
    largest, subtracted = p.args(span, "subtract")
    for found, expected in ((smallest, SMALLEST_STEP), (limit, SMALLEST_STEP), (levels, CACHE_LEVELS)):
        expect_constant(found, expected)
    if compared != wanted or subtracted != base:
        raise NoMatch("expected the range of each group to be divided into its levels")
    return _extreme(c, largest, "max")


def _extreme(c: Context, value: Expr, op: str) -> Expr:
    """What `value` is the least or largest of, along the last axis, which is kept."""
    (source,) = c.dataflow.args(value, op)
    attributes = c.dataflow.calls[value].attrs
    expect_last_axis(source, *attributes.axis)
    if not attributes.keepdims:
        raise NoMatch("expected an axis that is kept")
    return source


def _columns(c: Context, value: Expr) -> Expr:
    """The cache columns behind a view that shares them by broadcasting, perhaps widened from the cache's dtype."""
    shared = c.dataflow.through(value, "astype")
    columns = c.dataflow.args(shared, "expand_dims")[0]
    axes = [integer(axis) for axis in c.dataflow.calls[shared].attrs.axis]
    if axes != [2]:
        raise NoMatch(f"expected cache columns that each group of heads shares (a new axis 2), found axis {axes}")
    return columns


def _int8_source(c: Context, value: Expr) -> Expr:
    """The source of a conversion to int8: the low 8 bits are taken with their sign."""
    p = c.dataflow
    negative, shifted, low = p.args(p.args(value, "astype")[0], "where")
    compared, half = p.args(negative, "greater_equal")
    subtracted, whole = p.args(shifted, "subtract")
    for found, expected in ((half, 128), (p.args(whole, "add")[0], 255), (p.args(whole, "add")[1], 1)):
        expect_constant(found, expected)
    if not compared == subtracted == low:
        raise NoMatch("expected a conversion to int8")
    return _low_bits_source(c, low)


def _uint8_source(c: Context, value: Expr) -> Expr:
    """The source of a conversion to uint8."""
    return _low_bits_source(c, c.dataflow.args(value, "astype")[0])


def _low_bits_source(c: Context, low: Expr) -> Expr:
    """The source of the low 8 bits, as the importer spells out conversions: what is not finite becomes 0."""
    p = c.dataflow
    bits, mask = p.args(low, "bitwise_and")
    broken, zero, source = p.args(p.args(bits, "astype")[0], "where")
    expect_constant(mask, 255)
    expect_constant(zero, 0)
    if p.args(p.args(broken, "logical_not")[0], "isfinite")[0] != source:
        raise NoMatch("expected a conversion to 8 bits")
    return source


def _appended(c: Context, columns: Expr) -> tuple[Expr, Expr]:
    """Match concat(past, new) along the slots; returns past and new.

    Checks that the graph's new cache is exactly the last W columns of the result, as which past and new may have been
    widened.
    """
    joined, new = c.dataflow.concatenated(columns, 2)
    past = c.dataflow.through(joined, "astype")
    name = c.input_name(past)
    present = c.dataflow.through(c.present.get(past), "astype")
    if present is None or c.dataflow.sliced(present, 2, shape(new)[2], END) != columns:
        raise NoMatch(f"expected {name} to be rolled by {shape(new)[2]}")
    if dtype(joined) != dtype(past) and (dtype(past), dtype(joined)) != (FLOAT8, "float32"):
        raise NoMatch(f"expected {name} to be appended to as {dtype(past)}, found {dtype(joined)}")
    return past, new
