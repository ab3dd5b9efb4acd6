"""The model that a server serves: an opened artifact with its tokenizer and the format of its conversations."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from runtime.artifact.manifest import ModelConfig
from runtime.decoding.reply_grammar import ReplyGrammars
from runtime.engines.engine import Engine
from runtime.engines.slot_model import SlotModel, capacity_of
from runtime.errors import UserError
from runtime.text.conversation_encoder import ConversationEncoder, open_conversation_encoder
from runtime.text.grammar import GrammarCompiler
from runtime.text.tokenizer import Tokenizer, open_tokenizer


@dataclass(frozen=True)
class ServedModel:
    """An artifact, ready for requests.

    `engine` may be used by the engine's thread alone. `capacity` is how many tokens a sequence holds, None without a
    limit. A base model has no `encoder`, and `no_chat` says why.
    """

    engine: Engine
    tokenizer: Tokenizer
    encoder: ConversationEncoder | None
    no_chat: str
    capacity: int | None

    @cached_property
    def grammars(self) -> ReplyGrammars:
        """What compiles the grammars of replies, made when one is first asked for.

        Raises `UserError` if the package for that is not installed, or does not take the tokenizer.
        """
        layout = None if self.encoder is None else self.encoder.call_layout
        return ReplyGrammars(GrammarCompiler(self.tokenizer, self.config.vocab_size), layout)

    @property
    def config(self) -> ModelConfig:
        """Sizes and head of the model."""
        return self.engine.manifest.model

    @property
    def slots(self) -> SlotModel | None:
        """The engine as a model that generates text; None for another head."""
        return self.engine if self.config.generates else None

    @property
    def eos_ids(self) -> Sequence[int]:
        """The ids that end a text."""
        return self.tokenizer.spec.eos_ids


def open_served_model(artifact: Path, threads: int | None, minimum_build: int) -> ServedModel:
    """Open an artifact; raises `UserError` for one that fails a check or has no tokenizer."""
    engine = Engine.open(artifact, threads=threads, minimum_build=minimum_build)
    spec = engine.manifest.tokenizer
    if spec is None:
        raise UserError(f"{artifact} has no tokenizer, and a server needs one: compile a checkpoint that has one")
    tokenizer = open_tokenizer(spec, engine.folder)
    encoder, no_chat = None, ""
    try:
        encoder = open_conversation_encoder(spec, engine.folder, tokenizer)
    except UserError as error:
        no_chat = str(error)
    return ServedModel(engine, tokenizer, encoder, no_chat, capacity_of(engine))
