"""Reads Mistral's own raw format: params.json, the weights (`raw_weights.py`), and the tokenizer file.

The keys, and the defaults for missing ones, come from `TransformerArgs` and `get_cache_sizes` of mistral-inference. In
this format, rotary pairs are neighbouring rows; the families table says so, and `Checkpoint` reorders them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

from export.checkpoints import families
from export.checkpoints.hyperparameters import layer_windows
from export.checkpoints.json_files import convert, read_json
from export.checkpoints.mistral.tokenizer import mistral_tokenizer
from export.checkpoints.mistral.weights import open_raw_weights
from export.checkpoints.quantized.methods import METHOD, is_read, read_quantized
from export.checkpoints.rope_settings import mistral_rotary
from export.checkpoints.source import Opened
from export.checkpoints.tensors.text_part import text_part
from export.checkpoints.tokenizers.chat import Chat
from runtime.errors import UserError

PARAMS_FILE = "params.json"
# The second key hides the windows from software that supports only one window for all layers.
WINDOW_KEYS = ("sliding_window", "_sliding_window")
IMAGE_KEYS = ("vision_encoder",)  # of the parts that are left out
# Keys that other functions read, or that carry no information: `lora` says how mistral-finetune trained a model that it
# has merged, and tensors of an adapter that it has not merged are refused.
IGNORED_KEYS = (
    "max_batch_size", "max_position_embeddings", "moe", "_sliding_window", "yarn", "llama_4_scaling", "lora",
)  # fmt: skip
FLOAT8_WEIGHTS = "fp8_e4m3"
DENSE_THETA_WITH_WINDOW, DENSE_THETA = 10000.0, 1e6  # what mistral-inference infers for a missing rope_theta
T = TypeVar("T")


class _Experts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The object `moe` in params.json."""

    num_experts: int
    num_experts_per_tok: int


class _Quantization(msgspec.Struct, frozen=True):
    """The part of the object `quantization` in params.json that says how weights are stored."""

    qformat_weight: str | None = None


def open_folder(folder: Path, chat: Chat) -> Opened:
    """Read a raw folder's headers and small files.

    No file of the format says whether the model is tuned for conversations; `chat` does.
    Raises `UserError` for anything that is missing, malformed or of an unknown kind.
    """
    path = folder / PARAMS_FILE
    if not path.is_file():
        raise UserError(f"{folder} has no {PARAMS_FILE}, expected a folder in Mistral's own format")
    params = read_json(path)
    family = families.find("mistral", "dense" if params.get("moe") is None else "moe", str(path))
    _check_keys(params, family, path)
    stored, notes = open_raw_weights(folder)
    source, left_out = text_part(stored) if _sees_images(params) else (stored, ())
    plain, said = read_quantized(source, _quantization(params, path), str(path))
    return Opened(
        family,
        _values(params, path),
        str(path),
        plain,
        mistral_tokenizer(folder, instruct=chat.instruct),
        notes=(*notes, *left_out, *said),
        rotary=mistral_rotary(params, str(path)),
    )


def _sees_images(params: Mapping[str, object]) -> bool:
    return any(params.get(key) is not None for key in IMAGE_KEYS)


