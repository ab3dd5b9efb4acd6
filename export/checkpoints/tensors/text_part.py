"""The text model of a checkpoint that also sees images: its encoder and projector are left out, and that is said."""

from export.checkpoints.source import TensorSource
from export.checkpoints.tensors.renamed_tensors import RenamedTensors

# How tensors of an image encoder, and of what joins it to the text model, begin in each format.
IMAGE_PARTS = (
    "vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.",
    "image_newline", "model.image_newline",
    "vision_encoder.", "vision_language_adapter.", "patch_merger.", "pre_mm_projector_norm.",
)  # fmt: skip
MEGABYTE = 10**6


def text_part(source: TensorSource) -> tuple[TensorSource, tuple[str, ...]]:
    """The text model's tensors, and a note on what is left out."""
    kept = {name: name for name in source.tensors if not name.startswith(IMAGE_PARTS)}
    left = [tensor.nbytes for name, tensor in source.tensors.items() if name not in kept]
    note = (
        f"the image encoder and its projector are left out ({len(left)} tensors, {sum(left) / MEGABYTE:.0f} MB): "
        "the artifact reads text only"
    )
    return RenamedTensors(source, kept), (note,) if left else ()
