"""The choice of a storage for each tensor of a model: what a `quantize.scheme` means for it.

A new scheme is a row of `runtime.artifact.schemes.SCHEMES`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from msgspec.structs import replace

from export.checkpoints.encodings.encoding import Encoding
from export.checkpoints.tensor_layout import EMBEDDINGS, HEAD_WEIGHT
from export.weights.encoded import carried_storage
from export.weights.format import Format, ModelTensor, Storage
from export.weights.int8 import INT8
from export.weights.table import EXPERTS, FORMATS, format_of
from runtime.artifact.manifest import DType, Quantization
from runtime.artifact.schemes import SCHEMES, Rounding, Scheme, SchemeName

PRECISE = Storage(dtype="float32")
ROUNDED = Storage(dtype="int8")  # used where a narrower format does not fit
ROUTER = ".feed_forward.gate.weight"
HEAD_WEIGHTS = (HEAD_WEIGHT, EMBEDDINGS)  # the second if embeddings are tied


@dataclass(frozen=True)
class QuantizedSource:
    """What a checkpoint stores for one of our tensors that it has quantized."""

    packings: tuple[str, ...]  # the formats of its parts, by the names that their users know
    encoding: Encoding | None  # in which it can be carried; None: no encoding of ours holds its values


@dataclass(frozen=True)
class StorageRules:
    """How each tensor of one model is stored."""

    quantization: Quantization
    dtype: DType  # of matrices to which no scheme applies
    tied_embeddings: bool
    n_layers: int
    sources: Mapping[str, QuantizedSource] = field(default_factory=dict)  # by our names

    def tensor(self, name: str, shape: tuple[int, ...]) -> ModelTensor:
        """A tensor with its storage."""
        if len(shape) == 1 or name.endswith(ROUTER):
            return ModelTensor(
                name=name, shape=shape, stored=PRECISE
            )  # a few kilobytes, and their precision affects every layer
        scheme = SCHEMES[self._scheme(name)]
        source = self.sources.get(name) if scheme.carries else None
        encoding = None if source is None else source.encoding
        if encoding is not None and self._is_carried(name, shape, encoding):
            rounding = self._rounding(name, FORMATS[encoding.numbers])
            return ModelTensor(name=name, shape=shape, stored=carried_storage(encoding, rounding), carried=True)
        if source is not None or self._is_default_head(name):
            rounding = "none" if EXPERTS in name else self._rounding(name, INT8)
            return ModelTensor(name=name, shape=shape, stored=replace(ROUNDED, rounding=rounding))
        return ModelTensor(name=name, shape=shape, stored=self._rounded(name, shape, scheme))

    def _scheme(self, name: str) -> SchemeName:
        return self.quantization.keep_scheme if self._is_kept(name) else self.quantization.scheme

    def _rounding(self, name: str, form: Format) -> Rounding:
        """How activations are rounded before a product with a tensor's weights.

        Those of an embedding are not multiplied, and a head, which decides alone, gets none that a scheme rounds.
        """
        rounding = self.quantization.rounding_of(self._scheme(name))
        multiplied = rounding in form.roundings and (self.tied_embeddings or name != EMBEDDINGS)
        coarse = SCHEMES[self._scheme(name)].rounding != "none" and name in HEAD_WEIGHTS
        return rounding if multiplied and not coarse else "none"

    def _is_carried(self, name: str, shape: tuple[int, ...], encoding: Encoding) -> bool:
        if shape[1] % FORMATS[encoding.numbers].multiple:
            return False
        if EXPERTS in name:  # the kernels for experts support no groups
            return encoding.group_size is None and FORMATS[encoding.numbers] is INT8
        return FORMATS[encoding.numbers].words or not self._is_default_head(name)

    def _is_default_head(self, name: str) -> bool:
        """Whether a tensor is the head of a model of 4 bits, which gets 8: at 4 bits, heads lose most."""
        is_head = name in HEAD_WEIGHTS and (self.tied_embeddings or name != EMBEDDINGS)
        return is_head and not self._is_kept(name) and self._has_four_bits

    @cached_property
    def _has_four_bits(self) -> bool:
        scheme = SCHEMES[self.quantization.scheme]
        if scheme.format is not None:
            return FORMATS[scheme.format].words
        found = {s.encoding.numbers for name, s in self.sources.items() if s.encoding and name not in HEAD_WEIGHTS}
        return scheme.carries and any(FORMATS[numbers].words for numbers in found)

    def _rounded(self, name: str, shape: tuple[int, ...], scheme: Scheme) -> Storage:
        if name == EMBEDDINGS and not self.tied_embeddings:
            return Storage(dtype=self.dtype)  # one row is read per token: narrower storage would save only disk space
        chosen = storage_of(scheme, self.quantization, self.dtype)
        if EXPERTS in name or shape[1] % format_of(chosen).multiple:
            # the kernels for experts support no other format and round nothing
            return ROUNDED if format_of(chosen).scaled else Storage(dtype=chosen.dtype)
        if name in HEAD_WEIGHTS and not chosen.grouped:
            return Storage(dtype=chosen.dtype)  # a language model's head gets one token per call: memory-bound
        return chosen

    def _is_kept(self, name: str) -> bool:
        places = {
            "head": name in HEAD_WEIGHTS,
            "first": name.startswith("layers.0."),
            "last": name.startswith(f"layers.{self.n_layers - 1}."),
        }
        return any(places[place] for place in self.quantization.keep)


def storage_of(scheme: Scheme, quantization: Quantization, dtype: DType) -> Storage:
    """How a scheme stores a matrix; `dtype` is the one to store if the scheme leaves it to `backend.dtype`."""
    if not scheme.grouped:
        name = scheme.format or dtype
        return Storage(dtype=name, rounding=scheme.rounding if scheme.rounding in FORMATS[name].roundings else "none")
    assert scheme.format is not None
    return Storage(
        dtype=scheme.format,
        group_size=quantization.group_size,
        offsets="none" if quantization.symmetric else "zero_points",
        rounding=scheme.rounding,
    )
