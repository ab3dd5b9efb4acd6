"""Reads the tokenizer of a Hugging Face folder: which of its files counts, and how texts begin and end."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from export.checkpoints.gguf.ends import END_NAMES, end_names
from export.checkpoints.huggingface.tokenizer_settings import TokenizerSettings, read_settings
from export.checkpoints.mistral.tokenizer import INSTRUCT_VERSIONS, TokenizerFile, find, mistral_tokenizer
from export.checkpoints.source import TokenizerSource
from export.checkpoints.tokenizers import sentencepiece_added, tokenizer_json_added
from export.checkpoints.tokenizers.added_tokens import AddedTokens, read_added_tokens
from export.checkpoints.tokenizers.chat import Chat, check_no_instruct
from export.checkpoints.tokenizers.sentencepiece_model import open_sentencepiece
from export.checkpoints.tokenizers.tokenizer_json import added_names_in, open_tokenizer_json, tokens_around
from export.checkpoints.tokenizers.vocabulary import Vocabulary, tokenizer_vocabulary, vocabulary_of
from runtime.errors import UserError

JSON_FILE, MODEL_FILE = "tokenizer.json", "tokenizer.model"
USER_TURN = "[INST]"  # in every chat format of Mistral's own
BRACKETS = re.compile(r"[<\[{|]")  # in the names of control tokens, and not in words


def open_tokenizer(
    folder: Path, config: Mapping[str, object], chat: Chat
) -> tuple[TokenizerSource | None, tuple[str, ...]]:
    """The folder's tokenizer, or None, with notes for the user on how it was chosen.

    Mistral's own tokenizer comes first if its file declares a version, since the model was trained with it; then
    tokenizer.json, then tokenizer.model. `chat.template` replaces the folder's own; `chat.instruct` says that a model
    with Mistral's own tokenizer and without a template is tuned for conversations. Raises `UserError` if a file is
    malformed, and for `chat.instruct` where it does not apply.
    """
    settings = read_settings(folder, config, chat.template)
    if settings.template is not None:
        check_no_instruct(chat, folder, "huggingface")
    own, notes = _own(settings, instruct=chat.instruct)
    source = own or _json(settings) or _sentencepiece(settings)
    return (None if source is None else _with_settings(source, settings)), (*settings.notes, *notes)


def _own(settings: TokenizerSettings, *, instruct: bool) -> tuple[TokenizerSource | None, tuple[str, ...]]:
    """Mistral's own tokenizer if it is this model's, with a note if there is one that is not."""
    file = find(settings.folder)
    if file is None or not file.declared:
        if instruct:
            raise UserError(
                f"frontend.instruct is true, but {settings.folder} has no tokenizer that declares a chat format, "
                "expected tekken.json or a SentencePiece model with its version, such as tokenizer.model.v3; "
                "name a template with frontend.chat_template, or remove frontend.instruct"
            )
        return None, ()
    source = _own_source(settings, file, instruct=instruct)
    reason = None if source is None or instruct else _foreign(settings, source)
    if reason is None:
        return source, ()
    return None, (f"{file.path} is not used: {reason}, so it belongs to another model",)


def _own_source(settings: TokenizerSettings, file: TokenizerFile, *, instruct: bool) -> TokenizerSource | None:
    """Mistral's own tokenizer; None for a chat model in a format that is not known, if there are other files for it.

    Chat templates are known to differ from the model's own chat format, so the folder's gives way to that if it is
    meant to be the same.
    """
    folder = settings.folder
    if settings.template is None:
        return mistral_tokenizer(folder, instruct=instruct)
    if settings.own_template and file.version in INSTRUCT_VERSIONS and USER_TURN in settings.template:
        return mistral_tokenizer(folder, instruct=True)
    if settings.own_template and file.version not in INSTRUCT_VERSIONS and _has_others(settings):
        return None
    plain = mistral_tokenizer(folder, instruct=False)
    return None if plain is None else replace(plain, chat_template=settings.template)


def _has_others(settings: TokenizerSettings) -> bool:
    return any((settings.folder / name).is_file() for name in (JSON_FILE, MODEL_FILE))


def _foreign(settings: TokenizerSettings, own: TokenizerSource) -> str | None:
    """Why Mistral's own tokenizer is not this model's, as a clause, or None; fine-tunes keep that of their base."""
    if not _has_others(settings):
        return None
    lacking = _lacking(settings, own)
    if lacking is not None:
        return f"it lacks the token {lacking}, which other files of its folder add"
    if settings.own_template and settings.template is not None and own.instruct is None:
        return "the chat template of its folder is of another format"
    return None


def _lacking(settings: TokenizerSettings, own: TokenizerSource) -> str | None:
    """A token that Mistral's own tokenizer lacks: one that ends texts or that the chat template writes.

    Without a template, any that the other files add. Words that were added do not count, since templates write some of
    them as text.
    """
    path, template = settings.folder / JSON_FILE, settings.template
    inside = added_names_in(path.read_bytes(), path) if path.is_file() else ()
    beside = (token.content for token in _added(settings).by_id.values())
    added = [name for name in (*inside, *beside) if BRACKETS.search(name)]
    used = [name for name in added if template is None or name in template or name == settings.named.get("eos_token")]
    vocabulary = vocabulary_of(own.kind, own.data, settings.folder)
    return next((name for name in used if vocabulary.id_of(name) is None), None)


def _json(settings: TokenizerSettings) -> TokenizerSource | None:
    """tokenizer.json; what its post-processor puts around a text counts before what tokenizer_config.json names.

    Fine-tunes that name another bos_token for their template often keep the post-processor of their base.
    """
    path = settings.folder / JSON_FILE
    if not path.is_file():
        return None
    data = tokenizer_json_added.with_added_tokens(path.read_bytes(), path, _added(settings))
    tokenizer = open_tokenizer_json(data, path)
    vocabulary = tokenizer_vocabulary(tokenizer)
    before, after = tokens_around(tokenizer, path)
    if len(before) > 1 and settings.add_bos is not False:
        raise UserError(
            f"{path}: its post_processor puts {len(before)} tokens before a text, expected at most one; remove the "
            "others there, or set add_bos_token to false in tokenizer_config.json and write them into your prompts"
        )
    bos = next(iter(before), _named_bos(settings, vocabulary))
    known = bos is not None and vocabulary.name_of(bos) is not None
    add_bos = known and (bool(before) if settings.add_bos is None else settings.add_bos)
    ids = {"bos_token": bos, "eos_token": next(iter(settings.end_ids), None)}
    names = {key: vocabulary.name_of(token_id) for key, token_id in ids.items() if token_id is not None}
    return TokenizerSource(
        "tokenizer.json",
        data,
        settings.template,
        bos,
        (),
        add_bos,
        next(iter(after), None),
        special_tokens={key: name for key, name in names.items() if name is not None},
    )


def _named_bos(settings: TokenizerSettings, vocabulary: Vocabulary) -> int | None:
    """The id of the token that tokenizer_config.json calls bos_token, or else that of config.json."""
    named = settings.named.get("bos_token")
    named_id = None if named is None else vocabulary.id_of(named)
    return settings.bos_id if named_id is None else named_id


def _sentencepiece(settings: TokenizerSettings) -> TokenizerSource | None:
    path = settings.folder / MODEL_FILE
    if not path.is_file():
        return None
    added = sentencepiece_added.with_added_tokens(path.read_bytes(), path, _added(settings))
    ids = open_sentencepiece(added.data, path)
    add_bos = ids.bos_id is not None and settings.add_bos is not False
    return TokenizerSource(
        "sentencepiece",
        added.data,
        settings.template,
        ids.bos_id,
        (),
        add_bos,
        special_tokens=ids.special_tokens,
        text_after_added=added.text_after_added,
    )


def _added(settings: TokenizerSettings) -> AddedTokens:
    return read_added_tokens(settings.folder, settings.named.values())


def _with_settings(source: TokenizerSource, settings: TokenizerSettings) -> TokenizerSource:
    """The tokenizer with the special tokens that its folder names, and every id that any of its files ends a text with.

    They often differ: a fine-tune that ends its turns with another token may say so in one file only.
    """
    named = {**(source.special_tokens or {}), **settings.named}
    tokens = {key: name for key, name in named.items() if name is not None}
    end = tokens.get("eos_token")
    vocabulary = vocabulary_of(source.kind, source.data, settings.folder)
    own_id = None if end is None else vocabulary.id_of(end)
    turns = _ends_of_turns(source.chat_template or "", vocabulary)
    ids = [*settings.end_ids, *source.eos_ids, *(() if own_id is None else (own_id,)), *turns]
    end_id = source.end_id
    if end_id is None and settings.add_eos:
        end_id = next(iter(ids), None) if own_id is None else own_id
    return replace(source, eos_ids=tuple(dict.fromkeys(ids)), end_id=end_id, special_tokens=tokens)


def _ends_of_turns(template: str, vocabulary: Vocabulary) -> list[int]:
    """The ids of the tokens that the chat template writes and that llama.cpp knows to end a turn, whatever files say.

    A fine-tune that ends its turns with another token than its base does not always say so.
    """
    written = [name for name in END_NAMES if name in template]
    ids = {name: token_id for name in written if (token_id := vocabulary.id_of(name)) is not None}
    return [ids[name] for name in end_names(ids)]
