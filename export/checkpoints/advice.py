"""What to tell a user whose path holds no checkpoint that can be read: what it is instead, and what to name."""

from collections.abc import Mapping
from pathlib import Path

from export.checkpoints.json_files import read_json

ADAPTER_CONFIG = "adapter_config.json"
OWN_ADAPTER = "lora.safetensors"  # of mistral-finetune
SUBFOLDER_LIMIT = 1000  # folders that are looked into for a checkpoint
MARKS = ("config.json", "params.json")
GGUF = b"GGUF"  # how such a file begins, whatever its name
TENSOR_FILES = (".safetensors", ".bin", ".pth", ".pt", ".json")  # suffixes of files that are part of a folder
# Pattern of a file's name -> what such a file belongs to, and what to do.
OTHER_FORMATS: Mapping[str, str] = {
    "*.onnx": "an ONNX model; set frontend.checkpoint to the checkpoint that it was exported from",
    "onnx/*.onnx": "an ONNX model; set frontend.checkpoint to the checkpoint that it was exported from",
    "*.h5": "weights of TensorFlow; fetch the checkpoint as safetensors",
    "*.msgpack": "weights of Flax; fetch the checkpoint as safetensors",
    "*.nemo": "a model of NeMo; convert it to a Hugging Face folder first",
    "*.ckpt": "a training checkpoint; save the model as a Hugging Face folder first",
    "*.ggml": "a GGML file, which came before GGUF; fetch the model as GGUF or safetensors",
    "openvino_model.xml": "a model of OpenVINO; set frontend.checkpoint to the checkpoint that it was exported from",
    "zero_to_fp32.py": "a training state of DeepSpeed; run its zero_to_fp32.py and save the model first",
    "*.distcp": "a distributed checkpoint of torch; save the model as a Hugging Face folder first",
}


def advice_on_file(path: Path) -> str | None:
    """One sentence on a file that belongs to a folder; None for any other file, which may be GGUF."""
    if path.suffix not in TENSOR_FILES or not path.is_file() or _is_gguf(path):
        return None
    folder = path.parent
    if any((folder / mark).is_file() for mark in MARKS):
        return f"{path} is one file of a checkpoint; set frontend.checkpoint to its folder, {folder}"
    return (
        f"{path} is one file of a checkpoint, and {folder} has neither config.json nor params.json, which give the "
        "model's sizes; fetch the whole folder and set frontend.checkpoint to it"
    )


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(GGUF)) == GGUF


def advice_on_folder(folder: Path) -> str | None:
    """One sentence on a folder without a checkpoint, or None if nothing in it is known."""
    for advise in (_on_adapter, _on_subfolders, _on_other_format):
        said = advise(folder)
        if said:
            return said
    return None


def base_of(folder: Path) -> str | None:
    """The base model that an adapter's configuration names, in a form that fits into a sentence."""
    name = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    return name if isinstance(name, str) and name and name.isprintable() else None


def _on_adapter(folder: Path) -> str | None:
    if (folder / ADAPTER_CONFIG).is_file():
        base = base_of(folder) or "its base model"
    elif (folder / OWN_ADAPTER).is_file():
        base = "the model that it was trained on, in Mistral's own format"
    else:
        return None
    return (
        f"{folder} holds an adapter, which changes the weights of another model; set frontend.checkpoint to a folder "
        f"with {base}, and frontend.adapter to {folder}"
    )


def _on_subfolders(folder: Path) -> str | None:
    """Advice on the folder around a checkpoint, such as `models--org--name` with its `snapshots/REVISION`."""
    inside = [path for path in sorted(folder.iterdir())[:SUBFOLDER_LIMIT] if path.is_dir()]
    revisions = folder / "snapshots"
    if revisions.is_dir():
        inside += sorted(path for path in revisions.iterdir() if path.is_dir())[:SUBFOLDER_LIMIT]
    held = [path for path in inside if _marks_checkpoint(path)]
    if not held:
        return None
    if len(held) == 1:
        return f"{folder} is the folder around a checkpoint; set frontend.checkpoint to {held[0]}"
    others = f"{held[0]} and {held[1]}" if len(held) == 2 else f"{held[0]}, {held[1]} and {len(held) - 2} more"
    return f"{folder} is the folder around several checkpoints, {others}; set frontend.checkpoint to one of them"


def _marks_checkpoint(folder: Path) -> bool:
    return any((folder / mark).is_file() for mark in MARKS) or any(folder.glob("*.gguf"))


def _on_other_format(folder: Path) -> str | None:
    for pattern, sentence in OTHER_FORMATS.items():
        found = next(folder.glob(pattern), None)
        if found is not None:
            return f"{folder} holds {found.relative_to(folder)}, {sentence}"
    return None
