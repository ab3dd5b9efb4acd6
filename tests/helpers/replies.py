"""The steps of replies that are written by hand."""

from runtime.text.stream import Step, with_text


def steps_of(tokenizer, ids, stops=(), reason="stop"):
    """Steps of ids with their texts; the last one ends the text or, for another reason, is the last id."""
    if reason == "stop":
        steps = [Step(token_id) for token_id in ids] + [Step(2, finish_reason="stop")]
    else:
        steps = [Step(token_id) for token_id in ids[:-1]] + [Step(ids[-1], finish_reason=reason)]
    return list(with_text(iter(steps), tokenizer.text_stream(stops)))


def written(tokenizer, *pieces):
    """Ids of texts and of control tokens' names."""
    controls = tokenizer.control_tokens
    ids = [[controls[piece]] if piece in controls else tokenizer.encode(piece, add_bos=False) for piece in pieces]
    return [token_id for part in ids for token_id in part]


def counted():
    """New ids of calls that are known beforehand."""
    numbers = iter(range(100))
    return lambda: f"new{next(numbers):06d}"
