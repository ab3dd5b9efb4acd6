"""Turns one YAML file and its `--set` overrides into one `CompileConfig`: what to compile, and for which machine.

A setting is one field of a section below. Its `description` is what an error message names as expected; its `title`
says what the setting means, for docs/configuration.md (`export.configuration.reference`). The valid keys, the printed
defaults and the overrides follow from the field.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from functools import reduce
from os.path import expanduser
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from export.configuration.errors import CONFLICT, explain
from export.configuration.yaml_source import read_yaml, with_override, yaml_text
from export.weights.table import FORMATS
from runtime.artifact.manifest import KeptPart
from runtime.artifact.schemes import DEFAULT_METHOD, SCHEMES, RoundingMethod, Scheme, SchemeName
from runtime.artifact.targets import TARGETS, CacheDType, StorageDType, TargetKind
from runtime.errors import UserError

DEFAULT_CHUNKS = (128, 16)
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
MOST_SLOTS = 1024
MAX_COUNT = 2**31 - 1  # the largest 32-bit position
MOST_WORKERS = 256
A_COUNT = f"a whole number from 1 to {MAX_COUNT}"


def _check_distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) != len(values):
        raise ValueError(values)
    return values


def _path(value: object) -> object:
    return Path(expanduser(value)) if isinstance(value, str) and value.strip() else value


def _listed(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _listed_or_one(value: object) -> object:
    return (value,) if isinstance(value, int) else _listed(value)


def _listed_or_name(value: object) -> object:
    return (value,) if isinstance(value, str) else _listed(value)


def _descending(values: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(values, reverse=True))


def _ascending_from_one(values: tuple[int, ...]) -> tuple[int, ...]:
    rows = tuple(sorted(values))
    if rows[0] != 1:
        raise ValueError(values)
    return rows


KEPT: tuple[str, ...] = get_args(KeptPart)


def one_of(names: Sequence[str]) -> str:
    """Join names as in a sentence: a, b or c."""
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


ONE_SCHEME = one_of(tuple(SCHEMES))
Name = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Workers = Annotated[int, Field(ge=1, le=MOST_WORKERS)]
FilePath = Annotated[Path, BeforeValidator(_path)]
Kept = Annotated[tuple[KeptPart, ...], BeforeValidator(_listed), AfterValidator(_check_distinct)]
Budget = Annotated[float, Field(gt=0, strict=False, allow_inf_nan=False)]
Arch = Annotated[str, Field(pattern=r"^sm_[0-9]{2,3}a?$")]
Archs = Annotated[tuple[Arch, ...], BeforeValidator(_listed), AfterValidator(_check_distinct)]
Cpus = Annotated[
    tuple[Name, ...], Field(min_length=1), BeforeValidator(_listed_or_name), AfterValidator(_check_distinct)
]
Chunks = Annotated[
    tuple[Count, ...],
    Field(min_length=1),
    BeforeValidator(_listed_or_one),
    AfterValidator(_check_distinct),
    AfterValidator(_descending),
]


StepRows = Annotated[
    tuple[Count, ...],
    Field(min_length=1),
    BeforeValidator(_listed_or_one),
    AfterValidator(_check_distinct),
    AfterValidator(_ascending_from_one),
]


def _conflict(key: str, message: str) -> PydanticCustomError:
    """The error for a rule between settings, reported at `key`, a key of the section that checks the rule."""
    return PydanticCustomError(CONFLICT, "{message}", {"key": key, "message": message})


def _not_compiled(key: str, found: str, target: str, possible: Sequence[str]) -> PydanticCustomError:
    """The error for a value that the target's kernels do not support."""
    return _conflict(key, f"is {found}, which this version does not compile for {target}; use {one_of(possible)}")


def schemes_of(target: TargetKind) -> tuple[SchemeName, ...]:
    """The schemes that a target's kernels support: they read the format and, if it asks for that, round activations."""
    row = TARGETS[target]

    def reads(scheme: Scheme) -> bool:
        return scheme.format is None or row.layout in FORMATS[scheme.format].packings

    return tuple(name for name, s in SCHEMES.items() if reads(s) and (row.rounds_activations or s.rounding == "none"))


