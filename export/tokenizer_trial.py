"""Tries a checkpoint's tokenizer and chat template as a box will use them, in a process of its own with limits.

A template is a program that came with the checkpoint: one that is broken, endless or greedy is refused here, before
anything takes time, and not on the box.
"""

from pathlib import Path

import msgspec

from export.tokenizer_process import tokenizer_output
from export.weights.stored import WeightsRecord
from runtime.errors import UserError

SECONDS = 60  # the trial takes less than one on a quiet machine
MEMORY = 8 * 2**30  # bytes of address space, most of which libraries reserve and never use
MODULE = "runtime.text.trial"
WITHOUT_CHAT = (
    "if it is the template's fault, mend or remove it in the checkpoint, or name another with frontend.chat_template"
)


def try_tokenizer(record: WeightsRecord, folder: Path, where: Path) -> None:
    """Raise `UserError` unless the tokenizer in `folder` encodes a text and, for a chat model, a conversation.

    Each id must be one of the model's. `where` is the checkpoint that it comes from.
    """
    spec = record.tokenizer
    if spec is None:
        return
    if not record.model.generates:
        spec = msgspec.structs.replace(spec, chat_template=None, instruct=None)  # nobody chats with it
    limits = (record.model.vocab_size, SECONDS, MEMORY)
    try:
        tokenizer_output(MODULE, [msgspec.json.encode(spec).decode(), str(folder), *map(str, limits)], SECONDS)
    except UserError as error:
        raise _refusal(where, str(error)) from error


def _refusal(where: Path, reason: str) -> UserError:
    return UserError(
        f"the tokenizer or the chat template of {where} fails on one short message: {reason}; {WITHOUT_CHAT}"
    )