def overruled(folder: Path, config: Mapping[str, object], default: object) -> tuple[dict[str, object], tuple[str, ...]]:
    """The keys of config.json that a params.json beside it overrules, with their new values, and a note about them.

    Published models with interleaved windows name one window for all layers in config.json, but Mistral's own software
    reads params.json, so windows, context and rotary base are taken from there. `default` is the window if config.json
    names none.
    """
    path = folder / PARAMS_FILE
    n_layers = config.get("num_hidden_layers")
    if not path.is_file() or type(n_layers) is not int or n_layers < 1:
        return {}, ()
    params = read_json(path)
    if params.get("n_layers") != n_layers:
        found = (
            f"{path} has n_layers: {params.get('n_layers')!r}, "
            f"but the config.json beside it has num_hidden_layers: {n_layers}"
        )
        raise UserError(f"{found}, expected files of one model; remove the one that does not belong here")
    own = layer_windows(_window(params, path), None, n_layers, repeats=True, where=str(path))
    theirs = layer_windows(
        config.get("sliding_window", default),
        config.get("layer_types"),
        n_layers,
        repeats=False,
        where=str(folder / "config.json"),
    )
    context, their_context = params.get("max_seq_len"), config.get("max_position_embeddings")
    changes: dict[str, object] = {}
    said = []
    if own != theirs:
        changes |= {"sliding_window": list(own), "layer_types": None}
        said.append(f"windows are {_summary(own)}, not {_summary(theirs)}")
    if context is not None and context != their_context:
        changes["max_position_embeddings"] = context
        said.append(f"the context has {context} positions, not {their_context}")
    theta, their_theta = params.get("rope_theta"), config.get("rope_theta")
    if theta is not None and their_theta is not None and theta != their_theta:
        changes["rope_theta"] = theta
        said.append(f"rope_theta is {theta}, not {their_theta}")
    return changes, (
        f"{path} overrules config.json, since Mistral's own software reads it: {' and '.join(said)}",
    ) if said else ()


def window_pattern(windows: tuple[T, ...]) -> tuple[T, ...]:
    """The shortest pattern of windows that gives the windows of all layers when it is repeated."""
    return next(
        windows[:n]
        for n in range(1, len(windows) + 1)
        if len(windows) % n == 0 and windows == windows[:n] * (len(windows) // n)
    )


def _summary(windows: tuple[object, ...]) -> str:
    """The windows of all layers, in a few words."""
    pattern = window_pattern(windows)
    words = ["none" if window is None else str(window) for window in pattern]
    return words[0] if len(words) == 1 else f"[{', '.join(words)}]" + (" repeated" if len(words) < len(windows) else "")


def _check_keys(params: Mapping[str, object], family: families.Family, path: Path) -> None:
    """Refuse unknown keys instead of ignoring them, since they may change the mathematics."""
    # The fields of `_Experts` may occur only inside `moe`.
    known = {*family.keys.values(), *family.supported, *IGNORED_KEYS, *IMAGE_KEYS} - set(_Experts.__struct_fields__)
    unknown = sorted(key for key in set(params) - known if params[key] is not None)
    if unknown:
        raise UserError(
            f"{path} has the unknown key {unknown[0]!r}; expected keys of a text model: {', '.join(sorted(known))}"
        )


def _values(params: Mapping[str, object], path: Path) -> dict[str, object]:
    """The values of params.json, with nested and inferred ones as plain keys."""
    window = _window(params, path)
    values = {**params, "sliding_window": window}
    if params.get("rope_theta") is None:
        values["rope_theta"] = DENSE_THETA if window is None else DENSE_THETA_WITH_WINDOW
    if params.get("max_seq_len") is None:
        values["max_seq_len"] = params.get("max_position_embeddings")
    values["quantization"] = _other_quantization(params, path)
    if params.get("moe") is not None:
        experts = convert(params["moe"], _Experts, f"{path}, moe")
        values |= {"num_experts": experts.num_experts, "num_experts_per_tok": experts.num_experts_per_tok}
    return values


def _quantization(params: Mapping[str, object], path: Path) -> Mapping[str, object] | None:
    """What is said of how weights are quantized, with the method's name as Hugging Face gives it."""
    said = params.get("quantization")
    if said is None:
        return None
    known = convert(said, _Quantization, f"{path}, quantization")
    given = {METHOD: "fp8"} if known.qformat_weight == FLOAT8_WEIGHTS else {}
    return {**(said if isinstance(said, Mapping) else {}), **given}


def _other_quantization(params: Mapping[str, object], path: Path) -> object:
    """The quantization, unless it is one that is read."""
    said = _quantization(params, path)
    return None if said is None or is_read(said) else params["quantization"]


def _window(params: Mapping[str, object], path: Path) -> object:
    given = {key: params[key] for key in WINDOW_KEYS if params.get(key) is not None}
    if len(given) > 1:
        raise UserError(f"{path} has both {' and '.join(given)}, expected one of them; remove the other")
    return next(iter(given.values()), None)
