"""Log probabilities in the forms of OpenAI's API."""

from collections.abc import Sequence

from runtime.decoding.logprobs import TokenLogprobs
from runtime.server.api import chat
from runtime.server.api.completions import CompletionLogprobs
from runtime.text.stream import Step
from runtime.text.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0  # JSON has no minus infinity; OpenAI's API gives this for what is very unlikely


def shown(logprob: float) -> float:
    """A log probability that JSON can hold."""
    return max(logprob, LEAST_LOGPROB)


def chat_logprobs(tokenizer: Tokenizer, step: Step) -> chat.ChoiceLogprobs | None:
    """Log probabilities of one token; None if they were not asked for."""
    if step.logprob is None:
        return None
    likeliest = [
        chat.TopLogprob(*_text_and_number(tokenizer, token_id, logprob), list(bytes_of(tokenizer, token_id)))
        for token_id, logprob in step.logprobs or ()
    ]
    token, logprob = _text_and_number(tokenizer, step.token_id, step.logprob)
    return chat.ChoiceLogprobs([chat.TokenLogprob(token, logprob, list(bytes_of(tokenizer, step.token_id)), likeliest)])


def prompt_logprobs(tokenizer: Tokenizer, ids: Sequence[int], scores: Sequence[TokenLogprobs]) -> CompletionLogprobs:
    """Those of a prompt's tokens, of which the first has none; `scores` are those of the others."""
    stream, offset, offsets = tokenizer.stream(), 0, []
    for token_id in ids:
        offsets.append(offset)
        offset += len(stream.push(token_id))
    likeliest = [by_text(tokenizer, each.top) for each in scores]
    return CompletionLogprobs(
        [token_text(tokenizer, token_id) for token_id in ids],
        [None, *(shown(each.chosen) for each in scores)],
        [None, *likeliest],
        offsets,
    )


def by_text(tokenizer: Tokenizer, top: Sequence[tuple[int, float]]) -> dict[str, float]:
    """Log probabilities of tokens, best first, by their text; of those with one text, the best."""
    return {token_text(tokenizer, token_id): shown(logprob) for token_id, logprob in reversed(top)}


def _text_and_number(tokenizer: Tokenizer, token_id: int, logprob: float) -> tuple[str, float]:
    return token_text(tokenizer, token_id), shown(logprob)


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """A token as text, with U+FFFD for bytes that are no whole character; `bytes_of` has these exactly."""
    return bytes_of(tokenizer, token_id).decode(errors="replace")


def bytes_of(tokenizer: Tokenizer, token_id: int) -> bytes:
    """The bytes that a token adds to a text; of a control token, its name."""
    found = tokenizer.token_bytes(token_id)
    return (tokenizer.token_text(token_id) or "").encode() if found is None else found
