"""The texts of a request, each as text or as token ids."""

from collections.abc import Sequence

from runtime.server.api.common import TextsOrIds
from runtime.server.http.failures import refused


def separate_texts(given: TextsOrIds, most: int, param: str) -> list[str | list[int]]:
    """One text, or ids of one text, or a list of several; `param` names the field.

    Raises `RequestFailure` for none, for more than `most`, and for a list that mixes ids with texts.
    """
    if isinstance(given, str):
        return [given]
    ids = [each for each in given if isinstance(each, int)]
    texts = [each for each in given if not isinstance(each, int)]
    if ids and not texts:
        return [ids]
    if ids or not texts:
        found = "texts and ids" if ids else "nothing"
        raise refused(f"{param} is a list of {found}, expected texts, token ids, or lists of ids", param=param)
    if len(texts) > most:
        raise refused(f"{param} is a list of {len(texts)}, expected at most {most}", param=param)
    return texts


def check_ids(ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raise `RequestFailure` for an id outside the vocabulary."""
    largest = max(ids, default=0)
    if largest >= vocab_size:
        raise refused(
            f"{param} has the token id {largest}, expected 0 to {vocab_size - 1}, the ids of the vocabulary",
            param=param,
        )
