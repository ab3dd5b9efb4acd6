"""Matrices rounded and packed as the software of each quantization format stores them.

Every function also returns the floats that the matrix means by the format's public definition, computed from numbers
that were never packed. Nothing here calls the project's code.
"""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, Any]
Tensors = dict[str, torch.Tensor]
Packed = tuple[Tensors, Array]  # the tensors of a module by the endings of their names, and the floats that they mean
LARGEST_E4M3 = 448.0
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
FP4 = [0.0, 0.0052083333, 0.6666667, 1.0, 0.3333333, 0.5, 0.1666667, 0.25]  # and the same, negative
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
AWQ_ROWS = (0, 2, 4, 6, 1, 3, 5, 7)  # of the nibbles of a word, from the lowest


@dataclass(frozen=True)
class Rounded:
    """A matrix as whole numbers (N, K) without a sign, scales and zero points (N, groups), and each column's group."""

    numbers: Array
    scales: torch.Tensor
    zero_points: Array
    group: Array

    @property
    def exact(self) -> Array:
        """scale * (number - zero point), in float32."""
        scales = self.scales.float().numpy()[:, self.group]
        return scales * (self.numbers.astype(np.float32) - self.zero_points.astype(np.float32)[:, self.group])


def rounded(weight: Array, bits: int, size: int, *, symmetric: bool, dtype: torch.dtype, group: Array) -> Rounded:
    """Round to nearest, each group on its own scale; zero points are at least 1, as GPTQ's first format needs."""
    groups = weight.shape[1] // size
    columns = [np.flatnonzero(group == g) for g in range(groups)]
    low = np.stack([np.minimum(weight[:, c].min(axis=1), 0) for c in columns], axis=1)
    high = np.stack([np.maximum(weight[:, c].max(axis=1), 0) for c in columns], axis=1)
    top = 2**bits - 1
    if symmetric:
        scales = torch.from_numpy(np.maximum(high, -low) / (top / 2)).to(dtype)
        zero_points = np.full(low.shape, 2 ** (bits - 1))
    else:
        scales = torch.from_numpy((high - low) / top).to(dtype)
        zero_points = np.clip(np.rint(-low / scales.float().numpy()), 1, top)
    each = scales.float().numpy()[:, group]
    numbers = np.clip(np.rint(weight / each) + zero_points[:, group], 0, top).astype(np.uint32)
    return Rounded(numbers, scales, zero_points.astype(np.uint32), group)


def neighbours(columns: int, size: int) -> Array:
    """The group of each column where groups are neighbours."""
    return np.arange(columns) // size


def shuffled(module: str, columns: int, size: int) -> Array:
    """The group of each column in a random order, one for all matrices with the same input."""
    alike = {"q_proj": 1, "k_proj": 1, "v_proj": 1, "o_proj": 2, "gate_proj": 3, "up_proj": 3, "down_proj": 4}
    rng = np.random.default_rng(alike.get(module.rpartition(".")[2], 5))
    return rng.permutation(neighbours(columns, size))


