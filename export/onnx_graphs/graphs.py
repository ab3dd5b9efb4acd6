"""`OnnxGraphs`: the result of the export stage, and all that the build stage needs, which never reopens the checkpoint.

Graphs lie in the folder of their stored weights (`export.weights.stored`), since ONNX reads external data only from a
graph's own folder or below it, and not through links:

graphs-KEY.json       `GraphsRecord`
graphs-KEY.contents   the sums of all of these; written last, so graphs without it are left over from a killed run
prefill_T.onnx        one for each chunk size T
step_M.onnx           one for each number M of rows in a step, only for a model that generates
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from export.weights.format import ORDER_SUFFIX
from export.weights.stored import WEIGHTS_FILE, WeightsRecord
from runtime.artifact import manifest
from runtime.artifact.caches import CACHE_FORMATS
from runtime.artifact.manifest import DType, Function, Graph, Shape
from runtime.artifact.schemes import TokenRounding
from runtime.artifact.signatures import functions_of, graphs_of
from runtime.artifact.targets import CacheDType
from runtime.artifact.tensor_file import TensorFile
from runtime.errors import UserError

ONNX_SUFFIX = ".onnx"
RECORD_PREFIX = "graphs-"
CONTENTS_SUFFIX = ".contents"


class GraphsRecord(WeightsRecord, frozen=True):
    """All data about exported graphs except the arrays."""

    shape: Shape
    graphs: tuple[Graph, ...]

    @classmethod
    def over(cls, weights: WeightsRecord, shape: Shape, cache_dtype: CacheDType) -> "GraphsRecord":
        """The record of graphs of these sizes over stored weights; `cache_dtype` is named as in the configuration."""
        given = {name: getattr(weights, name) for name in WeightsRecord.__struct_fields__}
        return cls(**given, shape=shape, graphs=graphs_of(weights.model, shape, CACHE_FORMATS[cache_dtype].dtype))

    @property
    def cache_dtype(self) -> DType:
        """The dtype of the numbers in the caches."""
        return self.graphs[-1].signature.caches[0].dtype

    @property
    def functions(self) -> tuple[Function, ...]:
        """The functions that the graphs are compiled to, in the same order."""
        return functions_of(self.model, self.shape, self.cache_dtype)


@dataclass(frozen=True)
class OnnxGraphs:
    """Exported graphs beside their record's file."""

    path: Path  # of the record
    record: GraphsRecord

    @classmethod
    def open(cls, path: Path) -> "OnnxGraphs":
        """Read a record; raises `UserError` if it is missing or malformed."""
        if not path.is_file():
            raise UserError(
                f"{path} is missing: expected the export stage's output there; run `python -m export` again"
            )
        return cls(path, manifest.from_json(path.read_bytes(), GraphsRecord, str(path)))

    @property
    def folder(self) -> Path:
        """The folder of the graphs and their weights."""
        return self.path.parent

    @property
    def key(self) -> str:
        """The key that identifies the graphs and their weights."""
        return self.path.stem.removeprefix(RECORD_PREFIX)

    def onnx_path(self, graph: Graph) -> Path:
        """The ONNX file of one graph."""
        return self.folder / f"{graph.name}{ONNX_SUFFIX}"

    def dump(self, folder: Path) -> None:
        """Copy the ONNX files under numbered names, for viewing."""
        folder.mkdir(parents=True, exist_ok=True)
        for graph in self.record.graphs:
            shutil.copyfile(self.onnx_path(graph), folder / f"0-export-{graph.name}.onnx")

    def weights(self) -> TensorFile:
        """The weights that the graphs share."""
        return TensorFile.open(self.folder / WEIGHTS_FILE)

    def rounded_weights(self) -> dict[str, TokenRounding]:
        """The weights whose activations are rounded, and how, with the orders of columns."""
        stored, rounded = self.weights(), self.record.rounded_weights
        orders = {
            tensor.name: stored.read(tensor.name + ORDER_SUFFIX)
            for tensor in self.record.tensors
            if tensor.stored.reordered and tensor.stored.rounds
        }
        return rounded | {name: rounded[name]._replace(order=order) for name, order in orders.items()}

    def files_for_artifact(self) -> list[Path]:
        """The tokenizer files, which go into the artifact unchanged."""
        return [self.folder / name for name in self.record.tokenizer_files]


def record_path(folder: Path, key: str) -> Path:
    """The file of the record of the graphs with a key."""
    return folder / f"{RECORD_PREFIX}{key}.json"
