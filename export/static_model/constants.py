"""Constants of the static model that the build stage checks the graphs against; apart from the model, which loads torch."""

MASKED_SCORE = (
    -1e30
)  # finite: a row with every key masked stays a number, where -inf would give NaN and spoil the cache
DYNAMIC_LEVELS = 127.0  # activations that are rounded go from -127 to 127 times their group's scale
SMALLEST_PEAK = 1e-30  # added to a group's largest activation, so that a group of zeros is not divided by zero; nothing beside any other
DYNAMIC_GROUP = 64  # activations that share a scale, unless weights have groups: outliers of a few channels coarsen only their neighbours
