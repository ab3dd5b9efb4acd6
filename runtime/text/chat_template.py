"""From messages to the prompt text that a chat model was trained on, through its own Jinja template.

The environment is that of Hugging Face's `apply_chat_template`, in Jinja's sandbox and with limits: templates come with
the checkpoint and are not trusted.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path

from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser

from runtime.artifact.manifest import TokenizerSpec
from runtime.errors import UserError, one_line
from runtime.text.call_ids import with_short_ids
from runtime.text.control_lookalikes import StandIns, is_markup
from runtime.text.instruct_formats import ARGUMENTS, CALL_ID, DIVIDERS, TOOL_CALLS, CallLayout
from runtime.text.message_parts import as_texts, in_parts
from runtime.text.messages import Message, Tool
from runtime.text.template_limits import LimitedEnvironment, limited
from runtime.text.tokenizer import Tokenizer

LONGEST_DATE = 200  # characters of a pattern for `strftime_now`
HELLO = Message(role="user", content="Hello")
# Conversations whose text differs in one message of each role, and in no text's length.
TOLD_APART: Mapping[str, tuple[list[Message], list[Message]]] = {
    "user": ([Message(role="user", content="quartz")], [Message(role="user", content="copper")]),
    "assistant": (
        [HELLO, Message(role="assistant", content="quartz"), HELLO],
        [HELLO, Message(role="assistant", content="copper"), HELLO],
    ),
    "system": (
        [Message(role="system", content="quartz"), HELLO],
        [Message(role="system", content="copper"), HELLO],
    ),
}


class GenerationTag(Extension):
    """`{% generation %}` marks text that a model learns to write in training; here its body is plain template text."""

    tags = frozenset({"generation"})

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The nodes between the tag and its end."""
        next(parser.stream)
        body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return body


