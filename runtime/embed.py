"""`python -m runtime.embed ARTIFACT --text ...`: one vector per text, pooled from the last hidden states.

These are the decoder's, after the final norm.
"""

import argparse
import json
from collections.abc import Sequence

from runtime import cli
from runtime.decoding.pooling import POOLS, pooled
from runtime.decoding.whole_texts import open_head, whole_texts_parser
from runtime.errors import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Embed each text, as `python -m runtime.embed --help` describes."""
    parser = whole_texts_parser(
        "runtime.embed",
        "Turn texts into vectors with a compiled artifact; without --json, print the numbers of one vector per line.",
    )
    parser.add_argument(
        "--pool",
        choices=POOLS,
        help="the last token's state, or the mean over all tokens (default: what the checkpoint said, or else last)",
    )
    parser.add_argument(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        help="scale each vector to length 1 (default: what the checkpoint said, or else no)",
    )
    args = parser.parse_args(argv)
    opened = open_head(args.artifact, args.threads, args.minimum_build, ("embedding",))
    ids = [opened.ids(text) for text in args.text]
    pool = opened.model.pool if args.pool is None else args.pool
    normalize = opened.model.normalize if args.normalize is None else args.normalize
    vectors = [pooled(states, pool, normalize=normalize) for states in map(opened.engine.head_outputs, ids)]
    if args.json:
        rows = zip(args.text, ids, vectors, strict=True)
        print(
            json.dumps(
                [{"text": text, "tokens": len(tokens), "embedding": vector.tolist()} for text, tokens, vector in rows]
            )
        )
        return 0
    for vector in vectors:
        cli.write(" ".join(map(str, vector)) + "\n")
    return 0


if __name__ == "__main__":
    run_command(main)
