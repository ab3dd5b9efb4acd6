"""From the texts of a request to ids, for models whose head generates no text."""

from collections.abc import Sequence

from runtime.artifact.manifest import HeadName
from runtime.decoding.whole_texts import OpenedHead
from runtime.errors import UserError
from runtime.server.api.heads import Texts
from runtime.server.failures import refused
from runtime.server.served_model import ServedModel
from runtime.server.service import Service

MOST_TEXTS = 2048  # of a request, as in OpenAI's API
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


def separate_texts(given: Texts) -> list[str | list[int]]:
    """The texts of a request, each as text or ids; raises `RequestFailure` for none, and for too many."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise refused("input is an empty list, expected a text or token ids", param="input")
    if isinstance(given[0], int):
        return [[each for each in given if isinstance(each, int)]]
    if len(given) > MOST_TEXTS:
        raise refused(f"input is a list of {len(given)}, expected at most {MOST_TEXTS}", param="input")
    return [each for each in given if not isinstance(each, int)]


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
    largest, vocab_size = max(text, default=0), opened.model.vocab_size
    if largest >= vocab_size:
        raise UserError(f"input has the token id {largest}, expected 0 to {vocab_size - 1}, the ids of the vocabulary")
    return text
