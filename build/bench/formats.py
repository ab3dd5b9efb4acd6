"""How the CPU's kernels find the matrices of the schemes that are compared."""

from export.weights.format import Storage

FORMATS = {
    "float32": Storage(dtype="float32"),
    "bfloat16": Storage(dtype="bfloat16"),
    "bf16_dot": Storage(dtype="bfloat16", rounding="bfloat16"),
    "float16": Storage(dtype="float16"),
    "int8": Storage(dtype="int8"),
    "int8_dynamic": Storage(dtype="int8", rounding="int8"),
    "int4": Storage(dtype="int4", group_size=32),
    "int4_dynamic": Storage(dtype="int4", group_size=32, rounding="int8"),
    "int4_int16": Storage(dtype="int4", group_size=32, rounding="int16"),
}