class ChatTemplate:
    """A compiled template; raises `UserError` if its source is not valid Jinja. `where` names it in errors.

    `special_tokens` are what it may write by variables, such as `eos_token`.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], *, where: str = "the chat template") -> None:
        self._special_tokens = dict(special_tokens)
        self._where = where
        self.source = source
        try:
            with limited():
                self._template = _environment().from_string(source)
        except Exception as error:  # Python compiles what Jinja makes of it, and may refuse that too
            raise UserError(
                f"{where} is not a valid jinja template: {one_line(error)}; fix it in the checkpoint and compile again"
            ) from error

    def render(
        self, messages: Sequence[Message], *, tools: Sequence[Tool] = (), add_generation_prompt: bool = True
    ) -> str:
        """The prompt text of a conversation, ready for the next reply.

        Raises `UserError` with the reason if the template refuses the conversation.
        """
        try:
            # missing tools and documents are None: templates check whether they are none, not whether they are defined
            with limited():
                variables: dict[str, object] = {
                    **self._special_tokens,
                    "messages": [dict(message) for message in messages],
                    "tools": [dict(tool) for tool in tools] or None,
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                }
                return str(self._template.render(variables))
        except Exception as error:  # a template's expressions can raise anything
            raise UserError(f"{self._where} cannot render this conversation: {one_line(error)}") from error


def open_chat_template(spec: TokenizerSpec, folder: Path, tokenizer: Tokenizer) -> ChatTemplate:
    """Open the template that `spec` names in `folder`; raises `UserError` if there is none or it cannot be read."""
    if spec.chat_template is None:
        raise UserError(
            "the artifact has no chat template: use `python -m runtime.generate` without --chat or, if its model was "
            "tuned for conversations, compile it with frontend.chat_template or frontend.instruct"
        )
    path = folder / spec.chat_template
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the chat template {path} cannot be read: {error}; compile the artifact again") from error
    return ChatTemplate(source, _special_tokens(spec, tokenizer), where=str(path))


def _special_tokens(spec: TokenizerSpec, tokenizer: Tokenizer) -> Mapping[str, str]:
    if spec.special_tokens is not None:
        return spec.special_tokens
    ids = {"bos_token": spec.bos_id, "eos_token": next(iter(spec.eos_ids), None)}
    names = {name: tokenizer.token_text(token_id) for name, token_id in ids.items() if token_id is not None}
    return {name: text for name, text in names.items() if text is not None}


class TemplateEncoder:
    """Conversations to ids through a template.

    Only the template's own control tokens count as such; nothing within a message does. A control token is every token
    with a name that is markup, or that the template writes, whatever its kind in the tokenizer's file.
    """

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer) -> None:
        self._template = template
        self._tokenizer = tokenizer

    @property
    def writes_reasoning(self) -> bool:
        """Whether the template knows parts of the type thinking; if not, it expects texts."""
        return "thinking" in self._template.source

    @property
    def writes_tools(self) -> bool:
        """Whether the template mentions tools at all; if not, it leaves them out in silence."""
        return "tools" in self._template.source

    @property
    def call_layout(self) -> CallLayout | None:
        """What the model writes for its calls, by the control tokens that its template names; None if by none."""
        known = {control for control in DIVIDERS if control.name in self._tokenizer.dividers.values()}
        named = {control for control in known if control.name in self._template.source}
        if TOOL_CALLS not in named:
            return None
        if ARGUMENTS in named:
            return CallLayout(listed=False, with_ids=CALL_ID in named)
        return CallLayout(listed=True, with_ids='"id"' in self._template.source)

    def encode(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        """Ids up to where the next reply begins; the template itself writes bos where the model needs it.

        Raises `UserError` like `ChatTemplate.render`.
        """
        if self.call_layout is not None:  # Mistral's templates refuse other ids
            messages = with_short_ids(messages)
        texts = as_texts(messages)
        if not self.writes_reasoning:
            messages = texts
        messages = in_parts(messages, self._roles_in_parts)
        added = self._tokenizer.added_tokens
        names = (*self._tokenizer.control_tokens, *added)
        text, meanings = self._rendered(names, messages, tools, all_punctuation=False)
        certain, meanings_of_certain = self._rendered(names, messages, tools, all_punctuation=True)
        pattern = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")
        if pattern.findall(text) != pattern.findall(certain):  # some names are not the template's own
            text, meanings = certain, meanings_of_certain
        # Words that were added to a vocabulary stay words, unless the template writes them.
        controls = [name for name in added if is_markup(name) or name in certain or name in self._template.source]
        return self._tokenizer.encode_rendered(text, meanings, controls)

    @cached_property
    def _roles_in_parts(self) -> frozenset[str]:
        """The roles of whose messages the template writes only parts, as of models that also see images."""
        found: set[str] = set()
        for role in TOLD_APART:
            if not self._writes(role, found) and self._writes(role, {*found, role}):
                found.add(role)
        return frozenset(found)

    def _writes(self, role: str, roles_in_parts: Collection[str]) -> bool:
        """Whether the template writes what a message of the role says."""
        try:
            one, other = (self._template.render(in_parts(given, roles_in_parts)) for given in TOLD_APART[role])
        except UserError:
            return False
        return one != other

    def _rendered(
        self, names: Sequence[str], messages: Sequence[Message], tools: Sequence[Tool], *, all_punctuation: bool
    ) -> tuple[str, Mapping[str, str]]:
        """The conversation's text and the stand-ins in it; a name that is left in it was written by the template."""
        given = (self._template.source, messages, tools)
        stand_ins = StandIns(names, given, self._tokenizer.added_tokens, all_punctuation=all_punctuation)
        text = self._template.render(stand_ins.hide(list(messages)), tools=stand_ins.hide(list(tools)))
        return stand_ins.found_again(text), stand_ins.meanings


def _environment() -> LimitedEnvironment:
    environment = LimitedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationTag]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.finish()


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of Jinja's own filter, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    if len(pattern) > LONGEST_DATE or re.search("[0-9]", pattern):
        raise TemplateError("a date's pattern is too long, or has a width")
    return datetime.now().strftime(pattern)
