"""`frontend.adapter`: an adapter that is merged into a checkpoint while it is read."""

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from export.checkpoints.adapters.finetune_adapter import finetune_files, open_finetune
from export.checkpoints.adapters.lora import AdaptedTensors, Adapter, LowRank
from export.checkpoints.adapters.peft_adapter import open_peft, peft_files
from export.checkpoints.advice import ADAPTER_CONFIG, OWN_ADAPTER, base_of
from export.checkpoints.format_names import HUGGINGFACE_DECODERS
from export.checkpoints.links import check_link, check_regular, is_lfs_pointer, lfs_advice
from export.checkpoints.source import Opened, TensorSource
from runtime.errors import UserError


@dataclass(frozen=True)
class AdapterForm:
    """One way of saving an adapter: the file that marks it, and the kind of checkpoint whose names it uses."""

    mark: str
    base_kind: str
    base_format: str
    files: Callable[[Path], tuple[Path, ...]]
    open: Callable[[Path], Adapter]


FORMS = (
    AdapterForm(ADAPTER_CONFIG, "huggingface", "a Hugging Face folder", peft_files, open_peft),
    AdapterForm(OWN_ADAPTER, "mistral", "a folder in Mistral's own format", finetune_files, open_finetune),
)
HEADS = ("score.", "qa_outputs.", "lm_head.")  # tensors that an adapter may add to its base


def adapter_files(folder: Path) -> list[Path]:
    """The files that an adapter is read from.

    Raises `UserError` if there are none, for a link that leads out of the folder, and for a file that Git LFS has not
    fetched.
    """
    files = sorted(_form(folder).files(folder))
    for file in files:
        check_regular(file)
        check_link(file, folder)
        if is_lfs_pointer(file):
            raise UserError(lfs_advice(file))
    return files


def with_adapter(opened: Opened, kind: str, folder: Path) -> Opened:
    """The checkpoint, of `kind`, with an adapter merged into its tensors.

    Raises `UserError` for an adapter that does not fit: of another format, for other tensors, or of other shapes.
    """
    form = _form(folder)
    adapter_files(folder)
    if kind != form.base_kind:
        raise UserError(
            f"frontend.adapter is {folder}, whose tensors are named and ordered as those of {form.base_format}, but "
            f"frontend.checkpoint is of the type {kind}; set it to the base model as {form.base_format}"
        )
    adapter = _renamed_as_base(form.open(folder), opened.source)
    _check_shapes(adapter, opened.source)
    if not adapter.changes and not adapter.replacements:
        raise UserError(f"frontend.adapter is {folder}, which holds no tensors; fetch the adapter again")
    note = (
        f"the adapter {folder} is merged (matrices changed: {len(adapter.changes)}, "
        f"tensors replaced: {len(adapter.replacements)}); the tokenizer and its chat template are the base's"
    )
    return replace(opened, source=AdaptedTensors(opened.source, adapter), notes=(*opened.notes, note))


def _form(folder: Path) -> AdapterForm:
    if not folder.is_dir():
        raise UserError(f"frontend.adapter is {folder}, which is not a folder; set it to an adapter's folder")
    for form in FORMS:
        if (folder / form.mark).is_file():
            return form
    raise UserError(
        f"frontend.adapter is {folder}, which has neither {' nor '.join(form.mark for form in FORMS)}, expected an "
        "adapter of peft or of mistral-finetune"
    )


def _renamed_as_base(adapter: Adapter, base: TensorSource) -> Adapter:
    """The adapter with the base's names, which differ from the adapter's in what precedes the decoder and the head."""
    changes: dict[str, LowRank] = {}
    for name, change in adapter.changes.items():
        changes[_name_in_base(name, adapter, base.tensors)] = change
    replacements = {}
    for name, theirs in adapter.replacements.items():
        replacements[_name_in_base(name, adapter, base.tensors, added=name.startswith(HEADS))] = theirs
    return replace(adapter, changes=changes, replacements=replacements)


def _name_in_base(name: str, adapter: Adapter, base: Container[str], *, added: bool = False) -> str:
    """The name of a tensor in the base; its name in the adapter if the base lacks it and it may be `added`."""
    prefixes = (*HUGGINGFACE_DECODERS, *HUGGINGFACE_DECODERS.values())
    tails = [name.removeprefix(prefix) for prefix in prefixes if name.startswith(prefix)]
    for candidate in (name, *(prefix + tail for tail in tails for prefix in prefixes)):
        if candidate in base:
            return candidate
    if added:
        return name
    if name.endswith(".bias"):
        raise UserError(
            f"the adapter {adapter.where} trains {name}, expected no biases, which the layers here do not have; train "
            "it with bias: none"
        )
    config = adapter.where / ADAPTER_CONFIG
    wanted = (base_of(adapter.where) if config.is_file() else None) or "the model that it was trained on"
    raise UserError(
        f"the adapter {adapter.where} changes {name}, which frontend.checkpoint does not hold, expected the tensors of "
        f"{wanted}; set frontend.checkpoint to that model"
    )


def _check_shapes(adapter: Adapter, base: TensorSource) -> None:
    """Check that every tensor of the adapter has the shape that its place in the base calls for."""
    for name, expected in _expected_shapes(adapter, base):
        tensor = adapter.source.tensors[name]
        if tensor.shape != expected:
            raise UserError(
                f"{adapter.where}: {name} has shape {tensor.shape}, expected {expected} by frontend.checkpoint; "
                f"{_advice_on_shape(name, tensor.shape, expected, adapter)}"
            )
        if tensor.dtype not in ("float32", "float16", "bfloat16"):
            raise UserError(f"{adapter.where}: {name} has dtype {tensor.dtype}, expected float32, float16 or bfloat16")


def _advice_on_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...], adapter: Adapter) -> str:
    whole = name in adapter.replacements.values() and len(found) == 2
    if whole and found[0] > expected[0] and found[1:] == expected[1:]:
        return (
            f"if tokens were added in training, merge the adapter with peft into a base that was resized to {found[0]} "
            "tokens, and save that with the adapter's tokenizer"
        )
    return "set frontend.checkpoint to the model that the adapter was trained on"


def _expected_shapes(adapter: Adapter, base: TensorSource) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, theirs in adapter.replacements.items():
        if name in base.tensors:
            yield theirs, base.tensors[name].shape
    for name, change in adapter.changes.items():
        shape = base.tensors[name].shape
        rows, columns = shape if len(shape) == 2 else (0, 0)  # nothing fits onto what is not a matrix
        rank = next(iter(adapter.source.tensors[change.down].shape), 0)
        yield change.down, (rank, rows if change.is_embedding else columns)
        yield change.up, (columns if change.is_embedding else rows, rank)
        if change.magnitude is not None:
            yield change.magnitude, (rows,)
