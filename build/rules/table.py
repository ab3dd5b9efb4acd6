"""Every rule, by the last operation of its region."""

from build.rules.attention import rolling_attention
from build.rules.context import Rule
from build.rules.linear import linear, linear_with_residual, linear_with_swiglu
from build.rules.mixture import mixture
from build.rules.per_token import embedding, residual, rms_norm, rotation, scaled_rotation, swiglu

RULES: tuple[tuple[str, Rule], ...] = (  # in order: the first match wins
    ("reshape", rolling_attention),
    ("reshape", mixture),
    ("take", embedding),
    ("multiply", linear_with_swiglu),
    ("multiply", rms_norm),
    ("multiply", swiglu),
    ("multiply", scaled_rotation),
    ("add", linear_with_residual),
    ("add", residual),
    ("matmul", linear),
    ("cos", rotation),
    ("sin", rotation),
)
