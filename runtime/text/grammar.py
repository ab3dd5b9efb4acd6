"""Grammars, compiled by the package llguidance for the vocabulary of one tokenizer.

The package works on bytes: it gets the bytes of each id, and tells which ids may follow. It never raises for what a
grammar or a text does wrong but goes into a state of error, so that state is looked at after every call; what it does
raise is a panic, which `refusing` turns into a `UserError` too. It is imported only when a grammar is compiled.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from runtime.errors import UserError, one_line, refusing
from runtime.text.grammar_source import GrammarSource, JsonSchema, check_extent
from runtime.text.token_bytes import TokenBytes
from runtime.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Mask = NDArray[np.bool_]
# The package's own limit of states, of 1 to 2 kB each, would allow half a gigabyte.
MOST_LEXER_STATES = 20_000
MOST_DIGITS = 40  # in a row, outside of strings; a float64 has at most 17 that matter
WHAT_TO_DO = "simplify it"


class GrammarCompiler:
    """Compiles grammars for a tokenizer, from any thread; `vocab_size` is the number of the model's logits.

    Raises `UserError` if the package is not installed, or if the tokenizer is of no kind that it can work with.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        try:
            import llguidance
        except ImportError as error:
            raise UserError(
                "structured output needs the package llguidance, which is not installed; install it, or send the "
                "request without a response format and without a tool choice"
            ) from error
        if not any(token_id < vocab_size for token_id in tokenizer.spec.eos_ids):
            raise UserError("structured output needs a token that ends a text, and the artifact's tokenizer has none")
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self._vocabulary = Vocabulary(tokenizer, vocab_size)
        with refusing("llguidance does not take the tokenizer", "send the request without structured output"):
            self._ll_tokenizer = self._vocabulary.opened()
            self._limits = llguidance.LLParserLimits(max_lexer_states=MOST_LEXER_STATES, verbose_errors=False)

    @property
    def eos_ids(self) -> Sequence[int]:
        """The ids that end a text."""
        return self._vocabulary.eos_ids

    def compile(self, main: str, parts: Mapping[str, GrammarSource]) -> "CompiledGrammar":
        """The grammar whose rule `start` is in `main`, a Lark grammar in which `@NAME` is the part of that name.

        Raises `UserError` for a part that is malformed, too large or beyond what the package knows, with its place, and
        for a grammar without any text.
        """
        check_extent(parts.values())
        for source in parts.values():
            self._check(source)
        named = [{"name": name, **source.part()} for name, source in parts.items()]
        matcher = self._matcher({"grammars": [{"lark_grammar": main}, *named]})
        reason = _error_of(matcher)
        if reason:
            raise UserError(f"{' and '.join(source.what for source in parts.values())} cannot be used: {reason}")
        bounded = any(source.writes_json for source in parts.values())
        grammar = CompiledGrammar(matcher, self._vocabulary, bounded_numbers=bounded)
        grammar.begin().allowed()  # shows whether there is any text, and does a part of the work here
        return grammar

    def _matcher(self, grammar: Mapping[str, object]) -> "LLMatcher":
        import llguidance

        with refusing("the grammar cannot be compiled", WHAT_TO_DO):
            return llguidance.LLMatcher(self._ll_tokenizer, json.dumps(grammar), log_level=0, limits=self._limits)

    def _check(self, source: GrammarSource) -> None:
        """Raise `UserError` with the innermost place that a part is refused for."""
        reason = self._reason(source)
        if not reason:
            return
        places = ["#"]
        while isinstance(source, JsonSchema):
            inner = next(((place, one) for place, one in source.smaller() if self._reason(one) == reason), None)
            if inner is None:
                break
            places.append(inner[0])
            source = inner[1]
        where = f" at {'/'.join(places)}" if isinstance(source, JsonSchema) else ""
        raise UserError(f"{source.what}{where} cannot be used: {reason}; change it")

    def _reason(self, source: GrammarSource) -> str:
        """Why a part cannot be used; empty if it can."""
        return _error_of(self._matcher({"grammars": [source.part()]}))


