"""Prompts that ask for what stands between two texts, as Codestral was trained to fill it in."""

from runtime.errors import UserError
from runtime.text.instruct_formats import BEGIN_PREFIX, BEGIN_SUFFIX, BOS
from runtime.text.tokenizer import Tokenizer

GUARD, GUARD_TOKENS = "\N{WHITE SMILING FACE}", 2


def encode_fill_in(tokenizer: Tokenizer, prefix: str, suffix: str) -> list[int]:
    """Ids of <s>[SUFFIX]suffix[PREFIX]prefix, which the model continues with what belongs in between.

    The same ids as of Mistral's reference encoder, mistral-common. Raises `UserError` if the tokenizer has no tokens
    for it.
    """
    controls = tokenizer.control_tokens
    lacking = next(
        (control.name for control in (BOS, BEGIN_SUFFIX, BEGIN_PREFIX) if control.name not in controls), None
    )
    if lacking is not None:
        raise UserError(
            f"the tokenizer has no token {lacking}, which --suffix needs: the model was not trained to fill in text; "
            "leave the flag out, or use a model that was, such as Codestral"
        )
    return [
        controls[BOS.name],
        controls[BEGIN_SUFFIX.name],
        *(_without_space_in_front(tokenizer, suffix) if suffix else ()),
        controls[BEGIN_PREFIX.name],
        *tokenizer.encode(prefix, add_bos=False),
    ]


def _without_space_in_front(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text that goes on from another: those of a character that merges with nothing are cut off again."""
    return tokenizer.encode(GUARD + text, add_bos=False)[GUARD_TOKENS:]
