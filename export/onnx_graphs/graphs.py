"""`OnnxGraphs`: what the export stage hands on. A folder that names everything the build stage needs, so that it never reopens the checkpoint.

graphs.json           `GraphsRecord`
prefill_T.onnx        one for each chunk size T
decode.onnx           T = 1, of a model that generates
weights.safetensors   shared by all graphs as ONNX external data, under the project's tensor names
tokenizer files, where the checkpoint has a tokenizer
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.onnx_graphs.quantize import ModelTensor, specs
from runtime.artifact import manifest
from runtime.artifact.manifest import (
    HEADS,
    DType,
    Graph,
    ModelConfig,
    Quantization,
    Record,
    Shape,
    Signature,
    TensorSpec,
    TokenizerSpec,
)
from runtime.artifact.tensor_file import TensorFile
from runtime.errors import UserError

RECORD_FILE = "graphs.json"
WEIGHTS_FILE = "weights.safetensors"


class GraphsRecord(Record, frozen=True):
    """Everything about exported graphs that is not an array."""

    name: str
    model: ModelConfig
    shape: Shape
    quantization: Quantization
    graphs: tuple[Graph, ...]
    tensors: tuple[ModelTensor, ...]
    tokenizer: TokenizerSpec | None
    overrides: dict[str, int | float | str | bool | tuple[int | None, ...] | None]
    source_bytes: int  # size of the checkpoint's tensors

    @property
    def weights(self) -> tuple[TensorSpec, ...]:
        """The tensors of the weight file."""
        return tuple(spec for tensor in self.tensors for spec in specs(tensor))

    @property
    def rounded_weights(self) -> dict[str, int]:
        """The weights whose tokens are rounded to int8, and how many neighbours share a scale."""
        return {
            tensor.name: tensor.stored.rounded_together(tensor.shape[1])
            for tensor in self.tensors
            if tensor.stored.dynamic
        }

    @property
    def cache_dtype(self) -> DType:
        """What keys and values are stored as."""
        return self.graphs[-1].signature.caches[0].dtype


@dataclass(frozen=True)
class OnnxGraphs:
    """Exported graphs in their folder."""

    folder: Path
    record: GraphsRecord

    @classmethod
    def open(cls, folder: Path) -> "OnnxGraphs":
        """Read the folder's record; UserError when it is missing or malformed."""
        path = folder / RECORD_FILE
        if not path.is_file():
            raise UserError(
                f"{path} is missing: expected the export stage's output there; run `python -m export` again"
            )
        return cls(folder, manifest.decode(path.read_bytes(), GraphsRecord, str(path)))

    def onnx_path(self, graph: Graph) -> Path:
        """The ONNX file of one graph."""
        return self.folder / f"{graph.name}.onnx"

    def dump(self, folder: Path) -> None:
        """Copy the ONNX files, for a viewer, under numbered names."""
        folder.mkdir(parents=True, exist_ok=True)
        for graph in self.record.graphs:
            shutil.copyfile(self.onnx_path(graph), folder / f"0-export-{graph.name}.onnx")

    def weights(self) -> TensorFile:
        """The weights that the graphs share."""
        return TensorFile.open(self.folder / WEIGHTS_FILE)

    def files_for_artifact(self) -> list[Path]:
        """Tokenizer files, which go into the artifact as they are."""
        spec = self.record.tokenizer
        return [self.folder / name for name in (spec.file, spec.chat_template) if name] if spec else []


def make_graphs(model: ModelConfig, shape: Shape, cache_dtype: str) -> tuple[Graph, ...]:
    """The prefill graphs, largest chunk first, and decode where the model generates, each with its signature."""
    calls = [(f"prefill_{t}", t) for t in shape.prefill_chunks] + ([("decode", 1)] if model.generates else [])
    return tuple(Graph(name=name, tokens=t, signature=_signature(model, shape, t, cache_dtype)) for name, t in calls)


def _signature(model: ModelConfig, shape: Shape, tokens: int, cache_dtype: str) -> Signature:
    parts: list[tuple[str, int, Any]] = [("key", model.head_dim, cache_dtype), ("value", model.head_dim, cache_dtype)]
    if cache_dtype == "int8":
        parts += [("key_scale", 1, "float32"), ("value_scale", 1, "float32")]

    def caches(prefix: str) -> list[TensorSpec]:
        return [
            TensorSpec(name=f"{prefix}.{i}.{part}", shape=(shape.batch, model.n_kv_heads, length, width), dtype=dtype)
            for i, length in enumerate(model.cache_lens(shape.cache_len))
            for part, width, dtype in parts
        ]

    ids = [TensorSpec(name=name, shape=(shape.batch, tokens), dtype="int64") for name in ("input_ids", "position_ids")]
    head = HEADS[model.head]
    output = TensorSpec(
        name=head.output, shape=(shape.batch, tokens if head.every_token else 1, model.n_outputs), dtype="float32"
    )
    return Signature(inputs=(*ids, *caches("past_key_values")), outputs=(output, *caches("present")))
