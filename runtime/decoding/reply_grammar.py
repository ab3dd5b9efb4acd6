"""The grammar of a reply: of its answer, of the tools that it may or must call, and of a thought in front of both.

Text that may be anything is left free, so that a model's choices in it are what they are without a grammar.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from runtime.decoding.constraint import EitherGrammar, FreeText, Grammar
from runtime.errors import UserError
from runtime.text.call_grammar import CallGrammar, arguments_of
from runtime.text.grammar import GrammarCompiler
from runtime.text.grammar_source import GrammarSource
from runtime.text.instruct_formats import ARGUMENTS, BEGIN_THINK, CALL_ID, END_THINK, TOOL_CALLS, CallLayout
from runtime.text.messages import Tool


@dataclass(frozen=True)
class NamedTool:
    """The choice of the one tool that the reply must call."""

    name: str


ToolChoice = Literal["auto", "none", "required"] | NamedTool


@dataclass(frozen=True)
class ReplyRules:
    """What a reply must keep to. `parallel` allows several calls; `answer` is None for any text."""

    tools: Sequence[Tool] = ()
    tool_choice: ToolChoice = "auto"
    parallel: bool = True
    answer: GrammarSource | None = None


class ReplyGrammars:
    """Compiles the grammars of replies, from any thread; `layout` is that of the artifact's conversation encoder."""

    def __init__(self, compiler: GrammarCompiler, layout: CallLayout | None) -> None:
        self._compiler = compiler
        self._ids = {name: token_id for token_id, name in compiler.tokenizer.dividers.items()}
        self._in_calls = [self._ids[one.name] for one in (TOOL_CALLS, CALL_ID, ARGUMENTS) if one.name in self._ids]
        # In front of a text that begins anew, a space may be the tokenizer's own, which is no part of the text.
        self._space = '" "? ' if compiler.tokenizer.drops_first_space else ""
        known = layout is not None and all(control.name in self._ids for control in layout.controls)
        self._call_grammar = CallGrammar(layout, self._ids, self._space) if layout is not None and known else None

    def compile(self, rules: ReplyRules, *, in_thought: bool = False) -> Grammar | None:
        """The grammar of a reply; None if any text will do. `in_thought` says that the prompt ends with [THINK].

        Raises `UserError` for a choice that the artifact's format cannot express or that names no tool, and like
        `GrammarCompiler.compile`.
        """
        tools = self._callable(rules)
        if tools and rules.tool_choice != "auto":
            return self._behind_thought(self._compiled(rules, tools, "calls"), in_thought)
        if rules.answer is not None:
            start = f"{self._space}@answer" + (" | calls" if tools else "")
            return self._behind_thought(self._compiled(rules, tools, start), in_thought)
        if tools:
            behind = self._compiled(rules, tools, "behind")
            return FreeText(self._compiler.vocab_size, until=self._ids[TOOL_CALLS.name], then=behind)
        if rules.tool_choice == "none" and self._in_calls:
            return FreeText(self._compiler.vocab_size, forbidden=self._in_calls)
        return None

    def _callable(self, rules: ReplyRules) -> Sequence[Tool]:
        """The tools that the reply may call; none of them in text that is free, if the form of calls is unknown."""
        choice = rules.tool_choice
        if choice == "none" or (choice == "auto" and self._call_grammar is None):
            return ()
        tools = [tool for tool in rules.tools if choice in ("auto", "required", NamedTool(tool["function"]["name"]))]
        if choice == "auto":
            return tools
        if not tools:
            what = f"names the tool {choice.name!r}" if isinstance(choice, NamedTool) else "requires a call"
            raise UserError(f"the tool choice {what}, but the request has no such tool; add it to the tools")
        if self._call_grammar is None:
            raise UserError(
                "the tool choice requires a call, but the form of calls of the artifact's model is not known; leave "
                "the choice out, or use a model whose tokenizer and format of conversations have [TOOL_CALLS]"
            )
        return tools

    def _compiled(self, rules: ReplyRules, tools: Sequence[Tool], start: str) -> Grammar:
        """The grammar with this rule `start`, in which `calls` and `behind` are those of the tools."""
        parts = {} if rules.answer is None else {"answer": rules.answer}
        lines = [f"start: {start}"]
        if tools and self._call_grammar is not None:
            parts |= arguments_of(tools)
            lines.append(self._call_grammar.rules(tools, parallel=rules.parallel))
        return self._compiler.compile("\n".join(lines), parts)

    def _behind_thought(self, grammar: Grammar, in_thought: bool) -> Grammar:
        """The grammar, with a thought in front if the tokenizer has tokens for one; no text ends within it."""
        opens, closes = self._ids.get(BEGIN_THINK.name), self._ids.get(END_THINK.name)
        if opens is None or closes is None:
            return grammar
        forbidden = [opens, *self._in_calls, *self._compiler.eos_ids]
        thought = FreeText(self._compiler.vocab_size, forbidden, until=closes, then=grammar)
        return thought if in_thought else EitherGrammar(opens, thought, grammar)
