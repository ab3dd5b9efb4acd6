"""Reads Hugging Face folders: config.json; their tensors and tokenizers have modules of their own."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from export.checkpoints import families
from export.checkpoints.advice import advice_on_folder
from export.checkpoints.families import Family
from export.checkpoints.huggingface.leftover_quantization import check_not_quantized, without_leftover_quantization
from export.checkpoints.huggingface.quantization_settings import KEY, quantization_settings
from export.checkpoints.huggingface.tensors import open_tensors
from export.checkpoints.huggingface.tokenizer import open_tokenizer
from export.checkpoints.json_files import read_json
from export.checkpoints.mistral.folder import overruled
from export.checkpoints.quantized.methods import read_quantized
from export.checkpoints.rope_settings import Rotary, huggingface_rotary
from export.checkpoints.source import Opened
from export.checkpoints.tensors.text_part import text_part
from export.checkpoints.tokenizers.chat import Chat
from runtime.errors import UserError

# Models that also see images: the text model is described by an object of its own, whose type may be left out.
WITH_IMAGES: Mapping[str, str] = {
    "mistral3": "mistral",
    "llava": "llama",
    "llava_next": "llama",
}  # model_type -> the text model's default
TIED_BY_DEFAULT = ("mistral3",)  # of the types above, where their config.json does not say


@dataclass(frozen=True)
class ModelDescription:
    """What a config.json says: the family, its values as plain keys, and the rotary settings."""

    family: Family
    values: Mapping[str, object]
    rotary: Rotary


def describe(config: Mapping[str, object], where: str) -> ModelDescription:
    """Read a config.json, which `where` names in errors; of a model that also sees images, the text model.

    Raises `UserError` for an unknown architecture, and for rotary settings that are not supported.
    """
    text = _text_config(config, where)
    family = families.find("huggingface", text.get("model_type"), where)
    context = text.get("max_position_embeddings", family.defaults.get("max_position_embeddings"))
    if not any(text.get(key) for key in ("rope_scaling", "rope_parameters")):
        text = {**text, "rope_parameters": family.defaults.get("rope_parameters")}
    plain, rotary = huggingface_rotary(text, context, where)
    beta = None if rotary.queries is None else rotary.queries.beta
    return ModelDescription(family, {**text, **plain, "llama_4_scaling_beta": beta}, rotary)


def open_folder(folder: Path, chat: Chat) -> Opened:
    """Read a folder's headers and small files; `chat` is what the user says of its conversations.

    Raises `UserError` for anything that is missing or malformed, and for an unknown architecture.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json, expected a Hugging Face checkpoint folder")
    where = str(folder / "config.json")
    config = read_json(folder / "config.json")
    advice = None if "model_type" in config else advice_on_folder(folder)
    if advice is not None:
        raise UserError(advice)
    model = describe(config, where)
    changes, notes = (
        overruled(folder, model.values, model.family.defaults.get("sliding_window"))
        if "sliding_window" in model.family.keys
        else ({}, ())
    )
    source, found_notes = open_tensors(folder)
    text, left_out = text_part(source) if config.get("model_type") in WITH_IMAGES else (source, ())
    settings = quantization_settings(folder, model.values)
    plain, quantized = read_quantized(text, settings, where)
    check_not_quantized(plain, settings, where)
    values: dict[str, object] = {**model.values, **changes}
    leftover: tuple[str, ...] = ()
    if plain is text:
        values, leftover = without_leftover_quantization(values, text, where)
    else:
        values.pop(KEY, None)
    tokenizer, chosen = open_tokenizer(folder, values, chat)
    return Opened(
        families.as_stored(model.family, plain.tensors),
        values,
        where,
        plain,
        tokenizer,
        notes=(*notes, *found_notes, *left_out, *quantized, *leftover, *chosen),
        rotary=model.rotary,
    )


def _text_config(config: Mapping[str, object], where: str) -> Mapping[str, object]:
    """The keys of the text model; those beside them, such as `quantization_config`, apply to it too."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in WITH_IMAGES:
        return config
    inner = config.get("text_config")
    if not isinstance(inner, Mapping):
        raise UserError(f"{where} has the model type {kind} and no text_config, expected an object that describes it")
    tied = bool(config.get("tie_word_embeddings", kind in TIED_BY_DEFAULT)) or bool(inner.get("tie_word_embeddings"))
    inner = {key: value for key, value in inner.items() if key != "architectures"}
    outer = {key: value for key, value in config.items() if key not in ("model_type", "text_config", "vision_config")}
    return {**outer, "model_type": WITH_IMAGES[kind], **inner, "tie_word_embeddings": tied}
