"""What a Hugging Face folder says of how its weights are quantized, in config.json or in a file beside it."""

from collections.abc import Mapping
from pathlib import Path

from export.checkpoints.json_files import read_json
from export.checkpoints.quantized.methods import METHOD

KEY = "quantization_config"
MLX_KEY = "quantization"  # in config.json
FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}  # of AutoGPTQ and AutoAWQ -> the method
SYNONYMS = {"w_bit": "bits", "q_group_size": "group_size"}


def quantization_settings(folder: Path, config: Mapping[str, object]) -> dict[str, object] | None:
    """The settings by the keys of `quantization_config`, with the method; what config.json says comes first.

    None if nothing is said. Raises `UserError` for a file that is not a JSON object.
    """
    said, mlx = config.get(KEY), config.get(MLX_KEY)
    if isinstance(said, Mapping) and METHOD in said:
        return {**_beside(folder, said[METHOD]), **_renamed(said)}
    if isinstance(mlx, Mapping):
        return {METHOD: "mlx", **mlx}
    if isinstance(said, Mapping):
        return dict(said)
    for method in FILES.values():
        found = _beside(folder, method)
        if found:
            return {METHOD: method, **found}
    return None


def _beside(folder: Path, method: object) -> dict[str, object]:
    """What the file of a method's own software says; empty if there is none."""
    for name, of in FILES.items():
        if of == method and (folder / name).is_file():
            return _renamed(read_json(folder / name))
    return {}


def _renamed(settings: Mapping[str, object]) -> dict[str, object]:
    return {SYNONYMS.get(key, key): value for key, value in settings.items()}
