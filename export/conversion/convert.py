"""`python -m export.convert SOURCE TARGET [--to huggingface|mistral]`: convert a checkpoint.

Converts a checkpoint in Mistral's own format to a Hugging Face folder, or back. Weights keep their dtype and their
bits; the rows of wq and wk are reordered, since the formats pair rotary dimensions differently.
"""

import argparse
import glob
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil

from export.checkpoints.checkpoint import Checkpoint, open_checkpoint
from export.checkpoints.mistral import tokenizer as mistral_tokenizer
from export.checkpoints.source import TokenizerSource
from export.console import byte_bar, console
from export.conversion.safetensors_shards import total_bytes, write_file, write_shards
from export.conversion.target_formats import (
    FormTensors,
    huggingface_config,
    huggingface_tensors,
    mistral_params,
    mistral_tensors,
)
from runtime.errors import UserError

SHARD_BYTES = 5 * 10**9  # of a Hugging Face folder; Mistral's own format has one file
OTHER = {"huggingface": "mistral", "mistral": "huggingface"}  # the format that is written -> the one that is read
MARKS = {"huggingface": "config.json", "mistral": "params.json"}  # the file that marks a format
# Kind -> file in a Hugging Face folder.
PLAIN_TOKENIZERS = {"tokenizer.json": "tokenizer.json", "sentencepiece": "tokenizer.model"}
KEPT_FREE = 64 * 10**6  # bytes kept free on the disk for everything besides the weights


def main() -> int:
    """Run the command and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m export.convert", description="Convert a checkpoint from Mistral's own format, or to it."
    )
    parser.add_argument("source", type=Path, help="the checkpoint's folder")
    parser.add_argument("target", type=Path, help="the folder to write, which must be absent or empty")
    parser.add_argument("--to", choices=tuple(OTHER), help="the format to write (default: the one that SOURCE lacks)")
    arguments = parser.parse_args()
    notes = convert(arguments.source, arguments.target, arguments.to or other_form(arguments.source))
    for note in notes:
        console.print(f"warning: {note}", style="yellow")
    print(arguments.target)
    return 0


def other_form(source: Path) -> str:
    """The format that a folder is not in; raises `UserError` if it has the files of both or of neither."""
    found = [form for form, mark in MARKS.items() if (source / mark).is_file()]
    if not found:
        raise UserError(f"{source} has neither {' nor '.join(MARKS.values())}, expected a checkpoint's folder")
    if len(found) > 1:
        raise UserError(
            f"{source} has both {' and '.join(MARKS.values())}; "
            "choose the format to write with --to huggingface or --to mistral"
        )
    return OTHER[found[0]]


def convert(source: Path, target: Path, to: str, shard_bytes: int = SHARD_BYTES) -> tuple[str, ...]:
    """Write the checkpoint `source` in the format `to` into the folder `target`, which appears complete or not at all.

    Returns notes for the user, one sentence each. Raises `UserError` if the source cannot be read or expressed in that
    format, the target is not empty, or the disk lacks space. Holds only a block of rows in memory, or one matrix whose
    rows are reordered.
    """
    check_target(target)
    checkpoint = open_checkpoint(source, OTHER[to], {})
    write_as(to, checkpoint, source, target, shard_bytes)
    return (*checkpoint.notes, *_tokenizer_notes(checkpoint, source, to))


def write_as(to: str, checkpoint: Checkpoint, source: Path, target: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write an open checkpoint, with the tokenizer files of the folder `source`; see `convert`."""
    target = target.absolute()  # so that even . has a name
    check_target(target)
    tensors, write = _WRITERS[to](checkpoint, source, shard_bytes)
    nbytes = total_bytes(tensors)
    with _fresh_folder(target, nbytes) as folder, byte_bar(f"convert to {to}", nbytes) as bar:
        write(folder, bar.advance)


def check_target(target: Path) -> None:
    """Refuse a target that is not an absent or empty folder."""
    if target.is_dir() and any(target.iterdir()):
        raise UserError(f"{target} is not empty, expected a new folder; name another one")
    if os.path.lexists(target) and not target.is_dir():
        raise UserError(f"{target} is not a folder, expected a new one; name another one")


Write = Callable[[Path, Callable[[int], None]], None]


