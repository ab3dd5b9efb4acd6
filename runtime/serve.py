"""`python -m runtime.serve ARTIFACT`: serve an artifact to many users, with OpenAI's API and a page to chat."""

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import msgspec

from runtime.artifact.build_number import add_minimum_build
from runtime.artifact.folder import read_manifest
from runtime.errors import run_command
from runtime.server.settings import Keys, ServerSettings, read_settings

# the settings that have a flag of their own; all others are in the file
FLAGS = {
    "host": "address to listen at (default: %(default)s, which only this machine reaches)",
    "port": "port to listen at; 0 takes a free one",
    "model_name": "name of the model for clients (default: the artifact's)",
    "keys_file": "a file with one API key a line, one of which each request must carry",
    "tls_certificate": "certificate in PEM form; the server then speaks HTTPS",
    "tls_key": "key of the certificate in PEM form",
    "max_queued": "most sequences that may wait for a slot",
    "request_seconds": "how long a request may take",
    "unready_seconds": "after SIGTERM, how long /ready says so before requests are refused",
    "drain_seconds": "how long requests may go on after that",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or Ctrl-C, as `python -m runtime.serve --help` describes."""
    args = _parser().parse_args(argv)
    given = {name: value for name in FLAGS if (value := getattr(args, name)) is not None}
    settings = read_settings(args.config, {**given, **({"allow_no_keys": True} if args.allow_no_keys else {})})
    keys = None if settings.keys_file is None else Keys.read(Path(settings.keys_file))
    name = settings.model_name or read_manifest(args.artifact).name
    asyncio.run(_serve(args, name, settings, keys))
    return 0


async def _serve(args: argparse.Namespace, name: str, settings: ServerSettings, keys: Keys | None) -> None:
    from runtime.server.process import address_of, bound_socket, serve_until_signal  # loads what `--help` does not need
    from runtime.server.running.served_model import open_served_model
    from runtime.server.service import Service

    service = Service(name, partial(open_served_model, args.artifact, args.threads, args.minimum_build), settings)
    listening = bound_socket(settings.host, settings.port)
    address = address_of(settings, listening)
    print(f"loading {name} ...", file=sys.stderr, flush=True)
    await serve_until_signal(service, keys, listening, lambda: print(_ready_text(address, name, keys), flush=True))


def _ready_text(address: str, name: str, keys: Keys | None) -> str:
    """The address, and a line that asks for an answer."""
    asked = json.dumps({"model": name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64})
    key = "" if keys is None else " -H 'Authorization: Bearer KEY'"
    return (
        f"{name} is served at {address}/ (open it in a browser; Ctrl-C ends)\n"
        f"curl {address}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{asked}'"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m runtime.serve", description="Serve an artifact with OpenAI's API, and a page to chat."
    )
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="folder that `make compile` wrote")
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="a TOML file of settings (docs/serving.md); flags come first"
    )
    fields = {field.name: field for field in msgspec.structs.fields(ServerSettings)}
    for name, text in FLAGS.items():
        default = fields[name].default
        kind = type(default) if default is not None else str
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=name.split("_")[-1].upper(), help=text)
    parser.add_argument("--allow-no-keys", action="store_true", help="listen beyond this machine without API keys")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    add_minimum_build(parser)
    return parser


if __name__ == "__main__":
    run_command(main)
