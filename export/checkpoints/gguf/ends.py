"""Where a text ends in a GGUF: the ids that its header names, and the tokens that llama.cpp knows by their names.

The names and their exceptions are those of `llama_vocab::impl::load` in
https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp.
"""

from collections.abc import Collection, Mapping, Sequence
from itertools import product

END_NAMES = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "[e~[",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",  # DeepSeek's, with a wide bar and SentencePiece's space
    # What follows a middle that was filled in: padding, another repository, another file.
    "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]",
    "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>",
    "<|file_sep|>",
)  # fmt: skip
# A name that is no end where one of these sets of tokens exists: there, it ends only a part of a reply.
EXCEPTIONS: Mapping[str, tuple[frozenset[str], ...]] = {
    "<|end|>": tuple(map(frozenset, product(("<|return|>", "<|flush|>"), ("<|call|>", "<|calls|>")))),
    "</s>": (frozenset({"<|tool_response>"}),),
}


def end_names(tokens: Collection[str]) -> list[str]:
    """The names that end a text in a vocabulary of these tokens, in the order of `END_NAMES`."""
    present = set(tokens).intersection(END_NAMES)
    return [
        name
        for name in END_NAMES
        if name in present and not any(others <= present for others in EXCEPTIONS.get(name, ()))
    ]


def end_ids(tokens: Sequence[str], named: Sequence[int | None]) -> tuple[int, ...]:
    """The ids that end a text: those that the header names, in its order, and then those known by their names."""
    known = set(end_names(tokens))
    by_name = [i for i, token in enumerate(tokens) if token in known]
    return tuple(dict.fromkeys([*(token_id for token_id in named if token_id is not None), *by_name]))