def _to_huggingface(checkpoint: Checkpoint, source: Path, shard_bytes: int) -> tuple[FormTensors, Write]:
    """The tensors of a Hugging Face folder, and the function that writes it."""
    tensors = huggingface_tensors(checkpoint)
    ids = _ids(checkpoint)
    config = huggingface_config(checkpoint.model) | ids | {"torch_dtype": checkpoint.dtype("tok_embeddings.weight")}

    def write(folder: Path, advance: Callable[[int], None]) -> None:
        _write_json(folder / "config.json", config)
        if ids:
            _write_json(folder / "generation_config.json", ids)
        _copy_tokenizer(source, folder)
        _add_plain_tokenizer(checkpoint.tokenizer, folder)
        write_shards(folder, "model", tensors, shard_bytes, advance)

    return tensors, write


def _to_mistral(checkpoint: Checkpoint, source: Path, _shard_bytes: int) -> tuple[FormTensors, Write]:
    """The tensors of a folder in Mistral's own format, and the function that writes it."""
    tensors = mistral_tensors(checkpoint)
    params = mistral_params(checkpoint.model)

    def write(folder: Path, advance: Callable[[int], None]) -> None:
        _write_json(folder / "params.json", params)
        _copy_tokenizer(source, folder)
        write_file(folder / "consolidated.safetensors", tensors, tensors.names(), advance)

    return tensors, write


_WRITERS: Mapping[str, Callable[[Checkpoint, Path, int], tuple[FormTensors, Write]]] = {
    "huggingface": _to_huggingface,
    "mistral": _to_mistral,
}


def _ids(checkpoint: Checkpoint) -> dict[str, object]:
    """The ids that begin and end a text, if there is a tokenizer."""
    if checkpoint.tokenizer is None:
        return {}
    bos, eos = checkpoint.tokenizer.bos_id, checkpoint.tokenizer.eos_ids
    return {
        key: value
        for key, value in (("bos_token_id", bos), ("eos_token_id", eos[0] if len(eos) == 1 else list(eos)))
        if value not in (None, [])
    }


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _own_tokenizers(source: Path) -> list[Path]:
    """Files of Mistral's own tokenizers, which have the same names in both formats."""
    return [
        path
        for path in sorted(source.iterdir())
        if path.name == mistral_tokenizer.TEKKEN or mistral_tokenizer.MODEL.fullmatch(path.name)
    ]


def _copy_tokenizer(source: Path, folder: Path) -> None:
    for path in _own_tokenizers(source):
        shutil.copyfile(path, folder / path.name)


def _add_plain_tokenizer(tokenizer: TokenizerSource | None, folder: Path) -> None:
    """Write the tokenizer under the name that Hugging Face's software looks for.

    A tekken.json has already become a tokenizer.json when it was read.
    """
    if tokenizer is not None:
        (folder / PLAIN_TOKENIZERS[tokenizer.kind]).write_bytes(tokenizer.data)


def _tokenizer_notes(checkpoint: Checkpoint, source: Path, to: str) -> tuple[str, ...]:
    """Notes on the parts of the tokenizer that the other format cannot express."""
    tokenizer = checkpoint.tokenizer
    if tokenizer is None:
        return (f"{source} has no tokenizer, so none was written",)
    if to == "mistral" and not _own_tokenizers(source):
        return (
            f"{source} has no tokenizer for Mistral's own format, such as tokenizer.model or tekken.json, "
            "so none was written",
        )
    if to == "mistral" and (tokenizer.chat_template is not None or tokenizer.instruct is not None):
        return (
            "Mistral's own format has no place for a chat template; "
            "for conversations, compile the new folder with frontend.instruct: true",
        )
    if to == "huggingface":
        return (
            f"{source} has no chat template, so none was written; "
            "if the model is tuned for conversations, compile it from there",
        )
    return ()


@contextmanager
def _fresh_folder(target: Path, nbytes: int) -> Iterator[Path]:
    """A temporary sibling that becomes `target` when the block ends, or is removed if it fails.

    Those left by killed runs are removed as well.
    """
    prefix = f".{target.name}.convert-"
    fresh = target.parent / f"{prefix}{os.getpid()}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for stale in target.parent.glob(f"{glob.escape(prefix)}*"):
            owner = stale.name.removeprefix(prefix)
            if owner.isdigit() and (int(owner) == os.getpid() or not psutil.pid_exists(int(owner))):
                shutil.rmtree(stale)
        free = shutil.disk_usage(target.parent).free
        if free < nbytes + KEPT_FREE:
            raise UserError(
                f"{target.parent} has {free / 1e9:.1f} GB free, but the checkpoint takes {nbytes / 1e9:.1f} GB; "
                "make room or name another folder"
            )
        fresh.mkdir()
        yield fresh
        os.replace(fresh, target)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
