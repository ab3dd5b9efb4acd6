"""`python -m runtime.classify ARTIFACT --text ...`: label texts or their tokens, or find the answer to a question."""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime import cli
from runtime.artifact.manifest import HeadName, LabelScores, ModelConfig
from runtime.decoding.whole_texts import OpenedHead, Outputs, open_head, softmax, whole_texts_parser
from runtime.errors import UserError, run_command

MAX_ANSWER_TOKENS = 30

Scores = NDArray[np.float64]
SCORES: Mapping[LabelScores, Callable[[Outputs], Scores]] = {  # logits (..., n_labels) to scores of the same shape
    "softmax": softmax,
    "sigmoid": lambda logits: 1 / (1 + np.exp(-logits.astype(np.float64))),
    "logits": lambda logits: logits.astype(np.float64),
}


@dataclass(frozen=True)
class Span:
    """Part of a text by its tokens, both ends included, and the probability that it is the answer."""

    start: int
    end: int
    score: float


def label_name(model: ModelConfig, label: int) -> str:
    """The label's name; LABEL_i, as in transformers, if the checkpoint has no names."""
    return model.labels[label] if model.labels else f"LABEL_{label}"


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


@dataclass(frozen=True)
class Answer:
    """The result for one text: an object for --json, and lines for people."""

    fields: dict[str, Any]
    lines: tuple[str, ...]


def _label_texts(opened: OpenedHead, args: argparse.Namespace) -> Iterator[Answer]:
    model = opened.model
    ids = [opened.ids(text) for text in args.text]
    for outputs in map(opened.engine.head_outputs, ids):
        scores = SCORES[model.label_scores](outputs[0])
        order = [int(label) for label in np.argsort(-scores, kind="stable")]
        ranked = [{"label": label_name(model, label), "score": float(scores[label])} for label in order]
        fields = {**ranked[0], "scores": ranked, "logits": outputs[0].tolist()}
        yield Answer(fields, (f"{ranked[0]['label']} {ranked[0]['score']:.4f}",))


def _label_tokens(opened: OpenedHead, args: argparse.Namespace) -> Iterator[Answer]:
    model, tokenizer = opened.model, opened.tokenizer
    ids = [opened.ids(text) for text in args.text]
    for row, outputs in zip(ids, map(opened.engine.head_outputs, ids), strict=True):
        labels, scores = outputs.argmax(-1), softmax(outputs).max(-1)
        tokens = [
            {
                "token": tokenizer.token_text(row[i]),
                "token_id": row[i],
                "label": label_name(model, int(labels[i])),
                "score": float(scores[i]),
            }
            for i in opened.inside(row)
        ]
        yield Answer({"tokens": tokens}, tuple(f"{t['token']}\t{t['label']} {t['score']:.4f}" for t in tokens))


def _answer_question(opened: OpenedHead, args: argparse.Namespace) -> Iterator[Answer]:
    """Feed the question followed by each text, both with the ids that the tokenizer puts around a text."""
    tokenizer = opened.tokenizer
    question = opened.ids(args.question)
    contexts = [opened.ids(text) for text in args.text]
    if not all(map(opened.inside, contexts)):
        raise UserError("a --text is empty, expected a text that contains the answer")
    prompts = [question + context for context in contexts]
    for ids, context, outputs in zip(prompts, contexts, map(opened.engine.head_outputs, prompts), strict=True):
        inside = opened.inside(context)
        span = best_span(outputs[len(question) + inside.start : len(question) + inside.stop], args.max_answer_tokens)
        start, end = (len(question) + inside.start + token for token in (span.start, span.end))
        stream = tokenizer.stream(after=ids[:start])
        answer = ("".join(stream.push(token_id) for token_id in ids[start : end + 1]) + stream.flush()).strip()
        fields = {"answer": answer, "score": span.score, "start_token": span.start, "end_token": span.end}
        yield Answer(fields, (f"{answer} {span.score:.4f}",))


TASKS: Mapping[HeadName, Callable[[OpenedHead, argparse.Namespace], Iterator[Answer]]] = {
    "sequence_classification": _label_texts,
    "token_classification": _label_tokens,
    "question_answering": _answer_question,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Classify each text, as `python -m runtime.classify --help` describes."""
    args = _parser().parse_args(argv)
    if args.max_answer_tokens < 1:
        raise UserError(f"--max-answer-tokens is {args.max_answer_tokens}, expected at least 1")
    opened = open_head(args.artifact, args.threads, args.minimum_build, tuple(TASKS))
    asks = opened.model.head == "question_answering"
    if asks != (args.question is not None):
        remedy = "pass --question" if asks else "leave --question out"
        raise UserError(f"{args.artifact} has the head {opened.model.head}; {remedy}")
    answers = list(TASKS[opened.model.head](opened, args))
    if args.json:
        print(json.dumps([{"text": text, **answer.fields} for text, answer in zip(args.text, answers, strict=True)]))
        return 0
    for answer in answers:
        cli.write("".join(f"{line}\n" for line in answer.lines))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = whole_texts_parser(
        "runtime.classify", "Label texts or their tokens, or find an answer in them, with a compiled artifact."
    )
    parser.add_argument(
        "--question", metavar="TEXT", help="the question to ask of each --text, for an artifact that answers questions"
    )
    parser.add_argument(
        "--max-answer-tokens",
        type=int,
        default=MAX_ANSWER_TOKENS,
        metavar="N",
        help="answers have at most N tokens (default: %(default)s)",
    )
    return parser


if __name__ == "__main__":
    run_command(main)
