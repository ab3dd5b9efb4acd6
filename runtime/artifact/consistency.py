"""Checks that a manifest agrees with itself: file names, model, graphs, weights, tokenizer, target. Opens no file."""

import re
from collections import Counter
from collections.abc import Iterator

from runtime.artifact.caches import CACHE_NAMES, cache_format
from runtime.artifact.hashing import n_blocks
from runtime.artifact.manifest import (
    HEADS,
    CpuLevel,
    FileEntry,
    Manifest,
    ModelConfig,
    Shape,
    TargetSpec,
    TensorSpec,
    TokenizerSpec,
    WeightSpec,
)
from runtime.artifact.signatures import functions_of, size_problems
from runtime.artifact.targets import TARGETS
from runtime.errors import UserError

MANIFEST_FILE = "manifest.json"
LIBRARY_FILE = "library.so"  # of the lowest CPU level
WEIGHTS_FILE = "weights.safetensors"
TOKENIZER_FILES = {"tokenizer.json": "tokenizer.json", "sentencepiece": "tokenizer.model"}  # by kind
CHAT_TEMPLATE_FILE = "chat_template.jinja"
LIBRARY_LIMIT = 2**30  # bytes; many times the size of machine code for every architecture
LONGEST_CALL = 2**24  # tokens; far beyond any chunk
READ_WHOLE_LIMIT = 2**28  # bytes of a tokenizer file, a template or golden prompts, which are read as a whole

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
# panels_P: (ceil(N / P), K, P) from (N, K), N padded with zeros. panels_PkJ: (ceil(N / P), ceil(K / J), P, J), J steps
# of K side by side. panels_PqJ: like panels_P, each int32 with J numbers of 4 bits. panels_PqJkI: like panels_PkI, of
# such words. A suffix xE: E such matrices, stacked.
_PANELS = re.compile(r"panels_([1-9][0-9]{0,3})(?:k([1-9][0-9]?)|q8(?:k([1-9]))?)?(?:x([1-9][0-9]{0,3}))?")
_LAYER = re.compile(r"layers\.(0|[1-9][0-9]*)\.")
_ARCH = re.compile(r"sm_[1-9][0-9]{1,2}[a-z]?")


def library_file(target: TargetSpec, level: CpuLevel) -> str:
    """The name of the library of one of the target's CPU levels."""
    return LIBRARY_FILE if level.cpu == target.cpu else f"library.{level.cpu}.so"


def check_manifest(manifest: Manifest, where: str) -> None:
    """Raise `UserError` for the first disagreement; `where` names the manifest's file."""
    for problem in _problems(manifest):
        raise UserError(f"{where}: {problem}; copy the artifact again or compile it again")


def _problems(manifest: Manifest) -> Iterator[str]:
    """Every disagreement as a clause, lazily: a later check may rely on the earlier ones."""
    yield from _file_problems(manifest)
    yield from _model_problems(manifest.model)
    yield from _function_problems(manifest)
    yield from _weight_problems(manifest)
    yield from tokenizer_problems(manifest.tokenizer, manifest.model.vocab_size)
    yield from _target_problems(manifest)


def _file_problems(manifest: Manifest) -> Iterator[str]:
    names = [entry.path for entry in manifest.files]
    for name, count in Counter(names).items():
        if not _NAME.fullmatch(name):
            yield (
                f"the file name {name!r} is not allowed, expected only letters, digits, '.', '_' and '-', "
                "since every file is in the artifact's own folder"
            )
        if name == MANIFEST_FILE:
            yield f"the file {name} lists itself, expected only the other files"
        if count > 1:
            yield f"the file {name} is listed {count} times, expected once"
    tokenizer = manifest.tokenizer
    libraries = [library_file(manifest.target, level) for level in manifest.target.levels]
    used = [
        *libraries,
        WEIGHTS_FILE,
        *([tokenizer.file, tokenizer.chat_template] if tokenizer else []),
        manifest.golden,
    ]
    yield from (
        f"the file {name} is not listed, but an artifact needs it" for name in used if name and name not in names
    )
    yield from (f"the file {name} is listed, but nothing in the manifest uses it" for name in names if name not in used)
    for entry in manifest.files:
        limits = {**dict.fromkeys(libraries, LIBRARY_LIMIT), WEIGHTS_FILE: None}
        yield from _size_problems(entry, limits.get(entry.path, READ_WHOLE_LIMIT))