class Section(BaseModel):
    """Base of every mapping in the YAML: frozen, strict types, no unknown keys; an empty section gets its defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _empty_section(cls, data: object) -> object:
        return {} if data is None else data


class FrontendConfig(Section):
    """Where the weights come from. `overrides` replace fields of the checkpoint's own model configuration."""

    checkpoint: FilePath = Field(
        description="the path of a checkpoint folder or file, as text",
        title="A Hugging Face folder, a folder in Mistral's own format, or a `.gguf` file: of several parts, any one. "
        "A relative path starts from the folder in which the command runs.",
    )
    type: Literal["auto", "huggingface", "mistral", "gguf"] = Field(
        default="auto", title="Format of the checkpoint; `auto` recognizes it by its files."
    )
    head: Literal[
        "auto", "causal_lm", "sequence_classification", "token_classification", "question_answering", "embedding"
    ] = Field(
        default="auto",
        title="The head on top of the decoder. `auto` takes the one that the checkpoint names; `embedding` turns a "
        "language model into an embedding model.",
    )
    adapter: FilePath | None = Field(
        default=None,
        description="the path of an adapter's folder, as text, or null",
        title="A LoRA adapter that is merged into the weights as they are read, as peft merges it: a folder with "
        "`adapter_config.json` for a Hugging Face folder, or with mistral-finetune's `lora.safetensors` for one in "
        "Mistral's own format. The tokenizer is the checkpoint's.",
    )
    instruct: bool = Field(
        default=False,
        title="Whether a model with Mistral's own tokenizer and without a chat template was tuned for conversations: "
        "any in Mistral's own format, and a Hugging Face folder with a `tekken.json`, for example. Its files do not "
        "say so, and without `true` it gets no chat format.",
    )
    chat_template: FilePath | None = Field(
        default=None,
        description="the path of a file with a Jinja template, as text, or null",
        title="A file whose chat template replaces the checkpoint's own, or any other chat format that it has. A "
        "relative path starts from the folder in which the command runs.",
    )
    overrides: Mapping[str, bool | int | FiniteFloat | str | list[int | None] | None] = Field(
        default_factory=dict,
        description="a number, text, true, false, null or a list of windows for each model field",
        title="Fields of the model that replace the checkpoint's own: `sliding_window` (a number, null, or a list that "
        "repeats over the layers), `rope_theta`, `norm_eps`, `context_length`. The manifest records them.",
    )

    @model_validator(mode="after")
    def _one_chat_format(self) -> Self:
        if self.instruct and self.chat_template is not None:
            raise _conflict(
                "chat_template",
                f"is {self.chat_template}, but frontend.instruct asks for the tokenizer's own chat format; "
                "remove one of the two",
            )
        return self


class ShapeConfig(Section):
    """The sizes that are fixed in the artifact; `prefill_chunks` is the YAML's `prefill_chunk` in descending order."""

    slots: Annotated[int, Field(ge=1, le=MOST_SLOTS)] = Field(
        default=1,
        description=f"a whole number from 1 to {MOST_SLOTS}",
        title="Sequences that the artifact holds at a time, each in a slot with caches of its own. Sequences come and "
        "go at any step.",
    )
    step_rows: StepRows | None = Field(
        default=None,
        description="a list of different whole numbers that begins with 1, or none for the default",
        title="Rows that a step may have; a row is one token of one slot, and several rows of a slot check a guess of "
        "what follows. By default the powers of two as far as `shape.slots` goes, to 16 on a CPU and to 128 on CUDA.",
    )
    prefill_chunks: Chunks = Field(
        default=DEFAULT_CHUNKS,
        alias="prefill_chunk",
        description=f"{A_COUNT}, or a list of different ones",
        title="Tokens of a prompt that one call takes, at most `shape.cache_len`. If there are several sizes, a prompt "
        "is divided into those that take the least time.",
    )
    cache_len: Count = Field(
        default=4096,
        description=A_COUNT,
        title="Tokens that a slot holds in a layer without a sliding window; a full one ends the generation. A layer "
        "with a window keeps as many as its window and one call, and the text may be of any length.",
    )

    @model_validator(mode="after")
    def _chunks_fit(self) -> Self:
        largest = self.prefill_chunks[0]
        if largest > self.cache_len:
            remedy = f"set shape.prefill_chunk to at most {self.cache_len}, or shape.cache_len to at least {largest}"
            raise _conflict(
                "prefill_chunk", f"holds {largest}, which exceeds shape.cache_len ({self.cache_len}); {remedy}"
            )
        return self


