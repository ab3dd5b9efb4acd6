"""The text model of a checkpoint that also sees images: its encoder and projector are left out, and that is said."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from export.checkpoints.source import Array, SourceTensor, TensorSource

# How tensors of an image encoder, and of what joins it to the text model, begin in each format.
IMAGE_PARTS = (
    "vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.",
    "vision_encoder.", "vision_language_adapter.", "patch_merger.", "pre_mm_projector_norm.",
)  # fmt: skip
MEGABYTE = 10**6


@dataclass(frozen=True)
class TextTensors:
    """The tensors of a source without those of `IMAGE_PARTS`."""

    source: TensorSource

    @cached_property
    def tensors(self) -> Mapping[str, SourceTensor]:
        """The text model's tensors by name."""
        return {name: tensor for name, tensor in self.source.tensors.items() if not name.startswith(IMAGE_PARTS)}

    def read(self, name: str, rows: slice) -> Array:
        """Rows of one tensor, as the source gives them."""
        return self.source.read(name, rows)


def text_part(source: TensorSource) -> tuple[TensorSource, tuple[str, ...]]:
    """The text model's tensors, and a note on what is left out."""
    text = TextTensors(source)
    left = [tensor.nbytes for name, tensor in source.tensors.items() if name not in text.tensors]
    note = (
        f"the image encoder and its projector are left out ({len(left)} tensors, {sum(left) / MEGABYTE:.0f} MB): "
        "the artifact reads text only"
    )
    return text, (note,) if left else ()
