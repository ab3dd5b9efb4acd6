"""Heads: which one a checkpoint has or a config asks for, where its tensors are, and its fields in `ModelConfig`."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import msgspec

from export.checkpoints.families import Family
from export.checkpoints.huggingface.sentence_embedding import read_pooling
from export.checkpoints.json_files import convert
from export.checkpoints.source import Opened
from runtime.artifact.manifest import HEADS, HeadName, LabelScores
from runtime.errors import UserError

OWN = "output."  # prefix of our names for the head's tensors
SPAN_ENDS = 2  # outputs of question answering: the logits that the answer starts and that it ends at a token
DEFAULT_LABELS = 2  # what transformers assumes if config.json gives no labels
LABEL_SCORES: Mapping[str, LabelScores] = {  # by problem_type, as in the text-classification pipeline of transformers
    "regression": "logits",
    "single_label_classification": "softmax",
    "multi_label_classification": "sigmoid",
}

ONE_LABEL = "multi_label_classification"  # how that pipeline treats a single label


class _Labels(msgspec.Struct, frozen=True):
    """The part of config.json that describes a classification."""

    num_labels: int | None = None
    id2label: dict[str, str] | None = None
    problem_type: Literal["regression", "single_label_classification", "multi_label_classification"] | None = None
    token_classification_bias: bool | None = None


def attach(opened: Opened, wanted: str) -> tuple[Opened, dict[str, object]]:
    """The checkpoint with the head's sources in its family, and the head's fields of `ModelConfig`.

    `wanted` is one of `HEADS`, or "auto" for the one that config.json names. Raises `UserError` for a head that the
    checkpoint's format does not have, for an unknown architecture and for malformed labels.
    """
    head = _find(opened, wanted)
    family = _with_decoder(_with_head(opened.family, head), opened)
    return replace(opened, family=family), {"head": head, **_fields(opened, head)}


def _find(opened: Opened, wanted: str) -> HeadName:
    family, where = opened.family, opened.where
    if wanted == "auto":
        named = opened.values.get("architectures") if family.architectures else None
        if not named:
            return "causal_lm"
        known = [name for name in family.architectures if name.lower().startswith(str(opened.values.get("model_type")))]
        if not isinstance(named, list) or len(named) != 1 or named[0] not in list(family.architectures):
            raise UserError(
                f"{where} names the architectures {named}, expected one of {', '.join(known)}; "
                "set frontend.head to say which head the model has"
            )
        return family.architectures[named[0]]
    for head in family.heads:
        if head == wanted:
            return head
    raise UserError(
        f"frontend.head is {wanted}, which the format of {where} does not have, "
        f"expected auto or one of {', '.join(family.heads)}"
    )


def _with_head(family: Family, head: HeadName) -> Family:
    """The row with the sources of the decoder and of one head; an embedding model ignores the tensors of any head."""
    decoder = {ours: parts for ours, parts in family.sources.items() if not ours.startswith(OWN)}
    others = {part for tensors in family.heads.values() for parts in tensors.values() for part in parts}
    ignored = () if HEADS[head].tensors else tuple(sorted(others))
    return replace(family, sources={**decoder, **family.heads[head]}, ignored=(*family.ignored, *ignored))


def _with_decoder(family: Family, opened: Opened) -> Family:
    """The row with this checkpoint's prefixes of the decoder's and the head's tensors; unchanged without `decoders`."""
    if not family.decoders:
        return family
    usual = next(iter(family.decoders))
    embeddings = family.sources["tok_embeddings.weight"][0].removeprefix(usual)
    found = next((prefix for prefix in family.decoders if prefix + embeddings in opened.source.tensors), usual)

    def renamed(name: str) -> str:
        return found + name.removeprefix(usual) if name.startswith(usual) else family.decoders[found] + name

    sources = {ours: tuple(map(renamed, parts)) for ours, parts in family.sources.items()}
    return replace(family, sources=sources, ignored=tuple(map(renamed, family.ignored)))


def _fields(opened: Opened, head: HeadName) -> dict[str, object]:
    if head == "embedding":
        return asdict(read_pooling(Path(opened.where).parent))
    if head == "question_answering":
        return {"n_labels": SPAN_ENDS}
    if HEADS[head].size != "n_labels":
        return {}
    said = convert(opened.values, _Labels, opened.where)
    if head == "token_classification" and said.token_classification_bias is False:
        raise UserError(
            f"{opened.where} has token_classification_bias: False, which is not supported; expected true or no such key"
        )
    n_labels = len(said.id2label) if said.id2label else said.num_labels or DEFAULT_LABELS
    fields: dict[str, object] = {"n_labels": n_labels, "labels": _names(said, opened.where)}
    if head == "sequence_classification" and (said.problem_type or n_labels == 1):
        fields["label_scores"] = LABEL_SCORES[said.problem_type or ONE_LABEL]
    return fields


def _names(said: _Labels, where: str) -> tuple[str, ...] | None:
    """The labels' names in the order of the outputs."""
    if not said.id2label:
        return None
    numbers = [str(i) for i in range(len(said.id2label))]
    if set(numbers) != set(said.id2label):
        raise UserError(
            f"{where} has id2label with the keys {', '.join(sorted(said.id2label))}, expected 0 to {len(numbers) - 1}"
        )
    return tuple(said.id2label[number] for number in numbers)
