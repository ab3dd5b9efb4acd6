"""The contract between the stages: what a model is, what its graphs take and return, what an artifact holds.

Every type is frozen. `Manifest` is the content of `manifest.json`; reading it checks every key and type.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from runtime.artifact.build_number import LARGEST
from runtime.artifact.caches import CACHE_NAMES, RING_BLOCK
from runtime.artifact.rotary import QueryScaling, RopeScaling
from runtime.artifact.schemes import COARSEST_FIRST, DEFAULT_METHOD, SCHEMES, Rounding, RoundingMethod, SchemeName
from runtime.artifact.targets import CacheDType, StorageDType, TargetKind
from runtime.errors import UserError

SCHEMA_VERSION = 9

Count = Annotated[int, msgspec.Meta(ge=1, le=2**40)]
# Far beyond any model; they refuse absurd counts before anything is made for each layer, expert or token.
LAYER_LIMIT, EXPERT_LIMIT, VOCABULARY_LIMIT = 4096, 1024, 2**24
Layers = Annotated[int, msgspec.Meta(ge=1, le=LAYER_LIMIT)]
Experts = Annotated[int, msgspec.Meta(ge=1, le=EXPERT_LIMIT)]
Vocabulary = Annotated[int, msgspec.Meta(ge=1, le=VOCABULARY_LIMIT)]
BuildNumber = Annotated[int, msgspec.Meta(ge=0, le=LARGEST)]
Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
MOST_SPECIAL_TOKENS = 1024
TokenName = Annotated[str, msgspec.Meta(max_length=1024)]
SpecialTokens = Annotated[dict[str, TokenName], msgspec.Meta(max_length=2 * MOST_SPECIAL_TOKENS)]
InstructVersion = Literal["v1", "v2", "v3", "v7", "v11", "v13", "v15"]  # rows of instruct_formats
DType = Literal["float32", "float16", "bfloat16", "float8_e4m3fn", "int8", "uint8", "uint16", "int32", "int64"]
KeptPart = Literal["head", "first", "last"]
HeadName = Literal["causal_lm", "sequence_classification", "token_classification", "question_answering", "embedding"]
Pool = Literal["last", "mean"]  # the last token's state, or the mean over all tokens
LabelScores = Literal["softmax", "sigmoid", "logits"]
# What a SentencePiece model does with text behind a token that was added to it: goes on with the word before it, takes
# it for a text of its own with a space in front, or takes it as it is.
TextAfterAdded = Literal["joined", "spaced", "bare"]


@dataclass(frozen=True)
class Head:
    """The head on top of the decoder: its tensors, and the outputs of a graph."""

    output: str  # name of the graphs' first output, float32 (B, tokens, n_outputs)
    size: str  # the field of `ModelConfig` that counts its outputs
    tensors: tuple[str, ...]  # its own tensors; none if it is tied or returns the normed state as it is
    every_token: bool  # outputs for each token of a call, or only for the last one
    command: str  # the runtime's module that uses it


HEADS: Mapping[str, Head] = {
    "causal_lm": Head("logits", "vocab_size", ("output.weight",), every_token=False, command="runtime.generate"),
    "sequence_classification": Head(
        "label_logits", "n_labels", ("output.weight",), every_token=False, command="runtime.classify"
    ),
    "token_classification": Head(
        "label_logits", "n_labels", ("output.weight", "output.bias"), every_token=True, command="runtime.classify"
    ),
    "question_answering": Head(
        "span_logits", "n_labels", ("output.weight", "output.bias"), every_token=True, command="runtime.classify"
    ),
    "embedding": Head("hidden_states", "dim", (), every_token=True, command="runtime.embed"),
}


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every type in the manifest: frozen, keyword-only, no unknown keys."""


