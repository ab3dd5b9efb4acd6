"""What `runtime.generate` feeds a model: ids, a text to continue or to fill in, or a conversation with tools."""

import argparse
import codecs
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from runtime.errors import UserError
from runtime.small_files import read_small
from runtime.text.fill_in_the_middle import encode_fill_in
from runtime.text.messages import Message, Tool
from runtime.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from runtime.engines.engine import Engine

TOOLS_LIMIT = 2**20  # bytes of a file of tools


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say what a prompt is."""
    parser.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    parser.add_argument("--system", metavar="TEXT", help="system message before the prompt, with --chat")
    parser.add_argument(
        "--tools",
        type=Path,
        metavar="PATH",
        help="a JSON list of the tools that the model may call, in OpenAI's form, with --chat",
    )
    parser.add_argument(
        "--suffix",
        metavar="TEXT",
        help="fill in what stands between the prompt and this text, with a model that was trained to, such as "
        "Codestral",
    )
    parser.add_argument(
        "--special",
        action="store_true",
        help="names of control tokens in the prompt, such as [INST], become those tokens; the token that begins a text "
        "is added as usual, unless the prompt begins with its name",
    )


def check_flags(args: argparse.Namespace) -> None:
    """Raise `UserError` for flags that exclude or need one another."""
    if args.chat and args.prompt_ids is not None:
        raise UserError("--chat wraps a text and --prompt-ids gives token ids: pass --prompt, or leave --chat out")
    for flag in ("system", "tools"):
        if getattr(args, flag) is not None and not args.chat:
            raise UserError(f"--{flag} is part of a chat: pass --chat with it")
    raw = [flag for flag, given in (("--suffix", args.suffix is not None), ("--special", args.special)) if given]
    if raw and (args.chat or args.prompt_ids is not None):
        raise UserError(f"{raw[0]} is about a text to continue: leave out {'--chat' if args.chat else '--prompt-ids'}")
    if len(raw) > 1:
        raise UserError("--suffix takes both texts as plain text: leave out --special")


def prompt_ids(args: argparse.Namespace, text: str | None, engine: "Engine", tokenizer: Tokenizer | None) -> list[int]:
    """Ids of one prompt; `text` is None if --prompt-ids gives them. Raises `UserError` if they cannot be made."""
    if text is None:
        return _parse_ids(args.prompt_ids)
    if tokenizer is None:
        raise UserError(f"--prompt needs a tokenizer, but {args.artifact} has none: pass --prompt-ids")
    tokenizer.check_length(len(text), engine.room(0))
    if args.chat:
        return _conversation_ids(args, text, engine, tokenizer)
    if args.suffix is not None:
        tokenizer.check_length(len(args.suffix), engine.room(0))
        return encode_fill_in(tokenizer, text, args.suffix)
    return tokenizer.encode_with_controls(text) if args.special else tokenizer.encode(text)


def read_tools(path: Path) -> list[Tool]:
    """The tools in a file; raises `UserError` if it is not a JSON list of tools in OpenAI's form."""
    data = read_small(path, TOOLS_LIMIT, "a JSON file with a list of tools")
    try:
        return msgspec.json.decode(data.removeprefix(codecs.BOM_UTF8), type=list[Tool])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(
            f"{path} is not a list of tools: {error}; expected "
            '[{"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}]'
        ) from error


def _conversation_ids(args: argparse.Namespace, text: str, engine: "Engine", tokenizer: Tokenizer) -> list[int]:
    from runtime.text.conversation_encoder import open_conversation_encoder  # loads Jinja, which only a chat needs

    tools = [] if args.tools is None else read_tools(args.tools)
    encoder = open_conversation_encoder(tokenizer.spec, engine.folder, tokenizer)
    if tools and not encoder.writes_tools:
        raise UserError(
            "the model's chat format has no place for tools, so it was not trained to call any: drop --tools"
        )
    system = [] if args.system is None else [Message(role="system", content=args.system)]
    return encoder.encode([*system, Message(role="user", content=text)], tools)


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(
            f"--prompt-ids is {text!r}, expected whole numbers separated by commas, such as 1,2,3"
        ) from error
