"""`StoredWeights`: the first result of the export stage, a folder of weights for all graphs, with the tokenizer.

weights.json          `WeightsRecord`
weights.safetensors   every tensor as its format stores it, under the project's names
tokenizer files, if the checkpoint has a tokenizer

Graphs over these weights lie in the same folder (`export.onnx_graphs.graphs`).
"""

from dataclasses import dataclass
from pathlib import Path

from export.weights.format import ModelTensor
from export.weights.table import specs
from runtime.artifact import manifest
from runtime.artifact.manifest import ModelConfig, Quantization, Record, TensorSpec, TokenizerSpec
from runtime.artifact.schemes import TokenRounding
from runtime.artifact.tensor_file import TensorFile
from runtime.errors import UserError

RECORD_FILE = "weights.json"
WEIGHTS_FILE = "weights.safetensors"


class WeightsRecord(Record, frozen=True):
    """All data about stored weights except the arrays. It does not depend on the static sizes chosen for a compile."""

    model: ModelConfig
    quantization: Quantization
    tensors: tuple[ModelTensor, ...]
    tokenizer: TokenizerSpec | None
    overrides: dict[str, int | float | str | bool | tuple[int | None, ...] | None]
    source_bytes: int  # total size of the checkpoint's tensors

    @property
    def weights(self) -> tuple[TensorSpec, ...]:
        """The tensors of the weight file."""
        return tuple(spec for tensor in self.tensors for spec in specs(tensor))

    @property
    def rounded_weights(self) -> dict[str, TokenRounding]:
        """The weights whose activations are rounded, and how; orders of columns are in the weight file."""
        return {
            tensor.name: TokenRounding(tensor.stored.rounded_together(tensor.shape[1]), tensor.stored.rounding)
            for tensor in self.tensors
            if tensor.stored.rounds
        }

    @property
    def tokenizer_files(self) -> tuple[str, ...]:
        """Names of the tokenizer's files, which go into the artifact unchanged."""
        spec = self.tokenizer
        return tuple(name for name in (spec.file, spec.chat_template) if name) if spec else ()


@dataclass(frozen=True)
class StoredWeights:
    """Stored weights in their folder."""

    folder: Path
    record: WeightsRecord

    @classmethod
    def open(cls, folder: Path) -> "StoredWeights":
        """Read the folder's record; raises `UserError` if it is missing or malformed."""
        path = folder / RECORD_FILE
        if not path.is_file():
            raise UserError(f"{path} is missing: expected the stored weights there; run `python -m export` again")
        return cls(folder, manifest.from_json(path.read_bytes(), WeightsRecord, str(path)))

    def write_record(self) -> None:
        """Write the record that `open` reads."""
        (self.folder / RECORD_FILE).write_bytes(manifest.to_json(self.record))

    def tensors(self) -> TensorFile:
        """The weight file, opened."""
        return TensorFile.open(self.folder / WEIGHTS_FILE)
