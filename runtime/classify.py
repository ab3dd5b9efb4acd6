"""`python -m runtime.classify ARTIFACT --text ...`: label texts or their tokens, or find the answer to a question."""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from runtime import cli
from runtime.artifact.manifest import HeadName
from runtime.decoding.labels import MAX_ANSWER_TOKENS, found_answer, labelled_tokens, ranked_labels
from runtime.decoding.whole_texts import OpenedHead, open_head, whole_texts_parser
from runtime.errors import UserError, run_command


@dataclass(frozen=True)
class Answer:
    """The result for one text: an object for --json, and lines for people."""

    fields: dict[str, Any]
    lines: tuple[str, ...]


def _label_texts(opened: OpenedHead, args: argparse.Namespace) -> Iterator[Answer]:
    ids = [opened.ids(text) for text in args.text]
    for outputs in map(opened.engine.head_outputs, ids):
        ranked = [asdict(each) for each in ranked_labels(opened.model, outputs[0])]
        fields = {**ranked[0], "scores": ranked, "logits": outputs[0].tolist()}
        yield Answer(fields, (f"{ranked[0]['label']} {ranked[0]['score']:.4f}",))


def _label_tokens(opened: OpenedHead, args: argparse.Namespace) -> Iterator[Answer]:
    ids = [opened.ids(text) for text in args.text]
    for row, outputs in zip(ids, map(opened.engine.head_outputs, ids), strict=True):
        tokens = labelled_tokens(opened, row, outputs)
        lines = tuple(f"{each.token}\t{each.label} {each.score:.4f}" for each in tokens)
        yield Answer({"tokens": [asdict(each) for each in tokens]}, lines)


def _answer_question(opened: OpenedHead, args: argparse.Namespace) -> Iterator[Answer]:
    """Feed the question followed by each text, both with the ids that the tokenizer puts around a text."""
    question = opened.ids(args.question)
    contexts = [opened.ids(text) for text in args.text]
    if not all(map(opened.inside, contexts)):
        raise UserError("a --text is empty, expected a text that contains the answer")
    outputs = map(opened.engine.head_outputs, [question + context for context in contexts])
    for context, logits in zip(contexts, outputs, strict=True):
        found = found_answer(opened, question, context, logits, args.max_answer_tokens)
        span = found.span
        fields = {"answer": found.answer, "score": span.score, "start_token": span.start, "end_token": span.end}
        yield Answer(fields, (f"{found.answer} {span.score:.4f}",))


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
