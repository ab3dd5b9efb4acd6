"""What to tell a user whose path holds no checkpoint that can be read: what it is instead, and what to name."""

from collections.abc import Mapping
from pathlib import Path

from export.checkpoints.json_files import read_json

ADAPTER_CONFIG = "adapter_config.json"
OWN_ADAPTER = "lora.safetensors"  # of mistral-finetune
SUBFOLDER_LIMIT = 1000  # folders that are looked into for a checkpoint
MARKS = ("config.json", "params.json")
GGUF = b"GGUF"  # how such a file begins, whatever its name
GGML = (b"lmgg", b"fmgg", b"tjgg")  # the same of the formats before it
FILE_LIMIT = 1000  # files of a folder that are looked into for this
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
    "*/*.distcp": "a distributed checkpoint of torch; save the model as a Hugging Face folder first",
    "mlc-chat-config.json": "a model of MLC; set frontend.checkpoint to the checkpoint that it was compiled from",
    "qmodel.pt": "a model quantized by HQQ; set frontend.checkpoint to the model that it was made from",
    "model.bin": "weights of CTranslate2; set frontend.checkpoint to the checkpoint that they were converted from",
}
PIECE = "a piece of a GGUF; join the pieces in their order, as `cat` does, into one .gguf file"
ARCHIVE = "an archive; unpack it, and set frontend.checkpoint to the folder"
UNFINISHED = "what is left of a file that was not fetched to its end; fetch the checkpoint again"
# The same for what is not yet a checkpoint, among it what programs that fetch files leave when they are stopped.
NOT_YET: Mapping[str, str] = {
    "*.gguf-split-*": PIECE,
    "*.gguf.part*of*": PIECE,
    **dict.fromkeys(("*.zip", "*.tar", "*.tar.*", "*.tgz"), ARCHIVE),
    **dict.fromkeys(("*.incomplete", ".cache/huggingface/download/*.incomplete"), UNFINISHED),
    **dict.fromkeys(("*.part", "*.aria2", "*.crdownload"), UNFINISHED),
}
# Where the Hub's client keeps checkpoints, from the folder of one, of all, or of everything that it keeps.
REVISIONS = ("snapshots/*", "models--*/snapshots/*", "hub/models--*/snapshots/*")


def advice_on_file(path: Path) -> str | None:
    """One sentence on a file that belongs to a folder or is of another format; None for others, which may be GGUF."""
    if not path.is_file():
        return None
    known = NOT_YET if _is_gguf(path) else {**NOT_YET, **OTHER_FORMATS}
    for pattern, sentence in known.items():
        if path.match(pattern):
            return f"{path} is {sentence}"
    if path.suffix not in TENSOR_FILES or _is_gguf(path):
        return None
    if _begins_with(path, GGML):
        return f"{path} is {OTHER_FORMATS['*.ggml']}"
    folder = path.parent
    if any((folder / mark).is_file() for mark in MARKS):
        return f"{path} is one file of a checkpoint; set frontend.checkpoint to its folder, {folder}"
    return (
        f"{path} is one file of a checkpoint, and {folder} has neither config.json nor params.json, which give the "
        "model's sizes; fetch the whole folder and set frontend.checkpoint to it"
    )


def _is_gguf(path: Path) -> bool:
    return _begins_with(path, (GGUF,))


def _begins_with(path: Path, magics: tuple[bytes, ...]) -> bool:
    with path.open("rb") as file:
        return file.read(4) in magics


def advice_on_folder(folder: Path) -> str | None:
    """One sentence on a folder without a checkpoint, or None if nothing in it is known."""
    for advise in ADVICE:
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


def _on_gguf_of_another_name(folder: Path) -> str | None:
    """Advice on a GGUF without its suffix, as in a folder of blobs."""
    files = (path for path in sorted(folder.iterdir())[:FILE_LIMIT] if path.is_file())
    found = next(filter(_is_gguf, files), None)
    if found is None:
        return None
    return f"{folder} holds {found.name}, which is a GGUF file by its contents; set frontend.checkpoint to {found}"


def _on_weights_alone(folder: Path) -> str | None:
    found = next((path for path in sorted(folder.iterdir()) if path.suffix == ".safetensors"), None)
    if found is None or any((folder / mark).is_file() for mark in MARKS):
        return None
    return (
        f"{folder} holds {found.name} and neither config.json nor params.json, which give the model's sizes; fetch the "
        "whole folder"
    )


def _on_subfolders(folder: Path) -> str | None:
    """Advice on the folder around a checkpoint, such as `models--org--name` with its `snapshots/REVISION`."""
    inside = [path for path in sorted(folder.iterdir())[:SUBFOLDER_LIMIT] if path.is_dir()]
    for pattern in REVISIONS:
        inside += [path for path in sorted(folder.glob(pattern))[:SUBFOLDER_LIMIT] if path.is_dir()]
    held = [path for path in inside if _marks_checkpoint(path)]
    if not held:
        return None
    if len(held) == 1:
        return f"{folder} is the folder around a checkpoint; set frontend.checkpoint to {held[0]}"
    others = f"{held[0]} and {held[1]}" if len(held) == 2 else f"{held[0]}, {held[1]} and {len(held) - 2} more"
    return f"{folder} is the folder around several checkpoints, {others}; set frontend.checkpoint to one of them"


def _marks_checkpoint(folder: Path) -> bool:
    return any((folder / mark).is_file() for mark in (*MARKS, ADAPTER_CONFIG)) or any(folder.glob("*.gguf"))


def _on_what_is_not_yet(folder: Path) -> str | None:
    return _by_name(folder, NOT_YET)


def _on_other_format(folder: Path) -> str | None:
    return _by_name(folder, OTHER_FORMATS)


def _by_name(folder: Path, known: Mapping[str, str]) -> str | None:
    for pattern, sentence in known.items():
        found = next(folder.glob(pattern), None)
        if found is not None:
            return f"{folder} holds {found.relative_to(folder)}, {sentence}"
    return None


ADVICE = (
    _on_adapter, _on_what_is_not_yet, _on_gguf_of_another_name, _on_subfolders, _on_other_format, _on_weights_alone,
)  # fmt: skip
