"""Adds the tokens that a folder adds beside its tokenizer.json to the file itself, as transformers does on loading."""

from pathlib import Path

import tokenizers

from export.checkpoints.tokenizers.added_tokens import AddedToken, AddedTokens
from export.checkpoints.tokenizers.tokenizer_json import open_tokenizer_json
from runtime.errors import UserError


def with_added_tokens(data: bytes, path: Path, added: AddedTokens) -> bytes:
    """The tokenizer.json in `data`, whose file is `path`, with the added tokens of its folder that it lacks.

    Raises `UserError` if it is malformed, or if a token gets another id than the folder says.
    """
    tokenizer = open_tokenizer_json(data, path)
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    lacking = {token_id: token for token_id, token in added.by_id.items() if token.content not in known}
    if not lacking:
        return data
    tokenizer.add_tokens([_library_token(token) for token in lacking.values()])
    for token_id, token in lacking.items():
        found = tokenizer.token_to_id(token.content)
        if found != token_id:
            raise UserError(
                f"{added.where} has the added token {token.content!r} with the id {token_id}, "
                f"but {path} leads to {found}; save the tokenizer again with transformers"
            )
    return str(tokenizer.to_str()).encode()


def _library_token(token: AddedToken) -> tokenizers.AddedToken:
    normalized = not token.special if token.normalized is None else token.normalized
    flags = {"lstrip": token.lstrip, "rstrip": token.rstrip, "single_word": token.single_word}
    return tokenizers.AddedToken(token.content, special=token.special, normalized=normalized, **flags)