class ModelConfig(Record, frozen=True):
    """Hyper-parameters of a Mistral-family decoder; all of them are known when one is created."""

    family: str
    dim: Count
    hidden_dim: Count
    n_layers: Layers
    n_heads: Count
    n_kv_heads: Count
    head_dim: Count
    vocab_size: Vocabulary
    norm_eps: float
    rope_theta: float
    sliding_window: tuple[Count | None, ...]  # one entry per layer; None means full attention
    tied_embeddings: bool
    n_experts: Experts | None = None  # feed-forwards of a mixture; None for a dense model
    experts_per_token: Experts | None = None
    context_length: Count | None = None  # positions that the model was trained for, if the checkpoint says so
    head: HeadName = "causal_lm"
    n_labels: Count | None = None  # for classification; for question answering 2, the start and the end
    labels: tuple[str, ...] | None = None  # their names, if the checkpoint has them
    label_scores: LabelScores = "softmax"  # how a sequence's label logits become its labels' scores
    rope_scaling: RopeScaling | None = None  # None: the frequencies of `rope_theta` as they are
    query_scaling: QueryScaling | None = None
    pool: Pool = "last"  # how an embedding model's hidden states become one vector, unless a command says otherwise
    normalize: bool = False  # whether that vector is scaled to length 1

    @property
    def n_outputs(self) -> int:
        """How many numbers the head returns for a token."""
        size = getattr(self, HEADS[self.head].size)
        assert isinstance(size, int), f"{self.head} without {HEADS[self.head].size}"
        return size

    @property
    def generates(self) -> bool:
        """Whether the head generates text, so that there is a decode graph; any other head is for whole texts."""
        return self.head == "causal_lm"

    @property
    def group(self) -> int:
        """How many query heads share one key-value head."""
        return self.n_heads // self.n_kv_heads

    @property
    def every_layer_windowed(self) -> bool:
        """Whether every layer has a sliding window, so that a text of any length fits the caches."""
        return all(self.sliding_window)

    def cache_lens(self, cache_len: int) -> tuple[int, ...]:
        """Columns that each layer attends over: its sliding window, or `cache_len` under full attention.

        If any layer attends to everything, no position goes beyond `cache_len`: then a longer window never slides and
        needs no more columns.
        """
        limit = cache_len if None in self.sliding_window else None
        return tuple(min(window or cache_len, limit or window or cache_len) for window in self.sliding_window)

    def ring_lens(self, cache_len: int, longest_call: int) -> tuple[int, ...]:
        """Columns of each layer's ring, in whole blocks.

        A call writes its columns before its rows attend, so a ring that wraps holds as many more than its window as a
        call may add to a slot, less one. A ring without a wrap holds all positions.
        """
        limit = cache_len if None in self.sliding_window else None
        needed = (window + longest_call - 1 for window in self.cache_lens(cache_len))
        return tuple(-(-min(length, limit or length) // RING_BLOCK) * RING_BLOCK for length in needed)


class TensorSpec(Record, frozen=True):
    """Name, shape and dtype of one tensor at a graph's boundary."""

    name: str
    shape: tuple[Count, ...]
    dtype: DType


IDS, POSITIONS, SLOTS, COLUMN = "input_ids", "position_ids", "slots", "column"
CALL_INPUTS = (IDS, POSITIONS, SLOTS, COLUMN)  # what each call is given; caches and weights stay the same


class Signature(Record, frozen=True):
    """Ordered inputs and outputs of one graph or function, weights left out."""

    inputs: tuple[TensorSpec, ...]  # those of a call, then the caches
    outputs: tuple[TensorSpec, ...]

    @property
    def call(self) -> tuple[TensorSpec, ...]:
        """The inputs that each call is given."""
        return tuple(spec for spec in self.inputs if spec.name in CALL_INPUTS)

    @property
    def caches(self) -> tuple[TensorSpec, ...]:
        """The caches of layer 0, layer 1 and so on, key and value by turns; see `runtime.artifact.caches`."""
        return self.inputs[len(self.call) :]


class Graph(Record, frozen=True):
    """One ONNX graph: its name, the rows of a call (B), the tokens that a call takes of each (T), and its signature.

    Prefill takes T tokens of one sequence, a step takes one token of each of its rows.
    """

    name: str
    rows: Count
    tokens: Count
    signature: Signature


class Function(Graph, frozen=True):
    """One compiled function: what the graph of its name computes, on rings that hold the columns of every slot."""


class WeightSpec(Record, frozen=True):
    """One tensor of `weights.safetensors`, in the order in which every compiled function takes it."""

    name: str
    shape: tuple[Count, ...]
    dtype: DType
    layout: str  # "row_major", or a packed layout of `runtime.artifact.layouts`


class Shape(Record, frozen=True):
    """Static sizes that the artifact was compiled for."""

    slots: Count  # sequences whose tokens the caches hold
    step_rows: tuple[Count, ...]  # rows that steps take, ascending
    prefill_chunks: tuple[Count, ...]  # tokens that prefill calls take, descending
    cache_len: Count

    @property
    def longest_call(self) -> int:
        """The most tokens that one call adds to one slot."""
        return max(*self.prefill_chunks, *self.step_rows)


class Quantization(Record, frozen=True):
    """How the weights were stored."""

    scheme: SchemeName
    group_size: Count = 32  # of int4
    symmetric: bool = True  # int4 without zero points
    keep: tuple[KeptPart, ...] = ()  # parts of the model that are stored with `keep_scheme`
    keep_scheme: SchemeName = "int8"
    whole_products: bool = False  # carried weights meet activations of 16 bits, so that products are of whole numbers
    method: RoundingMethod | None = None  # by which numbers were rounded to 4 bits, if any were

    @property
    def rounding(self) -> Rounding:
        """The coarsest rounding of activations."""
        found = {self.rounding_of(name) for name in (self.scheme, *([self.keep_scheme] if self.keep else []))}
        return next(rounding for rounding in COARSEST_FIRST if rounding in found)

    def rounding_of(self, scheme: SchemeName) -> Rounding:
        """How activations are rounded before products with the weights that a scheme stores."""
        chosen = SCHEMES[scheme]
        if chosen.rounding != "none":
            return chosen.rounding
        return "int16" if chosen.carries and self.whole_products else "none"

    @property
    def carries(self) -> bool:
        """Whether matrices keep the numbers of a quantized checkpoint."""
        return SCHEMES[self.scheme].carries or (bool(self.keep) and SCHEMES[self.keep_scheme].carries)

    @property
    def grouped(self) -> bool:
        """Whether some numbers are rounded in groups."""
        return SCHEMES[self.scheme].grouped or (bool(self.keep) and SCHEMES[self.keep_scheme].grouped)

    @property
    def label(self) -> str:
        """The scheme and its non-default settings, in a few words."""
        groups = (
            f" group {self.group_size}{'' if self.symmetric else ' asymmetric'}" if SCHEMES[self.scheme].grouped else ""
        )
        method = "" if self.method in (None, DEFAULT_METHOD) else f", {self.method}"
        return self.scheme + groups + (f", {' '.join(self.keep)} {self.keep_scheme}" if self.keep else "") + method


class CpuLevel(Record, frozen=True):
    """A processor that host code was compiled for."""

    cpu: str  # LLVM's name for it, such as x86-64-v4
    features: tuple[str, ...]  # /proc/cpuinfo flags that the code needs


class TargetSpec(Record, frozen=True):
    """The machine that the libraries were compiled for."""

    kind: TargetKind
    dtype: StorageDType  # storage of weights and caches
    cpu: str  # LLVM's name for the lowest CPU level, such as x86-64-v3
    cpu_features: tuple[str, ...]  # /proc/cpuinfo flags that the host code of this level needs
    arch: tuple[str, ...] = ()  # CUDA architectures with machine code inside, such as sm_80
    better_levels: tuple[CpuLevel, ...] = ()  # further CPU levels, each with a library of its own, the best one last

    @classmethod
    def of(
        cls, levels: Sequence[CpuLevel], *, kind: TargetKind, dtype: StorageDType, arch: tuple[str, ...]
    ) -> "TargetSpec":
        """A target with these CPU levels, the lowest first."""
        lowest, *better = levels
        return cls(
            kind=kind,
            dtype=dtype,
            cpu=lowest.cpu,
            cpu_features=lowest.features,
            arch=arch,
            better_levels=tuple(better),
        )

    @property
    def levels(self) -> tuple[CpuLevel, ...]:
        """All CPU levels, the lowest first."""
        return (CpuLevel(cpu=self.cpu, features=self.cpu_features), *self.better_levels)

    def at(self, level: CpuLevel) -> "TargetSpec":
        """The same target with one level alone."""
        return msgspec.structs.replace(self, cpu=level.cpu, cpu_features=level.features, better_levels=())


class KernelUsage(Record, frozen=True):
    """Multiprocessor resources that one CUDA kernel uses on one architecture, as the assembler reports them."""

    kernel: str
    arch: str
    registers: int  # per thread
    shared_bytes: int  # per block, static
    stack_bytes: int  # per thread
    spill_bytes: int  # per thread, stores and loads


class KernelCall(Record, frozen=True):
    """A CUDA kernel that is called: what it computes, on which tensors, and how often.

    `runtime.gpucheck` runs each by itself.
    """

    kernel: str  # its name in the library
    op: str  # a row of `build/kernels/table.py`
    arguments: tuple[Any, ...]  # of the function that makes the kernel, as JSON
    parameters: tuple[TensorSpec, ...]  # in order: inputs, the output, scratch that it keeps between its steps
    calls: dict[str, int]  # by function
    bytes: int  # least memory traffic of one call: weights and caches read
    flops: int


class TokenizerSpec(Record, frozen=True):
    """The tokenizer file that the artifact contains, and how prompts begin and end."""

    kind: Literal["tokenizer.json", "sentencepiece"]
    file: str
    bos_id: int | None
    add_bos: bool
    eos_ids: tuple[int, ...]
    chat_template: str | None = None  # file name of a Jinja template; None for a base model
    instruct: InstructVersion | None = None  # the format of conversations; it takes precedence over the template
    end_id: int | None = None  # follows a whole text that is classified or embedded; never follows a prompt
    # Variables of a template, such as {"eos_token": "<|im_end|>"}; None: the names of bos_id and of the first eos_id.
    special_tokens: SpecialTokens | None = None
    model_settings: str | None = None  # JSON that the instruct format v15 writes before the first user message
    text_after_added: TextAfterAdded = "joined"


class ParityRow(Record, frozen=True):
    """One rung of the correctness ladder: what was compared and how far apart the two were."""

    rung: str
    compared: str
    max_abs: float
    max_rel: float
    top1_agreement: float  # share of steps whose highest logit is the same token
    bound: float  # on max_rel
    passed: bool


class FileEntry(Record, frozen=True):
    """One file of the artifact. `blocks` are SHA-256 sums of each 16 MiB block, for hashing in parallel."""

    path: str
    size: Annotated[int, msgspec.Meta(ge=0, le=2**50)]
    sha256: Sha256
    blocks: tuple[Sha256, ...] = ()


class Manifest(Record, frozen=True):
    """Everything that the runtime needs to know, and everything that can be checked before it runs the artifact."""

    schema_version: int
    name: str
    build_key: str  # identifies the inputs, code and tools that made this artifact
    model: ModelConfig
    shape: Shape
    quantization: Quantization
    target: TargetSpec
    functions: tuple[Function, ...]
    weights: tuple[WeightSpec, ...]
    tokenizer: TokenizerSpec | None
    overrides: dict[
        str, int | float | str | bool | tuple[int | None, ...] | None
    ]  # model fields that the YAML overrides
    tools: dict[str, str]  # versions of the tools that made it, "apache-tvm" and "apache-tvm-ffi" among them
    files: tuple[FileEntry, ...]  # every file but manifest.json and manifest.sig
    parity: tuple[ParityRow, ...] | None = None  # None until `make parity` has run
    kernels: tuple[KernelUsage, ...] = ()  # CUDA only, by name and architecture
    calls: tuple[KernelCall, ...] = ()  # CUDA only, one for each of our kernels
    golden: str | None = None  # the file of golden prompts (`runtime.artifact.golden`); None until `make ship` has run
    build_number: BuildNumber = 0  # of `make ship BUILD=...`; boxes refuse one that is smaller than they ask for

    @property
    def caches(self) -> tuple[TensorSpec, ...]:
        """The caches that all functions share."""
        return self.functions[0].signature.caches

    @property
    def cache_dtype(self) -> CacheDType:
        """How keys and values are stored."""
        return CACHE_NAMES[self.caches[0].dtype]


T = TypeVar("T", bound=Record)


def to_json(record: Record) -> bytes:
    """Write a record as JSON with a fixed key order: a line for each field, and for each entry of a list of records."""
    fields = [_field_line(name, msgspec.to_builtins(getattr(record, name))) for name in record.__struct_fields__]
    return b"{\n" + b",\n".join(fields) + b"\n}\n"


def _field_line(name: str, value: object) -> bytes:
    encode = msgspec.json.encode
    if isinstance(value, list | tuple) and value and isinstance(value[0], dict):
        return encode(name) + b": [\n " + b",\n ".join(map(encode, value)) + b"\n]"
    return encode(name) + b": " + encode(value)


def from_json(data: bytes, kind: type[T], where: str) -> T:
    """Read a record from JSON; `where` names the file in the `UserError` that is raised if the record is not valid."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{where} is not a valid {kind.__name__.lower()}: {error}; compile the artifact again"
        ) from error
