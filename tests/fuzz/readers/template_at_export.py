"""The chat template of a checkpoint: one that a compile takes must be one that a box can open."""

from functools import partial
from pathlib import Path

from runtime.artifact.manifest import VOCABULARY_LIMIT
from runtime.errors import UserError
from runtime.text.chat_template import open_chat_template
from runtime.text.tokenizer import open_tokenizer
from runtime.text.trial import try_out
from tests.fuzz.reader import Reader, WrongResult, demand, place
from tests.fuzz.readers.chat_template import INSTRUCT, TOOLS, spoil
from tests.fuzz.tiny_files import CHATML, box_tokenizer, opened, write_huggingface


def open_reader(folder: Path) -> Reader:
    write_huggingface(folder / "checkpoint")
    (folder / "artifact").mkdir()
    known = {
        "latin-1": "é".encode("latin-1"),
        "a statement without end": b"{% for message in messages %}",
        "a power": b"{{ 9**(9**9) }}",
        "a loop without end": b"{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "a deep expression": b"{{ " + b"(" * 3000 + b"1" + b")" * 3000 + b" }}",
    }
    return Reader([text.encode() for text in (CHATML, INSTRUCT, TOOLS)], spoil, partial(check, folder), known)


def check(folder: Path, data: bytes) -> None:
    place(folder / "checkpoint" / "chat_template.jinja", data)
    artifact = folder / "artifact"
    spec = box_tokenizer(opened(folder / "checkpoint", "huggingface"), artifact)
    demand(spec is not None and spec.chat_template is not None, "the template is left out")
    try_out(spec, artifact, VOCABULARY_LIMIT)  # as the export does, in a process of its own
    try:
        open_chat_template(spec, artifact, open_tokenizer(spec, artifact))
    except UserError as error:
        raise WrongResult("a template is found to be wrong on the box alone") from error
