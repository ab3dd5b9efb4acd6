"""Reads Mistral's own tokenizer files: tekken.json, or a SentencePiece model whose suffix gives its version."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from export.checkpoints.mistral import tekken
from export.checkpoints.source import TokenizerSource
from export.checkpoints.tokenizers.sentencepiece_model import open_sentencepiece
from runtime.artifact.manifest import InstructVersion
from runtime.errors import UserError

TEKKEN = "tekken.json"
MODEL = re.compile(r"tokenizer\.model(?:\.v(\d+)(?:m\d+)?)?")  # such as tokenizer.model.v3; m1 is for images
# What mistral-common calls these tokens, for a template that writes them by variables.
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
UNSUFFIXED = 1  # the version of a plain tokenizer.model
INSTRUCT_VERSIONS: Mapping[str, InstructVersion] = {version: version for version in get_args(InstructVersion)}


@dataclass(frozen=True)
class TokenizerFile:
    """Mistral's own tokenizer in a folder; `declared` is whether the file itself gives its version."""

    path: Path
    version: str
    declared: bool


def find(folder: Path) -> TokenizerFile | None:
    """Find tekken.json, or else the SentencePiece model of the highest version, or else None."""
    if (folder / TEKKEN).is_file():
        return TokenizerFile(
            folder / TEKKEN,
            tekken.declared_version((folder / TEKKEN).read_bytes(), str(folder / TEKKEN)),
            declared=True,
        )
    matches = [match for path in folder.iterdir() if path.is_file() and (match := MODEL.fullmatch(path.name))]
    if not matches:
        return None
    best = max(matches, key=lambda match: (int(match[1] or UNSUFFIXED), match[0]))
    return TokenizerFile(folder / best[0], f"v{best[1] or UNSUFFIXED}", declared=best[1] is not None)


def mistral_tokenizer(folder: Path, *, instruct: bool) -> TokenizerSource | None:
    """The tokenizer of a folder in Mistral's own format, or None; every prompt begins with BOS.

    No file says whether the model was trained on conversations, since base models ship the same tokenizer; the caller
    says so with `instruct`. Raises `UserError` if the file is malformed, or if `instruct` is set and the chat format of
    the file's version is unknown.
    """
    file = find(folder)
    if file is None:
        return None
    if instruct and file.version not in INSTRUCT_VERSIONS:
        raise UserError(
            f"{file.path} is of version {file.version}, whose chat format is not known; "
            f"expected one of {', '.join(INSTRUCT_VERSIONS)}"
        )
    source = _read_tekken(file.path) if file.path.name == TEKKEN else _read_sentencepiece(file.path)
    return replace(source, instruct=INSTRUCT_VERSIONS[file.version] if instruct else None)


def _read_tekken(path: Path) -> TokenizerSource:
    converted = tekken.convert(path.read_bytes(), str(path))
    return TokenizerSource(
        "tokenizer.json",
        converted.data,
        None,
        converted.bos_id,
        (converted.eos_id,),
        add_bos=True,
        special_tokens={key: name for key, name in SPECIAL_TOKENS.items() if name in converted.specials},
        model_settings=converted.settings,
    )


def _read_sentencepiece(path: Path) -> TokenizerSource:
    data = path.read_bytes()
    ids = open_sentencepiece(data, path)
    if ids.bos_id is None or ids.eos_id is None:
        raise UserError(
            f"{path} lacks a token for the beginning or the end of a text, expected both; fetch the checkpoint again"
        )
    return TokenizerSource(
        "sentencepiece", data, None, ids.bos_id, (ids.eos_id,), add_bos=True, special_tokens=ids.special_tokens
    )