def _size_problems(entry: FileEntry, limit: int | None) -> Iterator[str]:
    if entry.size == 0 or (limit and entry.size > limit):
        yield f"the file {entry.path} has {entry.size} bytes, expected 1 to {limit or 'any number'}"
    expected = n_blocks(entry.size)
    if len(entry.blocks) != expected:
        yield f"the file {entry.path} has {len(entry.blocks)} block sums, expected {expected} for {entry.size} bytes"


def _model_problems(model: ModelConfig) -> Iterator[str]:
    if len(model.sliding_window) != model.n_layers:
        yield f"the model has {model.n_layers} layers, but {len(model.sliding_window)} entries in sliding_window"
    if model.n_heads % model.n_kv_heads:
        yield f"the model has {model.n_heads} heads, expected a multiple of its {model.n_kv_heads} n_kv_heads"
    if not (model.norm_eps > 0 and model.rope_theta > 0):
        yield f"the model has norm_eps {model.norm_eps} and rope_theta {model.rope_theta}, expected both to be above 0"
    yield from _head_problems(model)


def _head_problems(model: ModelConfig) -> Iterator[str]:
    labelled = HEADS[model.head].size == "n_labels"
    if labelled != (model.n_labels is not None):
        yield f"the head {model.head} has n_labels {model.n_labels}, expected " + ("a number" if labelled else "none")
    if model.labels is not None and len(model.labels) != model.n_labels:
        yield f"the head {model.head} has {len(model.labels)} labels, expected n_labels = {model.n_labels}"
    if model.tied_embeddings and not model.generates:
        yield f"the head {model.head} is tied to the embeddings, expected that only for a causal language model"


def _function_problems(manifest: Manifest) -> Iterator[str]:
    yield from _shape_problems(manifest.shape)
    caches = next((function.signature.caches for function in manifest.functions), ())
    key = next(iter(caches), None)
    known = key is not None and key.dtype in CACHE_NAMES
    if key is not None and not known:
        yield f"the cache {key.name} is {key.dtype}, expected {', '.join(CACHE_NAMES)}"
    if key is not None and known and not cache_format(key.dtype).fits(manifest.model.head_dim):
        yield (
            f"the cache {key.name} is {key.dtype}, expected that only with a head_dim that is a multiple "
            f"of {cache_format(key.dtype).group}, found {manifest.model.head_dim}"
        )
    expected = functions_of(manifest.model, manifest.shape, key.dtype if key and known else "float32")
    found = [(function.name, function.rows, function.tokens) for function in manifest.functions]
    names = [(function.name, function.rows, function.tokens) for function in expected]
    if found != names:
        yield f"the functions (name, rows, tokens) are {found}, expected {names}"
    for function, wanted in zip(manifest.functions, expected, strict=False):
        yield from _spec_problems(function.name, "inputs", function.signature.inputs, wanted.signature.inputs)
        yield from _spec_problems(function.name, "outputs", function.signature.outputs, wanted.signature.outputs)
        yield from size_problems(manifest.model, function)


def _shape_problems(shape: Shape) -> Iterator[str]:
    chunks, rows = list(shape.prefill_chunks), list(shape.step_rows)
    if not chunks or chunks != sorted(set(chunks), reverse=True):
        yield f"the prefill chunks are {chunks}, expected at least one, each only once and the largest first"
    if not rows or rows != sorted(set(rows)) or rows[0] != 1:
        yield f"the rows of steps are {rows}, expected 1 and perhaps more, each only once and the smallest first"
    if max(chunks + rows, default=0) > LONGEST_CALL:
        yield f"a call takes {max(chunks + rows)} tokens, expected at most {LONGEST_CALL}"


def _spec_problems(
    function: str, side: str, specs: tuple[TensorSpec, ...], expected: tuple[TensorSpec, ...]
) -> Iterator[str]:
    if len(specs) != len(expected):
        yield f"the function {function} has {len(specs)} {side}, expected {len(expected)}"
    for spec, wanted in zip(specs, expected, strict=False):
        if spec != wanted:
            yield f"the function {function} has {_described(spec)} among its {side}, expected {_described(wanted)}"


