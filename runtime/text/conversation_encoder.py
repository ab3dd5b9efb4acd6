"""One way from a conversation to token ids, whichever of the two a model brings: an instruct format or a chat template."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from runtime.artifact.manifest import TokenizerSpec
from runtime.text.chat_template import TemplateEncoder, open_chat_template
from runtime.text.instruct import InstructEncoder
from runtime.text.messages import Message, Tool
from runtime.text.tokenizer import Tokenizer


class ConversationEncoder(Protocol):
    """Turns messages into the ids that a chat model was trained on."""

    def encode(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        """Ids up to where the next reply begins, bos included; raises `UserError` for a conversation that the model cannot be given."""


def open_conversation_encoder(spec: TokenizerSpec, folder: Path, tokenizer: Tokenizer) -> ConversationEncoder:
    """The instruct format that `spec` names, else its chat template in `folder`; raises `UserError` for a base model, which has neither."""
    if spec.instruct is not None:
        return InstructEncoder(spec.instruct, tokenizer)
    return TemplateEncoder(open_chat_template(spec, folder, tokenizer), tokenizer)
