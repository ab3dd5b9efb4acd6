"""`python -m runtime.text.trial SPEC FOLDER TOKENS SECONDS BYTES`: encode a text and, for a chat model, conversations.

It is how a compile tries a tokenizer, in a process that may take too long or too much memory, or crash.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from runtime.artifact.manifest import TokenizerSpec
from runtime.errors import UserError, run_command
from runtime.text.conversation_encoder import open_conversation_encoder
from runtime.text.messages import Message
from runtime.text.process_limits import limit_process
from runtime.text.tokenizer import Tokenizer, open_tokenizer

TEXT = "Hello, how are you?"
USER = Message(role="user", content=TEXT)
# Some templates refuse a system message, and some refuse a conversation without one.
CONVERSATIONS = ([USER], [Message(role="system", content="Be brief."), USER])


def main() -> int:
    """Try the tokenizer that the arguments name; returns the exit status."""
    spec, folder, tokens, seconds, memory = sys.argv[1:]
    limit_process(int(seconds), int(memory))
    try_out(msgspec.json.decode(spec, type=TokenizerSpec), Path(folder), int(tokens))
    return 0


def try_out(spec: TokenizerSpec, folder: Path, vocab_size: int) -> None:
    """Encode a text and, for a chat model, a conversation; raises `UserError` for whatever is wrong.

    `vocab_size` is the number of tokens that the model has.
    """
    tokenizer = open_tokenizer(spec, folder)
    ids = tokenizer.encode(TEXT)
    _check_ids(ids, tokenizer, vocab_size)
    tokenizer.decode(ids)
    if spec.chat_template is None and spec.instruct is None:
        return
    encoder = open_conversation_encoder(spec, folder, tokenizer)
    refusals = []
    for messages in CONVERSATIONS:
        try:
            ids = encoder.encode(messages)
        except UserError as error:
            refusals.append(str(error))
            continue
        if ids:
            _check_ids(ids, tokenizer, vocab_size)
            return
        refusals.append("the chat template writes nothing")
    raise UserError(refusals[0])


def _check_ids(ids: Sequence[int], tokenizer: Tokenizer, vocab_size: int) -> None:
    beyond = max(ids, default=0)
    if beyond >= vocab_size:
        raise UserError(
            f"it writes the token {tokenizer.token_text(beyond)} with the id {beyond}, but the model has {vocab_size} "
            "tokens, so the tokenizer is another model's or its new tokens were not added to the model"
        )


if __name__ == "__main__":
    run_command(main)