def _described(spec: TensorSpec) -> str:
    return f"{spec.name} {list(spec.shape)} {spec.dtype}"


def _weight_problems(manifest: Manifest) -> Iterator[str]:
    names = {weight.name for weight in manifest.weights}
    if len(names) != len(manifest.weights):
        yield "a weight is listed twice"
    expected = () if manifest.model.tied_embeddings else HEADS[manifest.model.head].tensors
    found = tuple(sorted(name for name in names if name in ("output.weight", "output.bias")))
    if found != tuple(sorted(expected)):
        yield (
            f"the head {manifest.model.head} has the weights {', '.join(found) or 'none'}, "
            f"expected {', '.join(expected) or 'none'}"
        )
    layers = {int(match[1]) for match in map(_LAYER.match, names) if match}
    if layers != set(range(manifest.model.n_layers)):
        wrong = min(layers ^ set(range(manifest.model.n_layers)))
        yield f"the model has {manifest.model.n_layers} layers, but layer {wrong} " + (
            "has weights too" if wrong in layers else "has no weights"
        )
    for weight in manifest.weights:
        yield from _layout_problems(weight, manifest.model)


def _layout_problems(weight: WeightSpec, model: ModelConfig) -> Iterator[str]:
    panels = _PANELS.fullmatch(weight.layout)
    if weight.layout != "row_major" and not panels:
        yield (
            f"the weight {weight.name} has layout {weight.layout!r}, "
            "expected row_major, or panels as `runtime/artifact/layouts.py` names them"
        )
    if panels:
        width, numbers, words, stacked = (int(part) if part else None for part in panels.groups())
        rest = tuple(size for size in (width, numbers, words) if size is not None)
        if len(weight.shape) != 2 + len(rest) or weight.shape[2:] != rest:
            wanted = ", ".join(map(str, rest))
            yield (
                f"the weight {weight.name} has shape {list(weight.shape)}, "
                f"expected (panels, K, {wanted}) for layout {weight.layout}"
            )
        elif stacked and weight.shape[0] % stacked:
            yield (
                f"the weight {weight.name} has {weight.shape[0]} panels, "
                f"expected a multiple of {stacked} for layout {weight.layout}"
            )
    if weight.name == "tok_embeddings.weight" and not panels and weight.shape != (model.vocab_size, model.dim):
        yield (
            f"the weight {weight.name} has shape {list(weight.shape)}, "
            f"expected {[model.vocab_size, model.dim]} (vocab_size, dim)"
        )


def tokenizer_problems(tokenizer: TokenizerSpec | None, size: int) -> Iterator[str]:
    """What is wrong with the ids of a tokenizer for a vocabulary of `size` tokens, as clauses."""
    if tokenizer:
        ids = [
            *tokenizer.eos_ids,
            *(token_id for token_id in (tokenizer.bos_id, tokenizer.end_id) if token_id is not None),
        ]
        yield from (
            f"the tokenizer has the special id {token_id}, expected 0 to {size - 1}"
            for token_id in ids
            if not 0 <= token_id < size
        )
        if tokenizer.add_bos and tokenizer.bos_id is None:
            yield "the tokenizer has add_bos but no bos_id"


def _target_problems(manifest: Manifest) -> Iterator[str]:
    target = manifest.target
    known = TARGETS[target.kind].archs
    if target.arch and not known:
        yield f"the target {target.kind} lists the architectures {', '.join(target.arch)}, expected none"
    if known and not target.arch:
        yield f"the target {target.kind} lists no architecture, expected at least one, such as {known[0]}"
    names = [level.cpu for level in target.levels]
    yield from (
        f"the target lists the cpu level {name} {names.count(name)} times, expected once"
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    )
    if known and target.better_levels:
        yield f"the target {target.kind} lists the cpu levels {', '.join(names)}, expected one"
    yield from (
        f"the target lists the architecture {name!r}, expected a name such as sm_80"
        for name in target.arch
        if not _ARCH.fullmatch(name)
    )