class QuantizeConfig(Section):
    """How the weights are stored."""

    scheme: SchemeName = Field(
        default="source",
        description=ONE_SCHEME,
        title="How matrices are stored. `source`: those that the checkpoint has quantized keep their numbers, and all "
        "others are stored as `backend.dtype`. `none`: every matrix as `backend.dtype`. `bf16_dot`: bf16, and "
        "activations are rounded to bf16 too before they are multiplied, for the instructions that multiply both. "
        "`int8` and `fp8` (e4m3): one fp32 scale for each output channel; `fp8` takes as much space and loses more. "
        "`int4`: one fp16 scale for each group. `source_dynamic`, `int8_dynamic` and `int4_dynamic` store the same "
        "weights and also round activations to int8, with one scale for each group of each token: the weights' own "
        "groups, or 64 numbers for weights without groups. A head takes its activations unrounded. Where the layers "
        "have 4 bits, the head has 8, unless `quantize.keep` names it.",
    )
    group_size: Literal[32, 64, 128] = Field(default=32, title="For int4: how many neighbours in a row share a scale.")
    symmetric: bool = Field(default=True, title="For int4: `false` adds a zero point to each group.")
    keep: Kept = Field(
        default=(),
        description=f"a list of {', '.join(KEPT)}",
        title="Parts of the model to store by `quantize.keep_scheme` instead: the head, the first or the last layer.",
    )
    keep_scheme: SchemeName = Field(
        default="int8", description=ONE_SCHEME, title="The scheme for the parts in `quantize.keep`."
    )
    method: RoundingMethod = Field(
        default=DEFAULT_METHOD,
        description=one_of(get_args(RoundingMethod)),
        title="For int4: how numbers are rounded. `search` gives each group the scale that minimizes the squared error "
        "of its numbers; `weighted_search` counts the error of each column by how large its inputs are on the "
        "calibration text, which takes one pass of 2048 tokens through the model; `gptq` also lets the columns that "
        "are not rounded yet make up for the error of those that are, layer by layer, which takes longer. A checkpoint "
        "without a tokenizer gets `search`.",
    )
    calibration: FilePath | None = Field(
        default=None,
        description="the path of a text file or of a .jsonl file, as text, or null",
        title="The text that `quantize.method` reads, in UTF-8: a file that is one text, or one whose name ends with "
        "`.jsonl`, `.ndjson` or `.json` and whose lines are objects with a `text`. By default it is the part of "
        "Newton's Opticks that `make quality` does not read. A relative path starts from the folder in which the "
        "command runs.",
    )
    cache: Literal["auto", "fp32", "fp16", "fp8", "int8", "int4"] = Field(
        default="auto",
        title="How keys and values are stored. `auto`: as `backend.dtype`, or fp16 if that is bf16. `fp8` is e4m3 "
        "without scales, and what is beyond 448 is stored as 448. `int8` has one scale for each head of each token; "
        "`int4` has a scale and a minimum for every 32 of its numbers, so that head_dim must be a multiple of 32.",
    )
    budget: Budget | None = Field(
        default=None,
        description="a percentage above 0, or null",
        title="The increase in perplexity, in percent, that the scheme may cost; `make quality` fails beyond it.",
    )


class BackendConfig(Section):
    """The machine that runs the artifact. `dtype` is the storage of weights and caches; `arch` is empty for llvm."""

    target: TargetKind = Field(title="`llvm`: an x86-64 CPU. `cuda`: an NVIDIA GPU.")
    cpu: Cpus = Field(
        default_factory=lambda given: TARGETS[given["target"]].cpus,
        description="LLVM's name of a CPU level, such as x86-64-v3, znver4 or native, or a list of different ones",
        title="The CPU levels that the host code is compiled for, each in a library of its own over the same weights; "
        "a box runs the best one that it has, and opening the artifact checks that it has the lowest. A level at which "
        "every kernel is the same as at a lower one is left out. `native` is this machine's best. For CUDA, one level.",
    )
    arch: Archs = Field(
        default_factory=lambda given: TARGETS[given["target"]].archs,
        description="a list of different CUDA architectures, such as [sm_80, sm_90a]",
        title="For CUDA: the architectures that the library holds machine code for. With sm_90a alone, prefills use "
        "instructions that no other has.",
    )
    dtype: StorageDType = Field(
        default_factory=lambda given: TARGETS[given["target"]].dtypes[0],
        description="fp32, fp16 or bf16",
        title="Storage of every matrix to which no scheme applies, and of the caches, unless `quantize.cache` says "
        "otherwise.",
    )

    @model_validator(mode="after")
    def _arch_is_for_the_target(self) -> Self:
        known = TARGETS[self.target].archs
        if self.arch and not known:
            other = one_of([name for name, target in TARGETS.items() if target.archs])
            found = f"is for {other}, but backend.target is {self.target}"
            raise _conflict("arch", f"{found}; remove backend.arch, or make it []")
        if known and not self.arch:
            found = f"is empty, but backend.target is {self.target}"
            raise _conflict("arch", f"{found}; list an architecture, such as [{known[0]}], or remove backend.arch")
        return self

    @model_validator(mode="after")
    def _host_code_beside_a_device_has_one_level(self) -> Self:
        if len(self.cpu) > 1 and TARGETS[self.target].on_device:
            found = f"lists {', '.join(self.cpu)}, but backend.target is {self.target}, whose host code has one level"
            raise _conflict("cpu", f"{found}; name the lowest that a box may have")
        return self

    @model_validator(mode="after")
    def _dtype_is_built(self) -> Self:
        if self.dtype not in TARGETS[self.target].dtypes:
            raise _not_compiled("dtype", self.dtype, self.target, TARGETS[self.target].dtypes)
        return self


