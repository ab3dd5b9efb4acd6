"""`/v1/embeddings` and `/classify`."""

from typing import Literal

import msgspec

from runtime.server.api.common import Count, TextsOrIds

MOST_TEXTS = 2048  # of a request, as in OpenAI's API


class EmbeddingRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Texts, or their token ids, to be turned into vectors; `dimensions` is taken if it is the vectors' own length.

    Ids are fed as they are; a text gets the ids before and after it that the model was trained with.
    """

    model: str
    input: TextsOrIds
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Count | None = None
    user: str | None = None


class Embedding(msgspec.Struct, frozen=True):
    """One vector: its numbers, or their bytes as little-endian float32 in base64."""

    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class TextUsage(msgspec.Struct, frozen=True):
    """Tokens of all texts; nothing is generated."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(msgspec.Struct, frozen=True, kw_only=True):
    """A vector for each text, in their order."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: TextUsage


class ClassifyRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Texts, or their token ids, to be labelled; a model that answers questions needs `question`, and takes texts.

    An answer has at most `max_answer_tokens` tokens.
    """

    model: str
    input: TextsOrIds
    question: str | None = None
    max_answer_tokens: Count | None = None
    user: str | None = None


class LabelScore(msgspec.Struct, frozen=True):
    """A label and its score."""

    label: str
    score: float


class TextLabels(msgspec.Struct, frozen=True, tag="text_labels", tag_field="object"):
    """The labels of a text: the best, all with their scores, best first, and the scores in the labels' own order."""

    index: int
    label: str
    score: float
    scores: list[LabelScore]
    probs: list[float]
    num_classes: int


class TokenLabel(msgspec.Struct, frozen=True):
    """A token, its likeliest label, and the probability of that."""

    token: str | None
    token_id: int
    label: str
    score: float


class TokenLabels(msgspec.Struct, frozen=True, tag="token_labels", tag_field="object"):
    """The labels of a text's tokens."""

    index: int
    tokens: list[TokenLabel]


class SpanAnswer(msgspec.Struct, frozen=True, tag="answer", tag_field="object"):
    """The answer that a text gives, its probability, and its first and last token among the text's own."""

    index: int
    answer: str
    score: float
    start_token: int
    end_token: int


ClassifyResult = TextLabels | TokenLabels | SpanAnswer


class ClassifyResponse(msgspec.Struct, frozen=True, kw_only=True):
    """What was found in each text, in their order; all of one of the three kinds, as the model's head is."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[ClassifyResult]
    usage: TextUsage
