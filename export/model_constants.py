"""Constants of the static model that the build stage checks the graphs against; apart from the model, which loads torch."""

MASKED_SCORE = -1e30  # finite: a row with every key masked stays a number, where -inf would give NaN and spoil the cache
