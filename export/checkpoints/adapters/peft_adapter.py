"""Reads an adapter as peft saves it: adapter_config.json beside adapter_model.safetensors or adapter_model.bin."""

import math
import re
import reprlib
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import msgspec

from export.checkpoints.adapters.lora import Adapter, LowRank
from export.checkpoints.advice import ADAPTER_CONFIG
from export.checkpoints.json_files import convert, read_json
from export.checkpoints.source import TensorSource
from export.checkpoints.tensors.joined_tensors import open_tensor_file
from runtime.errors import UserError

WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")  # in the order in which peft looks for them
PREFIX = "base_model.model."
TENSOR = re.compile(r"(?P<module>.+)\.(?P<kind>lora_[A-Za-z_]+?)(\.default)?(\.weight)?")
REPLACED = re.compile(r"(\.base_layer|\.modules_to_save(\.default)?)(?=\.(weight|bias)$)")  # what may stand before it
MATRICES, EMBEDDING = ("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")
MAGNITUDE = "lora_magnitude_vector"
PLAIN_PATTERN = re.compile(r"[\w.^$\\-]+")  # patterns without repetition, which match in bounded time
# Settings under which merging is more than the arithmetic of `lora.py`, or not possible.
UNSUPPORTED = (
    "fan_in_fan_out", "lora_bias", "layer_replication", "megatron_config", "target_parameters", "arrow_config",
    "alora_invocation_tokens", "trainable_token_indices",
)  # fmt: skip
# What matrices were before training. Others, such as pissa, olora and loftq, change the base too.
INITIAL = (None, True, False, "gaussian", "eva", "orthogonal")
ALPHA_LIMIT = 1e30  # within float32; usual ones are below 1000
KNOWN_USES = ("use_rslora", "use_dora")


class _Config(msgspec.Struct, frozen=True):
    """The part of adapter_config.json that we use."""

    peft_type: str
    r: Annotated[int, msgspec.Meta(ge=1)] = 8
    lora_alpha: float = 8.0
    use_rslora: bool | None = None
    use_dora: bool | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    init_lora_weights: bool | str | None = None


def peft_files(folder: Path) -> tuple[Path, ...]:
    """The configuration and the weights of an adapter; raises `UserError` if it has no weights."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / ADAPTER_CONFIG, folder / name
    raise UserError(f"{folder} has neither {' nor '.join(WEIGHT_FILES)}; fetch the adapter again")


def open_peft(folder: Path) -> Adapter:
    """Read an adapter's configuration and the headers of its tensors.

    Raises `UserError` for anything malformed, and for settings and tensors that `lora.py` does not cover.
    """
    config_file, weights = peft_files(folder)
    config = _read_config(config_file)
    source = open_tensor_file(weights)
    modules: dict[str, dict[str, str]] = defaultdict(dict)
    replacements = {}
    for name in source.tensors:
        plain = name.removeprefix(PREFIX)
        match = TENSOR.fullmatch(plain)
        if match is None:
            replacements[REPLACED.sub("", plain)] = name
        else:
            modules[match["module"]][match["kind"]] = name
    changes = {f"{module}.weight": _change(module, held, config, source, weights) for module, held in modules.items()}
    return Adapter(folder, source, changes, replacements)


def _read_config(path: Path) -> _Config:
    given = read_json(path)
    kind = given.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{path} has peft_type: {kind!r}, expected 'LORA'; merge the adapter with peft")
    unsupported = [key for key in given if key in UNSUPPORTED or (key.startswith("use_") and key not in KNOWN_USES)]
    for key in unsupported:
        if given[key]:
            raise UserError(
                f"{path} has {key}: {reprlib.repr(given[key])}, which is not supported; expected null or false; "
                "merge the adapter with peft"
            )
    config = convert(given, _Config, path)
    if config.init_lora_weights not in INITIAL:
        raise UserError(
            f"{path} has init_lora_weights: {config.init_lora_weights!r}, which changed the base as well, expected "
            f"{', '.join(str(value).lower() for value in INITIAL[1:])}; convert the adapter with peft"
        )
    return config


def _change(module: str, held: Mapping[str, str], config: _Config, source: TensorSource, weights: Path) -> LowRank:
    """The change of one module; `held` are its tensors in the adapter, by kind."""
    wanted = EMBEDDING if EMBEDDING[0] in held else (*MATRICES, MAGNITUDE) if config.use_dora else MATRICES
    if set(held) != set(wanted):
        raise UserError(
            f"{weights} holds {', '.join(sorted(held))} of {module}, expected {' and '.join(wanted)}; "
            "fetch the adapter again, or merge it with peft"
        )
    down, up = held[wanted[0]], held[wanted[1]]
    rank = next(iter(source.tensors[down].shape), 0)
    ranks = {config.r, *(config.rank_pattern or {}).values()}
    if rank < 1 or rank not in ranks:
        raise UserError(
            f"{weights}: {down} has a rank of {rank}, expected {' or '.join(map(str, sorted(ranks)))} by "
            f"{ADAPTER_CONFIG}; fetch the adapter again"
        )
    alpha = _alpha(module, config, weights)
    if not abs(alpha) <= ALPHA_LIMIT:
        raise UserError(
            f"{weights.parent / ADAPTER_CONFIG} gives {module} an alpha of {alpha}, expected a number up to "
            f"{ALPHA_LIMIT:.0e}; fetch the adapter again"
        )
    scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
    return LowRank(down, up, scaling, held.get(MAGNITUDE), is_embedding=wanted is EMBEDDING)


def _alpha(module: str, config: _Config, weights: Path) -> float:
    """The numerator of a module's scaling: that of the first pattern that its name ends with."""
    for pattern, alpha in (config.alpha_pattern or {}).items():
        if not PLAIN_PATTERN.fullmatch(pattern):
            raise UserError(
                f"{weights.parent / ADAPTER_CONFIG} has {reprlib.repr(pattern)} in alpha_pattern, expected names of "
                "modules; merge the adapter with peft"
            )
        if _matches(pattern, module):
            return alpha
    return config.lora_alpha


def _matches(pattern: str, module: str) -> bool:
    """Whether a pattern is a module's name or its end, as `get_pattern_key` of peft reads it."""
    try:
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    except re.error:
        return False