class Vocabulary:
    """The bytes of a tokenizer's ids, and what the constraints know about them."""

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        self.size = size
        self.eos_ids = tuple(token_id for token_id in tokenizer.spec.eos_ids if token_id < size)
        self._tokenizer = tokenizer
        self._bytes = TokenBytes(tokenizer, size)

    def opened(self) -> "LLTokenizer":
        """The package's own form of it."""
        import llguidance

        return llguidance.LLTokenizer(llguidance.TokenizerWrapper(self._bytes), slices=None)

    @cached_property
    def digits(self) -> NDArray[np.int64]:
        """How many digits each id stands for (vocab,); 0 for one that has anything else in it."""
        return np.array([len(token) if token.isdigit() else 0 for token in self._bytes.tokens])

    @cached_property
    def quotes(self) -> NDArray[np.int64]:
        """The ids of a quotation mark alone."""
        return np.flatnonzero([token == b'"' for token in self._bytes.tokens])


class CompiledGrammar:
    """A grammar; `bounded_numbers` says that no number in it is longer than numbers need to be."""

    def __init__(self, matcher: "LLMatcher", vocabulary: Vocabulary, *, bounded_numbers: bool) -> None:
        self._matcher = matcher
        self.vocabulary = vocabulary
        self.bounded_numbers = bounded_numbers

    def begin(self) -> "MatcherConstraint":
        """The constraint of a new text."""
        return MatcherConstraint(self._matcher.deep_copy(), self)


class MatcherConstraint:
    """How far a text has come in a compiled grammar. At its end, only ids that end a text are allowed."""

    def __init__(self, matcher: "LLMatcher", grammar: CompiledGrammar) -> None:
        self._matcher = matcher
        self._vocabulary = grammar.vocabulary
        self._bounded_numbers = grammar.bounded_numbers
        self._digits = 0  # at the end of the text, in a row
        self._ended = False

    def allowed(self, drafts: Sequence[int] = ()) -> Mask:
        """The ids that may follow the text and `drafts`, as a mask (vocab,).

        Raises `UserError` if the grammar has become too complex.
        """
        with refusing("the grammar cannot go on", WHAT_TO_DO):
            if drafts:
                self._matcher.consume_tokens(list(drafts))
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            if drafts:
                self._matcher.rollback(len(drafts))
            reason = _error_of(self._matcher)
        if reason:
            raise UserError(f"the text cannot go on under its grammar: {reason}; {WHAT_TO_DO}")
        mask = np.unpackbits(bits, count=self._vocabulary.size, bitorder="little").view(np.bool_)
        mask[list(self._vocabulary.eos_ids)] = mask[self._vocabulary.eos_ids[0]]
        if self._bounded_numbers and self._digits_after(drafts) >= MOST_DIGITS:
            mask = self._without_digits(mask)
        if not mask.any():
            raise UserError(f"no token can go on with the text under its grammar; {WHAT_TO_DO}")
        return mask

    def permitted(self, drafts: Sequence[int]) -> int:
        """How many of these tokens, from the first on, may follow the text; an id that ends it is none."""
        ends = (place for place, token_id in enumerate(drafts) if token_id in self._vocabulary.eos_ids)
        count = next(ends, len(drafts))
        if self._ended or not count or _error_of(self._matcher):
            return 0
        try:
            with refusing("the grammar cannot go on", WHAT_TO_DO):
                valid = self._matcher.validate_tokens(list(drafts[:count]))
        except UserError:
            return 0
        return next((place for place in range(valid) if self._too_long(drafts[: place + 1])), valid)

    def append(self, token_id: int) -> None:
        """Add the next token of the text."""
        self._digits = self._digits_after((token_id,))
        if token_id in self._vocabulary.eos_ids:
            self._ended = True
            token_id = self._vocabulary.eos_ids[0]
        self._matcher.consume_token(token_id)

    def _digits_after(self, drafts: Sequence[int]) -> int:
        run = self._digits
        for token_id in drafts:
            more = int(self._vocabulary.digits[token_id])
            run = run + more if more else 0
        return run

    def _too_long(self, drafts: Sequence[int]) -> bool:
        """Whether the last of the drafts might be one digit too many; that is looked at without drafts."""
        return self._bounded_numbers and self._digits_after(drafts) > MOST_DIGITS

    def _without_digits(self, mask: Mask) -> Mask:
        """The mask without ids of digits alone, unless the text is in a string or has to go on with a digit."""
        others = mask & (self._vocabulary.digits == 0)
        return mask if mask[self._vocabulary.quotes].any() or not others.any() else others


def _error_of(matcher: "LLMatcher") -> str:
    """Why a matcher can do no more; empty if it can."""
    if not matcher.is_error():
        return ""
    return one_line(ValueError(matcher.get_error().removesuffix("<non-verbose/>")))