def words(numbers: Array, bits: int) -> torch.Tensor:
    """Numbers (n, count) in int32 words (n, count * bits / 32), the first in the lowest bits."""
    if 32 % bits:
        rows = [sum(int(v) << (bits * i) for i, v in enumerate(row)) for row in numbers]
        size = numbers.shape[1] * bits // 8
        data = b"".join(row.to_bytes(size, "little") for row in rows)
        return torch.from_numpy(np.frombuffer(data, np.int32).reshape(len(numbers), -1).copy())
    per = 32 // bits
    padded = np.pad(numbers.astype(np.uint32), ((0, 0), (0, -numbers.shape[1] % per)))
    result = np.zeros((len(numbers), padded.shape[1] // per), np.uint32)
    for j in range(per):
        result |= padded[:, j::per] << np.uint32(bits * j)
    return torch.from_numpy(result.view(np.int32))


def gptq(
    module: str, weight: Array, bits: int = 4, size: int = 32, *, symmetric: bool = True, version: int = 1,
    act_order: bool = False, dtype: torch.dtype = torch.float16,
) -> Packed:  # fmt: skip
    """AutoGPTQ's layout; version 2 stores zero points as they are."""
    k = weight.shape[1]
    size = k if size == -1 else size
    group = shuffled(module, k, size) if act_order else neighbours(k, size)
    found = rounded(weight, bits, size, symmetric=symmetric, dtype=dtype, group=group)
    zero_points = found.zero_points - (1 if version == 1 else 0)
    return {
        "qweight": words(found.numbers, bits).T,
        "qzeros": words(zero_points.T, bits),
        "scales": found.scales.T,
        "g_idx": torch.from_numpy(group.astype(np.int32)),
        "bias": torch.zeros(len(weight), dtype=torch.float16),
    }, found.exact


def awq(_module: str, weight: Array, size: int = 32) -> Packed:
    """AutoAWQ's layout `gemm`."""
    k = weight.shape[1]
    size = k if size == -1 else size
    found = rounded(weight, 4, size, symmetric=False, dtype=torch.float16, group=neighbours(k, size))

    def pack(columns: Array) -> torch.Tensor:
        return words(columns.reshape(len(columns), -1, 8)[:, :, AWQ_ROWS].reshape(columns.shape), 4)

    return {
        "qweight": pack(found.numbers.T), "qzeros": pack(found.zero_points.T), "scales": found.scales.T,
    }, found.exact  # fmt: skip


def compressed(
    module: str, weight: Array, bits: int = 4, size: int = 32, *, symmetric: bool = True, act_order: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Packed:  # fmt: skip
    """compressed-tensors' layout `pack-quantized`."""
    n, k = weight.shape
    size = k if size == -1 else size
    group = shuffled(module, k, size) if act_order else neighbours(k, size)
    found = rounded(weight, bits, size, symmetric=symmetric, dtype=dtype, group=group)
    tensors = {
        "weight_packed": words(found.numbers, bits),
        "weight_scale": found.scales,
        "weight_shape": torch.tensor([n, k]),
    }
    if not symmetric:
        tensors["weight_zero_point"] = words(found.zero_points.T, bits).T
    if act_order:
        tensors["weight_g_idx"] = torch.from_numpy(group.astype(np.int32))
    return tensors, found.exact


def compressed_int8(_module: str, weight: Array, size: int = -1, *, symmetric: bool = True) -> Packed:
    """compressed-tensors' layout `int-quantized`."""
    k = weight.shape[1]
    size = k if size == -1 else size
    found = rounded(weight, 8, size, symmetric=symmetric, dtype=torch.bfloat16, group=neighbours(k, size))
    signed = torch.from_numpy(found.numbers.astype(np.int64) - 128).to(torch.int8)
    tensors = {"weight": signed, "weight_scale": found.scales}
    if not symmetric:
        zero_points = torch.from_numpy(found.zero_points.astype(np.int64) - 128).to(torch.int8)
        tensors["weight_zero_point"] = zero_points
    return tensors, found.exact


def float8(
    _module: str, weight: Array, block: tuple[int, int] | None = (32, 32), *, ending: str = "weight_scale_inv",
    dtype: torch.dtype = torch.float32, activations: bool = False,
) -> Packed:  # fmt: skip
    """e4m3 with a scale for each block, of which the last may be cut short; block None: one for the matrix."""
    n, k = weight.shape
    height, width = block or (n, k)
    rows, columns = np.arange(n) // height, np.arange(k) // width
    grid = np.zeros((rows[-1] + 1, columns[-1] + 1), np.float32)
    np.maximum.at(grid, (rows[:, None], columns[None, :]), np.abs(weight))
    scale = (torch.from_numpy(grid) / LARGEST_E4M3).to(dtype)
    each = scale.float().numpy()[rows][:, columns]
    numbers = torch.from_numpy(weight / each).clamp(-LARGEST_E4M3, LARGEST_E4M3).to(torch.float8_e4m3fn)
    tensors = {"weight": numbers, ending: scale if block else scale.reshape(())}
    if activations:
        tensors["input_scale"] = torch.tensor(1.5)
    return tensors, numbers.float().numpy() * each


def float4(_module: str, weight: Array, size: int = 16) -> Packed:
    """compressed-tensors' NVFP4 in groups of 16, MXFP4 in groups of 32."""
    largest = np.abs(weight).reshape(len(weight), -1, size).max(axis=2)
    tensors = {}
    if size == 16:
        overall = np.float32(LARGEST_E4M3 * 6 / np.abs(weight).max())
        stored = torch.from_numpy(largest / 6 * overall).to(torch.float8_e4m3fn)
        tensors["weight_global_scale"] = torch.from_numpy(np.array([overall]))
        scale = stored.float().numpy() / overall
    else:
        exponent = np.floor(np.log2(largest / 4)).astype(np.int64)
        stored = torch.from_numpy((exponent + 127).astype(np.uint8))
        scale = (2.0**exponent).astype(np.float32)
    each = np.repeat(scale, size, axis=1)
    bits = np.abs(weight[:, :, None] / np.maximum(each, 1e-30)[:, :, None] - E2M1).argmin(axis=2).astype(np.uint8)
    tensors |= {"weight_packed": torch.from_numpy(bits[:, ::2] | bits[:, 1::2] << 4), "weight_scale": stored}
    return tensors, E2M1[bits] * each


def bitsandbytes_int8(_module: str, weight: Array) -> Packed:
    """LLM.int8."""
    largest = np.abs(weight).max(axis=1)
    numbers = np.rint(weight / largest[:, None] * 127).astype(np.int8)
    tensors = {
        "weight": torch.from_numpy(numbers), "SCB": torch.from_numpy(largest),
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }  # fmt: skip
    return tensors, numbers.astype(np.float32) * (largest / np.float32(127))[:, None]


def bitsandbytes_4bit(
    _module: str, weight: Array, kind: str = "nf4", size: int = 64, *, nested: bool = False, dtype: str = "bfloat16"
) -> Packed:
    """NF4 or FP4, with scales in 8 bits if `nested`."""
    table = np.array(NF4 if kind == "nf4" else [*FP4, *(-v for v in FP4)], np.float32)
    blocks = weight.reshape(-1, size)
    scales = np.abs(blocks).max(axis=1)
    tensors = {"weight.quant_map": torch.from_numpy(table)}
    state: dict[str, Any] = {"quant_type": kind, "blocksize": size, "dtype": dtype, "shape": weight.shape}
    if nested:
        offset = np.float32(scales.mean())
        of_scales = np.linspace(-1, 1, 256, dtype=np.float32)
        second = np.repeat(
            np.array([np.abs(part).max() for part in np.split(scales - offset, range(256, len(scales), 256))]), 256
        )[: len(scales)]
        stored = np.abs((scales - offset)[:, None] / second[:, None] - of_scales).argmin(axis=1).astype(np.uint8)
        scales = of_scales[stored] * second + offset
        tensors |= {
            "weight.absmax": torch.from_numpy(stored), "weight.nested_absmax": torch.from_numpy(second[::256].copy()),
            "weight.nested_quant_map": torch.from_numpy(of_scales),
        }  # fmt: skip
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(offset)}
    else:
        tensors["weight.absmax"] = torch.from_numpy(scales)
    numbers = np.abs(blocks[:, :, None] / scales[:, None, None] - table).argmin(axis=2).astype(np.uint8)
    flat = numbers.reshape(-1, 2)
    tensors["weight"] = torch.from_numpy(flat[:, :1] << 4 | flat[:, 1:])
    tensors[f"weight.quant_state.bitsandbytes__{kind}"] = torch.frombuffer(
        bytearray(json.dumps(state).encode()), dtype=torch.uint8
    )
    exact = torch.from_numpy(table[numbers] * scales[:, None]).to(getattr(torch, dtype)).float()
    return tensors, exact.numpy().reshape(weight.shape)


def mlx(_module: str, weight: Array, bits: int = 4, size: int = 64) -> Packed:
    """MLX's affine layout."""
    grouped = weight.reshape(len(weight), -1, size)
    low, high = grouped.min(axis=2), grouped.max(axis=2)
    scales = torch.from_numpy((high - low) / (2**bits - 1)).half()
    biases = torch.from_numpy(low).half()
    s, b = (np.repeat(t.float().numpy(), size, axis=1) for t in (scales, biases))
    numbers = np.clip(np.rint((weight - b) / s), 0, 2**bits - 1).astype(np.uint32)
    packed = words(numbers, bits).view(torch.uint32)
    return {"weight": packed, "scales": scales, "biases": biases}, s * numbers.astype(np.float32) + b
