"""The grammar of tool calls in the layouts of the instruct formats, as a Lark grammar for the package llguidance.

A call is written as the formats write it, with a schema of its own for the arguments of each tool.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from runtime.errors import UserError
from runtime.text.call_ids import ID_LENGTH
from runtime.text.grammar_source import GrammarSource, JsonSchema
from runtime.text.instruct_formats import ARGUMENTS, CALL_ID, TOOL_CALLS, CallLayout, Control
from runtime.text.message_checks import check_tool_names
from runtime.text.messages import Tool

MOST_CALLS = 32  # in one reply: a model may repeat its call for ever
MOST_TOOLS = 128  # OpenAI's limit
LISTED_ID = " ".join([json.dumps(', "id": "'), "ID", json.dumps('"}')])  # the end of a call in a list


@dataclass(frozen=True)
class CallGrammar:
    """Rules for the calls of one layout; `ids` are those of the control tokens by name.

    `space` is what may come in front of a text that begins anew, as a part of a rule.
    """

    layout: CallLayout
    ids: Mapping[str, int]
    space: str

    def rules(self, tools: Sequence[Tool], *, parallel: bool) -> str:
        """The rule `calls`, which begins with [TOOL_CALLS], and `behind`, which begins right behind it.

        `parallel` allows several calls. The arguments of tool i are the part `@arguments_i`.
        """
        further = MOST_CALLS - 1 if parallel else 0
        if self.layout.listed:
            more = f'("," " "? call){{0,{further}}} ' if further else ""
            behind = f'{self.space}"[" call {more}"]"'
        else:
            behind = "call" + (f" ({self._token(TOOL_CALLS)} call){{0,{further}}}" if further else "")
        each = [f"call_{index}: {self._call(tool['function']['name'], index)}" for index, tool in enumerate(tools)]
        return "\n".join(
            [
                f"calls: {self._token(TOOL_CALLS)} behind",
                f"behind: {behind}",
                f"call: {' | '.join(f'call_{index}' for index in range(len(tools)))}",
                *each,
                *([f"ID: /[a-zA-Z0-9]{{{ID_LENGTH}}}/"] if self.layout.with_ids else []),
            ]
        )

    def _call(self, name: str, index: int) -> str:
        """The body of the rule for a call of one tool."""
        arguments = f"@arguments_{index}"
        if self.layout.listed:
            begin = json.dumps(f'{{"name": "{name}", "arguments": ')
            return f"{begin} {arguments} {LISTED_ID if self.layout.with_ids else json.dumps('}')}"
        call_id = f"{self._token(CALL_ID)} {self.space}ID " if self.layout.with_ids else ""
        return f"{self.space}{json.dumps(name)} {call_id}{self._token(ARGUMENTS)} {self.space}{arguments}"

    def _token(self, control: Control) -> str:
        return f"<[{self.ids[control.name]}]>"


def arguments_of(tools: Sequence[Tool]) -> Mapping[str, GrammarSource]:
    """The parts that the rules of these tools name.

    Raises `UserError` for a name that no format can write or that two tools have, and for too many tools.
    """
    if len(tools) > MOST_TOOLS:
        raise UserError(f"the request has {len(tools)} tools, expected at most {MOST_TOOLS}; leave some out")
    check_tool_names(tools)
    names = [tool["function"]["name"] for tool in tools]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"the request has two tools of the name {twice!r}; give each one its own")
    return {f"arguments_{index}": _arguments(tool) for index, tool in enumerate(tools)}


def _arguments(tool: Tool) -> JsonSchema:
    """The schema of a tool's arguments, which are an object in any case; without one, they are empty."""
    function = tool["function"]
    what = f"the parameters of the tool {function['name']!r}"
    given = function.get("parameters", {"properties": {}, "additionalProperties": False})
    if not isinstance(given, dict):
        raise UserError(f"{what} are no JSON schema, expected an object")
    told = {"type", "$ref", "anyOf", "oneOf", "allOf"} & given.keys()
    return JsonSchema(given if told else {"type": "object", **given}, strict=function.get("strict", False), what=what)
