"""What several requests and answers have in common."""

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec

from runtime.decoding.options import LEAST_REPETITION, MOST_REPETITION

FinishReason = Literal["stop", "length", "tool_calls"]
Stop = str | list[str] | None
Probability = Annotated[float, msgspec.Meta(ge=0, le=1)]
Penalty = Annotated[float, msgspec.Meta(ge=-2, le=2)]
Count = Annotated[int, msgspec.Meta(ge=1)]
TokenId = Annotated[int, msgspec.Meta(ge=0)]
# a text or several, or the ids of one or of several; that no list mixes them is checked afterwards
TextsOrIds = str | list[str | TokenId | list[TokenId]]


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a stream has besides the text."""

    include_usage: bool = False


class SamplingFields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How tokens are drawn: the fields of OpenAI's API, and those that other servers add.

    `top_k` 0 or -1 is none. `user` is written into the log. `store`, `service_tier` and `metadata` are taken as far as
    they ask for nothing.
    """

    model: str
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=-1)] | None = None
    min_p: Probability | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(ge=LEAST_REPETITION, le=MOST_REPETITION)] | None = None
    logit_bias: Mapping[str, Annotated[float, msgspec.Meta(ge=-100, le=100)]] | None = None
    seed: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    n: Count | None = None
    stop: Stop = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    user: str | None = None
    store: bool | None = None
    service_tier: Literal["auto", "default"] | None = None
    metadata: Mapping[str, str] | None = None


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """How many of a prompt's tokens needed no computing."""

    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct, frozen=True):
    """How many of the generated tokens were reasoning."""

    reasoning_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """Tokens of a request; those of all its choices together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class ModelCard(msgspec.Struct, frozen=True):
    """A model that can be asked for."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None


class ModelList(msgspec.Struct, frozen=True):
    """The models that can be asked for."""

    object: Literal["list"]
    data: list[ModelCard]
