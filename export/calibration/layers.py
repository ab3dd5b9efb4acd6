"""The static model on calibration rows, one layer at a time: only that layer's weights are in memory."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from export.checkpoints.checkpoint import Checkpoint
from export.checkpoints.tensor_layout import EMBEDDINGS
from export.static_model.model import StaticModel, constants, distinct, rounded_tokens
from export.weights.format import Float32
from runtime.artifact.schemes import TokenRounding

FINAL_NORM = "norm.weight"
Observer = Callable[[str, torch.Tensor], object]  # gets the name of a weight, and its inputs (tokens, K)


class Layers:
    """The layers of a checkpoint's model, called in order on the hidden states of rows of the same length.

    Every row starts with empty caches, which hold all of its tokens.
    """

    def __init__(self, checkpoint: Checkpoint, ids: NDArray[np.int64], rounded: Mapping[str, TokenRounding]) -> None:
        """`ids` are the rows (rows, length); for `rounded`, see `StaticModel.round_products`."""
        self.checkpoint, self.ids, self.rounded = checkpoint, ids, rounded
        config, length = checkpoint.model, ids.shape[1]
        self.cache_lens = tuple(min(slots, length) for slots in config.cache_lens(length))
        with torch.device("meta"):
            self.model = StaticModel(config, self.cache_lens).eval()
        buffers = {name: torch.from_numpy(values) for name, values in constants(config, self.cache_lens).items()}
        self.model.load_state_dict(buffers, strict=False, assign=True)
        self.model.round_products(rounded)

    def embedded(self) -> torch.Tensor:
        """The states that enter the first layer (rows, length, dim)."""
        used, places = np.unique(self.ids, return_inverse=True)
        table = torch.from_numpy(rows_of(self.checkpoint, EMBEDDINGS, used))
        return table[torch.from_numpy(places.reshape(self.ids.shape))]

    def weights(self, layer: int) -> dict[str, Float32]:
        """One layer's weights by their whole names, in float32."""
        names = [name for name in self.checkpoint.names() if name.startswith(prefix(layer))]
        return {name: self.checkpoint.tensor(name).astype(np.float32, copy=False) for name in names}

    def run(
        self, layer: int, weights: Mapping[str, Float32], states: torch.Tensor, observer: Observer | None = None
    ) -> torch.Tensor:
        """The states (rows, length, dim) after a layer with these weights; `observer` sees the inputs of matrices."""
        block = self.model.layers[layer]
        tensors = {name.removeprefix(prefix(layer)): torch.from_numpy(values) for name, values in weights.items()}
        block.load_state_dict(tensors, strict=True, assign=True)
        shared = self._shared(self.cache_lens[layer])
        caches = self._empty_caches(self.cache_lens[layer])
        result = torch.empty_like(states)
        with torch.no_grad(), _observed(block, prefix(layer), observer):
            for row in range(len(states)):
                result[row : row + 1] = block(states[row : row + 1], *shared, *caches)[0]
        block.to("meta")
        return result

    def head_inputs(self, name: str, states: torch.Tensor) -> torch.Tensor:
        """What the head's weight `name` is multiplied with: the normed states (tokens, dim) after the last layer."""
        norm = self.model.norm
        norm.load_state_dict(
            {"weight": torch.from_numpy(self.checkpoint.tensor(FINAL_NORM).astype(np.float32))}, assign=True
        )
        with torch.no_grad():
            normed = norm(states).flatten(0, 1)
        return rounded_tokens(normed, self.rounded[name]) if name in self.rounded else normed

    def _shared(self, cache_len: int) -> list[torch.Tensor]:
        """The mask of a layer's cache and the rotation, as `StaticModel.begin` computes them, for one row."""
        self.model.tok_embeddings = nn.Embedding(1, 1)  # `begin` looks up embeddings too, which nobody needs here
        length = self.ids.shape[1]
        _, *shared = self.model.begin(torch.zeros((1, length), dtype=torch.int64), torch.arange(length)[None])
        lengths = distinct(self.cache_lens)
        return [shared[lengths.index(cache_len)], *shared[len(lengths) :]]

    def _empty_caches(self, cache_len: int) -> list[torch.Tensor]:
        config = self.checkpoint.model
        return [torch.zeros((1, config.n_kv_heads, cache_len, config.head_dim)) for _ in range(2)]


def prefix(layer: int) -> str:
    """How the names of a layer's tensors begin."""
    return f"layers.{layer}."


def rows_of(checkpoint: Checkpoint, name: str, wanted: NDArray[np.int64]) -> Float32:
    """Some rows of a tensor, ascending, in float32; the others are read a block at a time and dropped."""
    found, first = [], 0
    for block in checkpoint.blocks(name):
        places = wanted[(wanted >= first) & (wanted < first + len(block))] - first
        found.append(block[places].astype(np.float32))
        first += len(block)
    return np.concatenate(found)


@contextmanager
def _observed(block: nn.Module, before: str, observer: Observer | None) -> Iterator[None]:
    """Show the inputs of every matrix of a layer, as they are multiplied, to an observer."""
    handles = []
    for name, module in block.named_modules():
        if observer is not None and isinstance(module, nn.Linear):
            weight = f"{before}{name}.weight"
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, inputs, weight=weight: observer(weight, inputs[0].flatten(0, -2)) and None
                )
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
