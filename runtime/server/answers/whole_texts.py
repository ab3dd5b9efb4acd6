"""From the texts of a request to ids, for models whose head generates no text."""

from collections.abc import Sequence

from runtime.artifact.manifest import HeadName
from runtime.decoding.whole_texts import OpenedHead
from runtime.errors import UserError
from runtime.server.answers.given_texts import check_ids
from runtime.server.http.failures import refused
from runtime.server.running.served_model import ServedModel
from runtime.server.service import Service

ADDRESSES = {
    "causal_lm": "/v1/chat/completions or /v1/completions",
    "embedding": "/v1/embeddings",
    "sequence_classification": "/classify",
    "token_classification": "/classify",
    "question_answering": "/classify",
}


def check_head(model: ServedModel, heads: Sequence[HeadName]) -> None:
    """Raise `RequestFailure` unless the model has one of these heads."""
    head = model.config.head
    if head not in heads:
        raise refused(
            f"this model has the head {head}, expected {' or '.join(heads)} here; use {ADDRESSES[head]}",
            param="model",
            code="no_such_head",
        )


def opened_head(model: ServedModel, heads: Sequence[HeadName]) -> OpenedHead:
    """The model for whole texts; raises `RequestFailure` unless it has one of these heads."""
    check_head(model, heads)
    return OpenedHead(model.engine, model.config, model.tokenizer)


async def encoded(service: Service, opened: OpenedHead, texts: Sequence[str | list[int]]) -> list[list[int]]:
    """Ids of each text; raises `RequestFailure` if one has none, or cannot be in the model."""
    service.heads.check_place(len(texts))
    try:
        rows = await service.encode(lambda: [_ids(opened, text, service.capacity) for text in texts])
    except UserError as error:
        raise refused(str(error), param="input") from error
    for number, ids in enumerate(rows):
        if not ids:
            raise refused(f"text {number} of input has no tokens, expected at least one", param="input")
    return rows


def _ids(opened: OpenedHead, text: str | list[int], capacity: int | None) -> list[int]:
    if isinstance(text, str):
        opened.tokenizer.check_length(len(text), capacity)
        return opened.ids(text)
    check_ids(text, opened.model.vocab_size, "input")
    return text
