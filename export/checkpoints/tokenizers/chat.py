"""What a user says of a model's conversations, where the checkpoint's files say nothing of them or something wrong."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from export.checkpoints.source import Opened, TokenizerSource
from export.checkpoints.tokenizers.vocabulary import vocabulary_of
from runtime.errors import UserError

# How control tokens are written, as no model's ordinary text is: <|im_end|>, [TOOL_CALLS]. Not so [INST] and <think>,
# which models without such a token write as text.
MARKUP = re.compile(r"<[|\uff5c][^<>|\uff5c\s]{1,64}[|\uff5c]>|\[/?[A-Z]+(?:_[A-Z]+)+\]")
OTHER_TOKENIZERS = ("vocab.json", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
SHOWN = 4  # names in one sentence


@dataclass(frozen=True)
class Chat:
    """`instruct`: the tokenizer's own chat format applies. `template`: this one does, whatever the checkpoint has."""

    instruct: bool = False
    template: str | None = None


AS_PUBLISHED = Chat()  # the user says nothing


def check_no_instruct(chat: Chat, path: Path, kind: str) -> None:
    """Raise `UserError` if the user asks for a tokenizer's own chat format where a template says how to chat."""
    if chat.instruct:
        raise UserError(
            f"frontend.instruct is true, but {path} is of the type {kind}, "
            "which has a chat template for that; remove frontend.instruct"
        )


def with_template(opened: Opened, template: str | None, path: Path) -> Opened:
    """The checkpoint at `path` with a template in place of its chat format; unchanged if that is None.

    Raises `UserError` if there is no tokenizer to use it with.
    """
    if template is None:
        return opened
    if opened.tokenizer is None:
        raise UserError(
            f"frontend.chat_template is set, but {path} has no tokenizer that could use it; remove the setting, or "
            "fetch the tokenizer that the model was published with"
        )
    return replace(opened, tokenizer=replace(opened.tokenizer, chat_template=template, instruct=None))


def tokenizer_notes(tokenizer: TokenizerSource | None, path: Path) -> tuple[str, ...]:
    """A warning for the user if a checkpoint has no tokenizer, with the files that are not read as one."""
    if tokenizer is not None:
        return ()
    others = [name for name in OTHER_TOKENIZERS if (path / name).is_file()]
    found = f" but {', '.join(others)}" if others else ""
    remedy = ", or save it with transformers, which writes tokenizer.json" if others else ""
    return (
        f"{path} has no tokenizer{found}, expected tokenizer.json, tokenizer.model or tekken.json, so the artifact "
        f"takes only token ids; add the tokenizer that the model was published with{remedy}",
    )


def template_notes(tokenizer: TokenizerSource | None, path: Path) -> tuple[str, ...]:
    """A warning for the user if the chat template writes control tokens that the tokenizer lacks."""
    if tokenizer is None or tokenizer.chat_template is None:
        return ()
    template = tokenizer.chat_template
    by_variable = [name for key, name in (tokenizer.special_tokens or {}).items() if key in template]
    written = dict.fromkeys([*MARKUP.findall(template), *by_variable])
    if not written:
        return ()
    vocabulary = vocabulary_of(tokenizer.kind, tokenizer.data, path)
    lacking = [name for name in written if vocabulary.id_of(name) is None]
    if not lacking:
        return ()
    more = f" and {len(lacking) - SHOWN} more" if len(lacking) > SHOWN else ""
    return (
        f"the chat template of {path} writes {', '.join(lacking[:SHOWN])}{more}, which its tokenizer has no token for, "
        "so this becomes ordinary text; if the model was trained on such tokens, add the tokenizer's other files",
    )
