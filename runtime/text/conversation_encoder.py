"""One interface from conversations to token ids, for both instruct formats and chat templates."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from runtime.artifact.manifest import TokenizerSpec
from runtime.text.chat_template import TemplateEncoder, open_chat_template
from runtime.text.instruct import InstructEncoder
from runtime.text.instruct_formats import CallLayout
from runtime.text.messages import Message, Tool
from runtime.text.tokenizer import Tokenizer


class ConversationEncoder(Protocol):
    """Turns messages into the ids that a chat model was trained on."""

    @property
    def writes_reasoning(self) -> bool:
        """Whether what an assistant has thought in earlier turns is written."""

    @property
    def writes_tools(self) -> bool:
        """Whether the format has a place for tools."""

    @property
    def call_layout(self) -> CallLayout | None:
        """What the model writes for its calls; None if that is not known."""

    def encode(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        """Ids up to where the next reply begins, including bos.

        Raises `UserError` for a conversation that the model's format does not allow.
        """


def open_conversation_encoder(spec: TokenizerSpec, folder: Path, tokenizer: Tokenizer) -> ConversationEncoder:
    """An encoder for the instruct format that `spec` names, otherwise for its chat template in `folder`.

    Raises `UserError` for a base model, which has neither.
    """
    if spec.instruct is not None:
        return InstructEncoder(spec.instruct, tokenizer)
    return TemplateEncoder(open_chat_template(spec, folder, tokenizer), tokenizer)