class WorkspaceConfig(Section):
    """Where intermediate files go, and how many threads pack weights (`workers: null` means all cores)."""

    path: FilePath = Field(
        default=Path("out/.work"),
        description="the path of a folder, as text",
        title="Folder for the stages' results, which the next compile reuses.",
    )
    workers: Workers | None = Field(
        default=None,
        description=f"a whole number from 1 to {MOST_WORKERS}, or null for all cores",
        title="Threads that pack weights.",
    )


class CompileConfig(Section):
    """All settings of one compile, with every default filled in."""

    name: Name = Field(
        description="text of letters, digits, '.', '_' and '-', no leading dot, in quotes if it looks like a number",
        title="The artifact's name for itself. Its folder is named after the YAML file: `x.yaml` compiles to `out/x`.",
    )
    frontend: FrontendConfig = Field(title="Where the model comes from.")
    shape: ShapeConfig = Field(default=ShapeConfig(), title="The sizes that are fixed in the artifact.")
    quantize: QuantizeConfig = Field(default=QuantizeConfig(), title="How weights, keys and values are stored.")
    backend: BackendConfig = Field(title="The machine that runs the artifact.")
    workspace: WorkspaceConfig = Field(
        default=WorkspaceConfig(), title="The compile itself; nothing here changes the artifact."
    )

    @model_validator(mode="after")
    def _storage_is_built(self) -> Self:
        kind, quantize = self.backend.target, self.quantize
        for key, scheme in (("quantize.scheme", quantize.scheme), ("quantize.keep_scheme", quantize.keep_scheme)):
            if scheme not in schemes_of(kind):
                raise _not_compiled(key, scheme, kind, schemes_of(kind))
        if quantize.cache not in ("auto", *TARGETS[kind].caches):
            raise _not_compiled("quantize.cache", quantize.cache, kind, TARGETS[kind].caches)
        return self

    @property
    def cache_dtype(self) -> CacheDType:
        """How keys and values are stored."""
        if self.quantize.cache != "auto":
            return self.quantize.cache
        return "fp32" if self.backend.dtype == "fp32" else "fp16"


def load_config(path: Path, overrides: Sequence[str] = ()) -> CompileConfig:
    """Read a YAML file; each override is `key.path=value`, wins over the file, and replaces everything at its path.

    Raises a `UserError` that names the file and line (or the `--set`), the key, what was found and what was expected.
    """
    source = reduce(with_override, overrides, read_yaml(path))
    try:
        return CompileConfig.model_validate(source.data)
    except ValidationError as error:
        raise UserError(explain(error.errors(include_url=False), CompileConfig, source)) from error


def describe_defaults(config: CompileConfig) -> list[str]:
    """The whole config as lines of YAML, with `# default` on every value that neither the file nor a `--set` set."""
    return _describe(config, "")


def _describe(section: Section, indent: str) -> list[str]:
    values = section.model_dump(mode="json", by_alias=True)
    lines: list[str] = []
    for name, field in type(section).model_fields.items():
        key, value = field.alias or name, getattr(section, name)
        if isinstance(value, Section):
            lines += [f"{indent}{key}:", *_describe(value, indent + "  ")]
        else:
            lines.append(
                f"{indent}{key}: {yaml_text(values[key])}" + ("" if name in section.model_fields_set else "  # default")
            )
    return lines


def artifact_dir(config_path: Path) -> Path:
    """The folder that a config compiles to: `out/NAME` for `NAME.yaml`; raises `UserError` for an unsuitable name."""
    name = config_path.stem
    if not NAME.fullmatch(name):
        raise UserError(
            f"config {config_path} cannot name an artifact folder, "
            "expected letters, digits, '.', '_' and '-' in its name; rename it"
        )
    return Path("out") / name


def config_parser(description: str) -> argparse.ArgumentParser:
    """The argument parser of every command on a config: `config` (Path) and `overrides` (list of strings)."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("config", type=Path, help="YAML file, such as yaml/demo.yaml")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="set one value; may be repeated",
    )
    return parser


def stage_parser(description: str) -> argparse.ArgumentParser:
    """The argument parser of a command that compiles: adds `dump` (Path or None)."""
    parser = config_parser(description)
    parser.add_argument(
        "--dump", type=Path, metavar="DIR", help="write the intermediate form after each named step to this folder"
    )
    return parser
