"""Tool calls out of a reply, in the forms that the instruct formats have; nothing that is only text becomes one.

A reply comes as control tokens with the text behind each. v2, v3 and v7 write a JSON list behind one [TOOL_CALLS];
later versions write one for each call, with the arguments behind [ARGS] and, in v11, an id behind [CALL_ID].
"""

import json
import secrets
import string
from collections.abc import Callable, Iterator, Mapping, Sequence

from runtime.text.instruct_formats import ARGUMENTS, CALL_ID, TOOL_CALLS
from runtime.text.message_checks import FUNCTION_NAME, WELL_FORMED_ID
from runtime.text.messages import FunctionCall, ToolCall

ID_LENGTH = 9
Stretch = tuple[str, str]  # a control token's name and the text behind it


class _MalformedError(ValueError):
    """A model has not kept to its format."""


def new_call_id() -> str:
    """An id for a call whose format has none: nine letters or digits, which every format can write."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(ID_LENGTH))


def parse_tool_calls(
    stretches: Sequence[Stretch], new_id: Callable[[], str] = new_call_id
) -> tuple[ToolCall, ...] | None:
    """The calls of a reply from its first [TOOL_CALLS] on; None if any of them is malformed.

    A call has a function's name and a JSON object of arguments. An id that is missing, malformed or given twice is
    replaced by a new one.
    """
    try:
        found = [call for group in _groups(stretches) for call in _calls(group)]
    except (ValueError, RecursionError):  # ValueError: not JSON either
        return None
    calls: list[ToolCall] = []
    for name, arguments, call_id in found:
        known = {call["id"] for call in calls}
        usable = isinstance(call_id, str) and WELL_FORMED_ID.fullmatch(call_id) and call_id not in known
        calls.append(
            ToolCall(
                id=str(call_id) if usable else new_id(),
                type="function",
                function=FunctionCall(name=name, arguments=arguments),
            )
        )
    return tuple(calls) or None


def _groups(stretches: Sequence[Stretch]) -> list[dict[str, str]]:
    """The stretches of each [TOOL_CALLS], by the name of their control token."""
    groups: list[dict[str, str]] = []
    for name, text in stretches:
        if name == TOOL_CALLS.name:
            groups.append({name: text})
        elif not groups or name in groups[-1]:
            raise _MalformedError
        else:
            groups[-1][name] = text
    return groups


def _calls(group: Mapping[str, str]) -> Iterator[tuple[str, str, object]]:
    """Name, arguments and id of each call in a group."""
    behind = group[TOOL_CALLS.name]
    if tuple(group) == (TOOL_CALLS.name,):
        listed = json.loads(behind)
        if not isinstance(listed, list):
            raise _MalformedError
        for call in listed:
            arguments = call.get("arguments") if isinstance(call, dict) else None
            yield _name(call), json.dumps(_object(arguments), ensure_ascii=False), call.get("id")
    elif tuple(group) in ((TOOL_CALLS.name, ARGUMENTS.name), (TOOL_CALLS.name, CALL_ID.name, ARGUMENTS.name)):
        arguments = group[ARGUMENTS.name].strip()
        _object(json.loads(arguments))
        yield _name({"name": behind.strip()}), arguments, group.get(CALL_ID.name)
    else:
        raise _MalformedError


def _name(call: object) -> str:
    name = call.get("name") if isinstance(call, dict) else None
    if not isinstance(name, str) or not FUNCTION_NAME.fullmatch(name):
        raise _MalformedError
    return name


def _object(arguments: object) -> object:
    if not isinstance(arguments, dict):
        raise _MalformedError
    return arguments
