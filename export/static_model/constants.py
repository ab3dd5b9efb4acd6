"""Constants of the static model that the build stage checks the graphs against.

They are kept apart from the model, which imports torch.
"""

# Finite: a row with every key masked stays a number, where -inf would give NaN and corrupt the cache.
MASKED_SCORE = -1e30
# Rounded activations range from -127 to 127 times their group's scale.
DYNAMIC_LEVELS = 127.0
# Added to a group's largest activation, so that a group of zeros is not divided by zero; negligible for other groups.
SMALLEST_PEAK = 1e-30
# Numbers of an int4 cache range from 0 to 15 times their group's scale, above its minimum.
CACHE_LEVELS = 15.0
# The least scale of such a group: the smallest number that float16 holds with all of its bits.
SMALLEST_STEP = 2.0**-14
# The largest number of an fp8 cache, e4m3's; what is larger is stored as this.
LARGEST_FLOAT8 = 448.0
