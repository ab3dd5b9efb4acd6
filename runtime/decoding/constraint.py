"""What a text must keep to: a grammar, and how far one text has come in it.

`runtime.text.grammar` compiles grammars; here is what sampling and scheduling need of one, and the two forms of text
around it that need no compiling: free text up to a certain token, and a thought in front of the answer.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]


class Constraint(Protocol):
    """How far one text has come in a grammar."""

    def allowed(self, drafts: Sequence[int] = ()) -> Mask | None:
        """The ids that may follow the text and `drafts`, as a mask (vocab,) that holds at least one; None for any id.

        All `drafts` are permitted. The mask depends on the tokens alone, and nothing changes. Raises `UserError` if the
        text cannot go on, such as where the grammar has become too complex.
        """

    def permitted(self, drafts: Sequence[int]) -> int:
        """How many of these tokens, from the first on, may follow the text. An error is raised by `allowed` alone."""

    def append(self, token_id: int) -> None:
        """Add the next token of the text; an error is raised by the next `allowed`."""


class Grammar(Protocol):
    """A set of texts; it is shared by all the texts that must keep to it."""

    def begin(self) -> Constraint:
        """The constraint of a new text."""


@dataclass(frozen=True)
class FreeText:
    """A grammar of any ids but the `forbidden` ones; behind the id `until`, if one is given, `then` begins."""

    vocab_size: int
    forbidden: Collection[int] = ()
    until: int | None = None
    then: Grammar | None = None

    def begin(self) -> Constraint:
        """The constraint of a new text."""
        return _InFreeText(self)


class _InFreeText:
    """A text of `FreeText`."""

    def __init__(self, grammar: FreeText) -> None:
        self._grammar = grammar
        self._mask: Mask | None = None
        if grammar.forbidden:
            self._mask = np.ones(grammar.vocab_size, np.bool_)
            self._mask[list(grammar.forbidden)] = False
        self._behind: Constraint | None = None  # the constraint of what follows the id `until`

    def allowed(self, drafts: Sequence[int] = ()) -> Mask | None:
        _, behind, rest = self._divided(drafts)
        return self._mask if behind is None else behind.allowed(rest)

    def permitted(self, drafts: Sequence[int]) -> int:
        free, behind, rest = self._divided(drafts)
        wrong = next((place for place, token in enumerate(free) if token in self._grammar.forbidden), None)
        if wrong is not None:
            return wrong
        return len(free) + (0 if behind is None else behind.permitted(rest))

    def append(self, token_id: int) -> None:
        if self._behind is not None:
            self._behind.append(token_id)
        elif token_id == self._grammar.until and self._grammar.then is not None:
            self._behind = self._grammar.then.begin()

    def _divided(self, drafts: Sequence[int]) -> tuple[Sequence[int], Constraint | None, Sequence[int]]:
        """The drafts that are free text, the constraint of those behind them, and these."""
        if self._behind is not None:
            return (), self._behind, drafts
        ends = (place for place, token_id in enumerate(drafts, 1) if token_id == self._grammar.until)
        end = next(ends, None)
        if self._grammar.then is None or end is None:
            return drafts, None, ()
        return drafts[:end], self._grammar.then.begin(), drafts[end:]


@dataclass(frozen=True)
class EitherGrammar:
    """The grammar `behind`, if a text begins with the id `first`; otherwise the grammar `otherwise`."""

    first: int
    behind: Grammar
    otherwise: Grammar

    def begin(self) -> Constraint:
        """The constraint of a new text."""
        return _InEither(self)


class _InEither:
    """A text of `EitherGrammar`."""

    def __init__(self, grammar: EitherGrammar) -> None:
        self._grammar = grammar
        self._taken: Constraint | None = None  # after the first token
        self._unopened = grammar.otherwise.begin()

    def allowed(self, drafts: Sequence[int] = ()) -> Mask | None:
        if self._taken is not None:
            return self._taken.allowed(drafts)
        if drafts and drafts[0] == self._grammar.first:
            return self._grammar.behind.begin().allowed(drafts[1:])
        mask = self._unopened.allowed(drafts)
        if drafts or mask is None:
            return mask
        mask = mask.copy()
        mask[self._grammar.first] = True
        return mask

    def permitted(self, drafts: Sequence[int]) -> int:
        if self._taken is not None:
            return self._taken.permitted(drafts)
        if drafts and drafts[0] == self._grammar.first:
            return 1 + self._grammar.behind.begin().permitted(drafts[1:])
        return self._unopened.permitted(drafts)

    def append(self, token_id: int) -> None:
        if self._taken is not None:
            self._taken.append(token_id)
        elif token_id == self._grammar.first:
            self._taken = self._grammar.behind.begin()
        else:
            self._taken = self._unopened
            self._taken.append(token_id)
