"""One check of a machine: what was found, what was expected, and what to do."""

from collections.abc import Callable
from dataclasses import dataclass

from runtime.errors import UserError

AS_IT_SAYS = "do as the message says"


@dataclass(frozen=True)
class Finding:
    """One row of the table; `remedy` is empty if all is well."""

    check: str
    found: str
    expected: str
    remedy: str = ""


def answer(check: str, expected: str, ask: Callable[[], str], remedy: str) -> Finding:
    """A finding with the result of `ask`, or with the message that it raises and the remedy."""
    try:
        return Finding(check, ask(), expected)
    except (UserError, OSError, ImportError) as error:
        return Finding(check, str(error), expected, remedy)
