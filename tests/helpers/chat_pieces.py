"""Pieces of a chat's reply, made by hand."""

import msgspec

from runtime.server.api import chat


def pieces_of(*parts, finish_reason="stop", stop=None):
    """A piece for each part: a text, ("reasoning", text), or ("call", index, id, name, arguments); and the end's.

    None for an id or a name leaves it out, as every piece of a call but the first does.
    """
    pieces = [chat.ChunkChoice(0, _delta(part), None, None) for part in parts]
    if finish_reason is None:
        return pieces
    reason = msgspec.UNSET if stop is None else stop
    return [*pieces, chat.ChunkChoice(0, chat.Delta(), None, finish_reason, reason)]


def _delta(part):
    if isinstance(part, str):
        return chat.Delta(content=part)
    if part[0] == "reasoning":
        return chat.Delta(reasoning_content=part[1])
    _, index, call_id, name, arguments = part
    function = chat.FunctionDelta(name=msgspec.UNSET if name is None else name, arguments=arguments)
    first = {} if call_id is None else {"id": call_id, "type": "function"}
    return chat.Delta(tool_calls=[chat.ToolCallDelta(index=index, function=function, **first)])
