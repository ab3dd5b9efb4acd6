"""Rebuilds the byte-level BPE in a GGUF header as a tokenizer.json."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from export.checkpoints.gguf.vocabulary import AGAIN, CONTROL, PREFIX, UNKNOWN, USER_DEFINED, Vocabulary
from runtime.errors import UserError, refusing

# How tokenizers split a text into words: one pattern after the other, each within the pieces that the last one left.
# They are those of the tokenizer.json files that the names stand for.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DIGIT = r"\p{N}"


@dataclass(frozen=True)
class Splitting:
    """One way to split a text: its patterns, and what llama.cpp takes for granted with them."""

    patterns: tuple[str, ...]
    whole_words: bool = False  # a word that is a token becomes that token, whatever the merges say
    add_bos: bool = False  # unless the header says otherwise


OF_GPT2, OF_DIGITS = Splitting((GPT2,)), Splitting((DIGIT, GPT2))
OF_LLAMA3 = Splitting((LLAMA3,), whole_words=True, add_bos=True)
OF_TEKKEN = Splitting((TEKKEN,), whole_words=True, add_bos=True)
OF_QWEN2 = Splitting((QWEN2,))
DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", DIGIT)
DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")

# By `tokenizer.ggml.pre`: the values that models of the shape of Llama have.
SPLITTINGS: Mapping[str, Splitting] = {
    "tekken": OF_TEKKEN,
    "pixtral": OF_TEKKEN,  # Mistral's own file is a tekken.json; only the tokenizer.json beside it split like Llama 3
    "llama-bpe": OF_LLAMA3,
    "llama3": OF_LLAMA3,
    "llama-v3": OF_LLAMA3,
    "falcon3": OF_LLAMA3,
    "midm-2.0": OF_LLAMA3,
    "smaug-bpe": Splitting((LLAMA3,)),
    "qwen2": OF_QWEN2,
    "megrez": OF_QWEN2,
    "gpt-4o": Splitting((GPT4O,)),
    "gpt-2": OF_GPT2,
    "mellum": OF_GPT2,
    "trillion": OF_GPT2,
    "smollm": OF_DIGITS,
    "starcoder": OF_DIGITS,
    "refact": OF_DIGITS,
    "command-r": OF_DIGITS,
    "minerva-7b": OF_DIGITS,
    "deepseek-coder": Splitting(DEEPSEEK_CODER),
    "default": Splitting(DEFAULT),
}


def _splitting_of(vocabulary: Vocabulary, where: str) -> Splitting:
    if vocabulary.pre is None or vocabulary.pre not in SPLITTINGS:
        raise UserError(
            f"{where} has {PREFIX}pre: {vocabulary.pre!r}, which is not supported; "
            f"expected one of {', '.join(SPLITTINGS)}"
        )
    return SPLITTINGS[vocabulary.pre]


def build_byte_level(vocabulary: Vocabulary, where: str) -> tuple[bytes, bool]:
    """The tokenizer.json of a byte-level BPE, and whether bos comes first if the header leaves that out.

    Raises `UserError` for an unknown way to split a text, and for merges that are missing or do not fit.
    """
    splitting = _splitting_of(vocabulary, where)
    if vocabulary.merges is None:
        raise UserError(f"{where} lacks {PREFIX}merges, which say how bytes become tokens; {AGAIN}")
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in vocabulary.merges)]
    vocab = {token: i for i, token in enumerate(vocabulary.tokens)}
    with refusing(f"{where} has merges that do not fit its tokens", AGAIN):
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=splitting.whole_words))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in splitting.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials, added = _of_types(vocabulary, (UNKNOWN, CONTROL)), _of_types(vocabulary, (USER_DEFINED,))
    if splitting.whole_words:
        _check_no_word(tokenizer, specials, where)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    return _compact(tokenizer), splitting.add_bos


def _compact(tokenizer: Tokenizer) -> bytes:
    """The tokenizer.json in an eighth less: each merge as a text of two tokens, in which bytes leave no other space."""
    contents = json.loads(tokenizer.to_str())
    contents["model"]["merges"] = [" ".join(merge) for merge in contents["model"]["merges"]]
    return json.dumps(contents, ensure_ascii=False, separators=(",", ":")).encode()


def _of_types(vocabulary: Vocabulary, types: tuple[int, ...]) -> list[str]:
    return [token for token, kind in zip(vocabulary.tokens, vocabulary.token_type, strict=True) if kind in types]


def _check_no_word(tokenizer: Tokenizer, specials: list[str], where: str) -> None:
    """Refuse a control token that is one word: since words are looked up whole, any text could contain it."""
    word = next((name for name in specials if len(tokenizer.pre_tokenizer.pre_tokenize_str(name)) < 2), None)
    if word is not None:
        raise UserError(
            f"{where} has the control token {word!r}, which is one word of ordinary text; "
            "no tokenizer.json can tell the two apart"
        )
