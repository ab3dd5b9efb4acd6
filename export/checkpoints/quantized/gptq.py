"""Reads GPTQ: numbers of 2, 3, 4 or 8 bits, packed along the columns of a matrix, as AutoGPTQ and GPTQModel write them.

qweight  int32 (K * bits / 32, N)  the numbers, those of the first columns in the lowest bits
qzeros   int32 (groups, N * bits / 32)  zero points; in the format `gptq`, one is stored as the number below it
scales   (groups, N)
g_idx    int32 (K,)  the group of each column; may be absent where groups are neighbours

A weight is scale * (number - zero point): `forward` in auto_gptq/nn_modules/qlinear/qlinear_cuda.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import msgspec
import numpy as np
from numpy.typing import NDArray

from export.checkpoints.json_files import convert
from export.checkpoints.quantized.affine import ZeroPoints, affine_matrix, order_of
from export.checkpoints.quantized.matrix import Found, QuantizedMatrix
from export.checkpoints.quantized.module import ALL, FLOATS, WORDS, Module, modules, unpacked
from export.checkpoints.source import Array, TensorSource
from runtime.errors import UserError

BITS = (2, 3, 4, 8)
WORD = 32  # bits
ZERO_POINT_ADDED = {"gptq": 1, "gptq_v2": 0}  # by the format, to a stored zero point
EXCLUDED = "-:"  # how keys of `dynamic` begin that name modules which are not quantized
TENSORS = ("qweight", "qzeros", "scales", "g_idx")


class _Settings(msgspec.Struct, frozen=True):
    bits: int
    group_size: Annotated[int, msgspec.Meta(ge=-1)]
    checkpoint_format: str | None = None
    format: str | None = None  # what later versions call it
    is_marlin_format: bool = False
    dynamic: dict[str, object] | None = None


def read_gptq(source: TensorSource, settings: Mapping[str, object], where: str) -> Found:
    """The matrices that a source stores as GPTQ does; raises `UserError` for what does not fit together."""
    found = list(modules(source, where, "qweight"))
    if not found:
        return Found()
    said = convert(settings, _Settings, f"{where}, quantization of gptq")
    kind = "marlin" if said.is_marlin_format else (said.checkpoint_format or said.format or "gptq").lower()
    if kind not in ZERO_POINT_ADDED:
        raise UserError(
            f"{where} has a GPTQ checkpoint of the format {kind!r}, expected one of {', '.join(ZERO_POINT_ADDED)}; "
            "set frontend.checkpoint to a checkpoint in one of these"
        )
    if said.bits not in BITS:
        raise UserError(f"{where} has a GPTQ checkpoint of {said.bits} bits, expected one of {BITS}")
    differing = [key for key in said.dynamic or () if not key.startswith(EXCLUDED)]
    if differing:
        raise UserError(
            f"{where} has a GPTQ checkpoint with settings of their own for modules that match {differing[0]!r}, "
            "expected one setting for all; set frontend.checkpoint to another checkpoint of the model"
        )
    storages = [GptqStorage(module, said.bits, ZERO_POINT_ADDED[kind]) for module in found]
    matrices = {storage.module.matrix: _matrix(storage, said.group_size) for storage in storages}
    return Found(matrices, notes=_notes_on_wrapped(storages))


@dataclass(frozen=True)
class GptqStorage:
    """Reads the tensors of one matrix."""

    module: Module
    bits: int
    zero_point_added: int

    @property
    def shape(self) -> tuple[int, int]:
        """The matrix's (N, K)."""
        words, n = self.module.source.tensors[self.module.of("qweight")].shape
        return n, words * WORD // self.bits

    def numbers(self, rows: slice) -> NDArray[np.uint8]:
        """As `AffineStorage` says."""
        n, k = self.shape
        start, stop, _ = rows.indices(n)
        return unpacked(self.module.columns("qweight", start, stop).T, self.bits, k)

    def scales(self, rows: slice) -> Array:
        """As `AffineStorage` says."""
        start, stop, _ = rows.indices(self.shape[0])
        return self.module.columns("scales", start, stop).T

    def zero_points(self, rows: slice) -> ZeroPoints:
        """As `AffineStorage` says; reads all, which are a small part of the matrix."""
        stored = unpacked(self.module.read("qzeros"), self.bits, self.shape[0])[:, rows]
        return stored.T.astype(np.int16) + np.int16(self.zero_point_added)


def _matrix(storage: GptqStorage, group_size: int) -> QuantizedMatrix:
    module, bits = storage.module, storage.bits
    words = module.need("qweight", WORDS)[0]
    n, k = storage.shape
    if words * WORD % bits or n * bits % WORD:
        module.refuse("qweight", module.source.tensors[module.of("qweight")], f"whole words of {bits}-bit numbers")
    size = k if group_size == -1 else group_size
    groups = module.check_groups(k, size)
    module.check("scales", FLOATS, (groups, n), f"{groups} groups of {n} rows")
    module.check("qzeros", WORDS, (groups, n * bits // WORD), f"zero points of {bits} bits for {groups} groups")
    return affine_matrix(
        module,
        f"GPTQ {bits}-bit",
        (n, k),
        storage,
        bits=bits,
        group_size=size,
        scale="scales",
        stored=module.present(*TENSORS),
        order=order_of(module, "g_idx", k, size),
    )


def _notes_on_wrapped(storages: list[GptqStorage]) -> tuple[str, ...]:
    """A note if a zero point is 2 ** bits.

    Writers that take 1 from a zero point of 0 store the largest number, and do not agree on what becomes of its
    neighbours.
    """
    wrapped = [s.module.of("qzeros") for s in storages if (s.zero_points(ALL) == 2**s.bits).any()]
    if not wrapped:
        return ()
    more = f" and {len(wrapped) - 1} more" if len(wrapped) > 1 else ""
    return (
        f"{wrapped[0]}{more} has zero points whose stored bits are all ones; they are read as {2 ** storages[0].bits}, "
        "as AutoGPTQ does, but a writer may have meant 0: compare the answers with those of the software that wrote it",
    )
