"""`POST /classify`: labels of texts or of their tokens, or the answers that texts give to a question."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from starlette.requests import Request
from starlette.responses import Response

from runtime.artifact.manifest import HeadName
from runtime.decoding.labels import (
    MAX_ANSWER_TOKENS,
    SCORES,
    found_answer,
    labelled_tokens,
    ranked_labels,
)
from runtime.decoding.whole_texts import OpenedHead, Outputs
from runtime.server.answers.given_texts import separate_texts
from runtime.server.answers.whole_texts import encoded, opened_head
from runtime.server.api.heads import (
    MOST_TEXTS,
    ClassifyRequest,
    ClassifyResponse,
    ClassifyResult,
    LabelScore,
    SpanAnswer,
    TextLabels,
    TextUsage,
    TokenLabel,
    TokenLabels,
)
from runtime.server.http.bodies import json_answer
from runtime.server.http.event_stream import unless_client_leaves
from runtime.server.http.failures import refused
from runtime.server.service import Service

Result = Sequence[ClassifyResult]


@dataclass(frozen=True)
class Classified:
    """The ids of the question, if there is one, and of each text, and the outputs for each text."""

    opened: OpenedHead
    question: Sequence[int]
    texts: Sequence[Sequence[int]]
    outputs: Sequence[Outputs]
    max_answer_tokens: int


def _text_labels(found: Classified) -> list[TextLabels]:
    model = found.opened.model
    results = []
    for index, (logits,) in enumerate(found.outputs):
        ranked = [LabelScore(each.label, each.score) for each in ranked_labels(model, logits)]
        probs: list[float] = SCORES[model.label_scores](logits).tolist()
        results.append(TextLabels(index, ranked[0].label, ranked[0].score, ranked, probs, len(ranked)))
    return results


def _token_labels(found: Classified) -> list[TokenLabels]:
    pairs = zip(found.texts, found.outputs, strict=True)
    labels = [labelled_tokens(found.opened, ids, logits) for ids, logits in pairs]
    return [TokenLabels(index, [TokenLabel(**asdict(each)) for each in own]) for index, own in enumerate(labels)]


def _span_answers(found: Classified) -> list[SpanAnswer]:
    results = []
    for index, (context, logits) in enumerate(zip(found.texts, found.outputs, strict=True)):
        one = found_answer(found.opened, found.question, context, logits, found.max_answer_tokens)
        results.append(SpanAnswer(index, one.answer, one.span.score, one.span.start, one.span.end))
    return results


RESULTS: Mapping[HeadName, Callable[[Classified], Result]] = {
    "sequence_classification": _text_labels,
    "token_classification": _token_labels,
    "question_answering": _span_answers,
}


async def answer(service: Service, request: Request, asked: ClassifyRequest) -> Response:
    """Answer a request; raises `RequestFailure` for one that cannot be answered."""
    return json_answer(await unless_client_leaves(request, _classify(service, asked)))


async def _classify(service: Service, asked: ClassifyRequest) -> ClassifyResponse:
    opened = opened_head(service.model(asked.model), tuple(RESULTS))
    texts = separate_texts(asked.input, MOST_TEXTS, "input")
    _check(asked, opened, texts)
    question: list[int] = []
    if asked.question is not None:
        (question,) = await encoded(service, opened, [asked.question])
    rows = await encoded(service, opened, texts)
    if asked.question is not None and not all(map(opened.inside, rows)):
        raise refused("a text of input is empty, expected one that contains the answer", param="input")
    fed = [question + row for row in rows]
    outputs = await service.heads.outputs(opened.engine, fed)
    found = Classified(opened, question, rows, outputs, asked.max_answer_tokens or MAX_ANSWER_TOKENS)
    tokens = sum(map(len, fed))
    return ClassifyResponse(
        id=service.new_answer_id("classify"),
        created=service.now(),
        model=service.name,
        data=list(RESULTS[opened.model.head](found)),
        usage=TextUsage(tokens, tokens),
    )


def _check(asked: ClassifyRequest, opened: OpenedHead, texts: Sequence[str | list[int]]) -> None:
    answers = opened.model.head == "question_answering"
    if answers and asked.question is None:
        raise refused("question is missing: this model finds answers to questions in texts", param="question")
    for name in ("question", "max_answer_tokens"):
        if not answers and getattr(asked, name) is not None:
            raise refused(f"{name} has no meaning for the head {opened.model.head}; leave it out", param=name)
    if opened.model.head != "sequence_classification" and not all(isinstance(text, str) for text in texts):
        raise refused(
            f"input has token ids, expected texts: the head {opened.model.head} finds parts of a text", param="input"
        )
