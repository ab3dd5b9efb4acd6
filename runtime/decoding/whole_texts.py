"""Whole texts through an artifact whose head generates no text: code that the classify and embed commands share."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime import cli
from runtime.artifact.build_number import add_minimum_build
from runtime.artifact.manifest import HeadName, ModelConfig
from runtime.errors import UserError
from runtime.text.tokenizer import Tokenizer, open_tokenizer

Outputs = NDArray[np.float32]


class HeadModel(Protocol):
    """The interface that whole texts need of an engine."""

    def head_outputs(self, ids: Sequence[int]) -> Outputs:
        """The head's outputs for a text: (tokens, n_outputs), or (1, n_outputs) for the last token."""


@dataclass(frozen=True)
class OpenedHead:
    """An artifact, ready for whole texts, and its tokenizer."""

    engine: HeadModel
    model: ModelConfig
    tokenizer: Tokenizer

    def ids(self, text: str) -> list[int]:
        """Ids of a whole text as the model was trained on it.

        It is preceded by bos and followed by the id that ends a text, if the tokenizer adds them.
        """
        end_id = self.tokenizer.spec.end_id
        return self.tokenizer.encode(text) + ([] if end_id is None else [end_id])

    def inside(self, ids: Sequence[int]) -> range:
        """Indices of the text's own ids within the result of `ids()`."""
        spec = self.tokenizer.spec
        return range(int(spec.add_bos and spec.bos_id is not None), len(ids) - int(spec.end_id is not None))


def softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Probabilities over the last axis."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    result: NDArray[np.float64] = shifted / shifted.sum(-1, keepdims=True)
    return result


def whole_texts_parser(command: str, description: str) -> argparse.ArgumentParser:
    """A parser with the artifact and the flags that every whole-text command takes."""
    parser = argparse.ArgumentParser(prog=f"python -m {command}", description=description)
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="folder that `make compile` wrote")
    parser.add_argument("--text", action="append", required=True, metavar="TEXT", help="may be given several times")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    parser.add_argument("--json", action="store_true", help="print a JSON list with one object per text")
    add_minimum_build(parser)
    return parser


def open_head(artifact: Path, threads: int | None, minimum_build: int, heads: Sequence[HeadName]) -> OpenedHead:
    """Open an artifact with one of the `heads`; raises `UserError` for any other head, or without a tokenizer."""
    engine = cli.open_engine(artifact, threads, minimum_build, heads)
    spec = engine.manifest.tokenizer
    if spec is None:
        raise UserError(f"{artifact} has no tokenizer, and --text needs one; compile a checkpoint that has one")
    return OpenedHead(engine, engine.manifest.model, open_tokenizer(spec, engine.folder))
