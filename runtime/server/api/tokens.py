"""`/tokenize` and `/detokenize`."""

from typing import Annotated

import msgspec

from runtime.server.api.chat import Message, ToolSpec


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A text or a conversation; `add_special_tokens` decides whether a text begins with bos as the model wants it."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[ToolSpec] | None = None
    add_special_tokens: bool = True


class TokenizeResponse(msgspec.Struct, frozen=True):
    """Token ids, and how many of them a sequence may have; null without a limit."""

    count: int
    max_model_len: int | None
    tokens: list[int]


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Token ids to be turned into text."""

    tokens: list[Annotated[int, msgspec.Meta(ge=0, le=2**31)]]
    model: str | None = None


class DetokenizeResponse(msgspec.Struct, frozen=True):
    """The text of the ids; control tokens have none."""

    prompt: str
