"""What the outputs of a classifying head say of a text: its labels, those of its tokens, or where an answer stands."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.artifact.manifest import LabelScores, ModelConfig
from runtime.decoding.whole_texts import OpenedHead, Outputs, softmax

MAX_ANSWER_TOKENS = 30

Scores = NDArray[np.float64]
SCORES: Mapping[LabelScores, Callable[[Outputs], Scores]] = {  # logits (..., n_labels) to scores of the same shape
    "softmax": softmax,
    "sigmoid": lambda logits: 1 / (1 + np.exp(-logits.astype(np.float64))),
    "logits": lambda logits: logits.astype(np.float64),
}


@dataclass(frozen=True)
class ScoredLabel:
    """A label of a text, and its score."""

    label: str
    score: float


@dataclass(frozen=True)
class LabelledToken:
    """A token of a text with its likeliest label, and the probability of that."""

    token: str | None
    token_id: int
    label: str
    score: float


@dataclass(frozen=True)
class Span:
    """Part of a text by its tokens, both ends included, and the probability that it is the answer."""

    start: int
    end: int
    score: float


@dataclass(frozen=True)
class FoundAnswer:
    """The answer to a question, and where it stands among the context's own tokens."""

    answer: str
    span: Span


def label_name(model: ModelConfig, label: int) -> str:
    """The label's name; LABEL_i, as in transformers, if the checkpoint has no names."""
    return model.labels[label] if model.labels else f"LABEL_{label}"


def ranked_labels(model: ModelConfig, logits: Outputs) -> list[ScoredLabel]:
    """All labels of a text from its logits (n_labels,), best first; of equal ones, the first."""
    scores = SCORES[model.label_scores](logits)
    order = np.argsort(-scores, kind="stable").tolist()
    return [ScoredLabel(label_name(model, label), float(scores[label])) for label in order]


def labelled_tokens(opened: OpenedHead, ids: Sequence[int], logits: Outputs) -> list[LabelledToken]:
    """A label for each of a text's own tokens; `ids` are those of `OpenedHead.ids`, logits (tokens, n_labels)."""
    labels, scores = logits.argmax(-1), softmax(logits).max(-1)
    return [
        LabelledToken(
            opened.tokenizer.token_text(ids[i]), ids[i], label_name(opened.model, int(labels[i])), float(scores[i])
        )
        for i in opened.inside(ids)
    ]


def best_span(logits: Outputs, max_tokens: int) -> Span:
    """The likeliest answer of at most `max_tokens` in a context, from the context's span logits (tokens, 2).

    Its score is the probability of its start times that of its end, each a softmax over the context alone, as in the
    question-answering pipeline of transformers 4. Among equal scores the shortest wins, then the first.
    """
    starts, ends = softmax(logits.T)
    longest = min(max_tokens, len(starts))
    # where the best span of each length begins
    firsts = [int(np.argmax(starts[: len(starts) - more] * ends[more:])) for more in range(longest)]
    spans = [Span(first, first + more, float(starts[first] * ends[first + more])) for more, first in enumerate(firsts)]
    return max(spans, key=lambda span: span.score)


def found_answer(
    opened: OpenedHead, question: Sequence[int], context: Sequence[int], logits: Outputs, max_tokens: int
) -> FoundAnswer:
    """The likeliest answer of at most `max_tokens` in a context that is not empty.

    logits: (tokens, 2), those of a text that is the question's ids followed by the context's.
    """
    inside = opened.inside(context)
    first = len(question) + inside.start
    span = best_span(logits[first : len(question) + inside.stop], max_tokens)
    ids = [*question, *context]
    start, end = first + span.start, first + span.end
    stream = opened.tokenizer.stream(after=ids[:start])
    answer = "".join(stream.push(token_id) for token_id in ids[start : end + 1]) + stream.flush()
    return FoundAnswer(answer.strip(), span)
