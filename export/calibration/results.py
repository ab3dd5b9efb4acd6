"""Finished layers of a calibration on disk, so that a run that is killed goes on where it was.

The folder grows: `layer_3.safetensors` holds what layer 3 was rounded to, `layer_3.json` the errors, and
`states_3.safetensors` the hidden states that enter layer 3, of which only the latest are kept. Each is sealed with its
sums before it counts. The head is the step behind the last layer.
"""

from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch

from export.calibration.rounding import Rounded
from export.weights.format import ModelTensor
from export.weights.table import specs
from export.workspace import is_whole, seal
from runtime.artifact.manifest import Record, TensorSpec
from runtime.artifact.tensor_file import TensorFile, TensorFileWriter

STATES = "states"


class RoundingError(Record, frozen=True):
    """How far off the outputs of one rounded matrix are, relative to the exact ones; see `Rounded`."""

    tensor: str
    error: float
    damping: float | None = None


@dataclass(frozen=True)
class LayerResults:
    """The results in one folder."""

    folder: Path

    def save(self, step: int, tensors: list[ModelTensor], results: list[Rounded]) -> None:
        """Keep a finished layer; one without rounded tensors has no file of them."""
        files = [self._errors(step)]
        errors = [
            RoundingError(tensor=tensor.name, error=result.error, damping=result.damping)
            for tensor, result in zip(tensors, results, strict=True)
        ]
        files[0].write_bytes(msgspec.json.encode(errors))
        if results:
            files.append(self._rounded(step))
            with TensorFileWriter(files[1], [spec for tensor in tensors for spec in specs(tensor)]) as writer:
                for result in results:
                    for name, array in result.arrays.items():
                        writer.write(name, array)
        seal(self._contents(f"layer_{step}"), files)

    def finished(self, step: int) -> bool:
        """Whether a layer is kept, and whole."""
        return is_whole(self.folder, self._contents(f"layer_{step}").name)

    def errors(self, step: int) -> list[RoundingError]:
        """The errors of a finished layer."""
        return msgspec.json.decode(self._errors(step).read_bytes(), type=list[RoundingError])

    def tensors(self, step: int) -> TensorFile | None:
        """What a finished layer was rounded to, by stored names."""
        return TensorFile.open(self._rounded(step)) if self._rounded(step).is_file() else None

    def save_states(self, step: int, states: torch.Tensor) -> None:
        """Keep the states that enter a layer, and drop those that entered the layer before."""
        path = self._states(step)
        with TensorFileWriter(path, [TensorSpec(name=STATES, shape=tuple(states.shape), dtype="float32")]) as writer:
            writer.write(STATES, states.numpy())
        seal(self._contents(f"states_{step}"), [path])
        for old in self.folder.glob("states_*"):
            if old.stem != path.stem:
                old.unlink()

    def states(self, step: int) -> torch.Tensor | None:
        """The states that enter a layer, if they are kept and whole."""
        if not is_whole(self.folder, self._contents(f"states_{step}").name):
            return None
        return torch.from_numpy(np.asarray(TensorFile.open(self._states(step)).read(STATES)))

    def _contents(self, name: str) -> Path:
        return self.folder / f"{name}.contents"

    def _rounded(self, step: int) -> Path:
        return self.folder / f"layer_{step}.safetensors"

    def _errors(self, step: int) -> Path:
        return self.folder / f"layer_{step}.json"

    def _states(self, step: int) -> Path:
        return self.folder / f"states_{step}.safetensors"
