"""`python -m runtime.text.encode SPEC FOLDER SECONDS BYTES`: ids of the texts on standard input, without a bos.

Texts come as a JSON list, and their ids go to standard output as a JSON list of lists. A compile reads its calibration
text so, in a process that may take too long or too much memory, or crash.
"""

import sys
from pathlib import Path

import msgspec

from runtime.artifact.manifest import TokenizerSpec
from runtime.errors import run_command
from runtime.text.process_limits import limit_process
from runtime.text.tokenizer import open_tokenizer


def main() -> int:
    """Encode the texts with the tokenizer that the arguments name; returns the exit status."""
    spec, folder, seconds, memory = sys.argv[1:]
    limit_process(int(seconds), int(memory))
    texts = msgspec.json.decode(sys.stdin.buffer.read(), type=list[str])
    tokenizer = open_tokenizer(msgspec.json.decode(spec, type=TokenizerSpec), Path(folder))
    sys.stdout.buffer.write(msgspec.json.encode([tokenizer.encode(text, add_bos=False) for text in texts]))
    return 0


if __name__ == "__main__":
    run_command(main)
