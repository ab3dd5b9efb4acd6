"""A SentencePiece model, from the checkpoint to the box."""

from functools import partial
from pathlib import Path
from random import Random

from safetensors.numpy import save_file
from sentencepiece import sentencepiece_model_pb2

from runtime.text.tokenizer import open_tokenizer
from tests.fuzz.mutations import EXTREMES, spoil_bytes
from tests.fuzz.reader import Reader, demand, place
from tests.fuzz.readers.tokenizer_json import TEXTS
from tests.fuzz.tiny_files import MISTRAL, box_tokenizer, opened, sentencepiece_model, tensors, write_mistral

PIECES = ("", "\0", "<s>", "</s>", "▁", "<0x41>", "<0xZZ>", "x" * 100_000, "\ufffd", "a", "<|im_start|>")
SCORES = (0.0, -0.0, 1e38, -1e38, float("nan"), float("inf"), float("-inf"))


def open_reader(folder: Path) -> Reader:
    checkpoint = write_mistral(folder / "checkpoint")
    save_file(tensors(MISTRAL), checkpoint / "consolidated.safetensors")
    (folder / "artifact").mkdir()
    model = sentencepiece_model()
    seed = model.SerializeToString()
    known = {
        "empty": b"",
        "a piece twice": twice(model),
        "a control piece that is not UTF-8": seed.replace(b"<|im_end|>", b"<|im_\xff\xff\xff|>"),
    }
    return Reader([seed], spoil, partial(check, folder), known)


def twice(model) -> bytes:
    copy = type(model)()
    copy.CopyFrom(model)
    copy.pieces.add().CopyFrom(copy.pieces[-1])
    return copy.SerializeToString()


def spoil(draw: Random, data: bytes) -> bytes:
    """Change pieces, or what the trainer's and normalizer's parts say, or any bytes."""
    if draw.random() < 0.4:
        return spoil_bytes(draw, data)
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(data)
    for _ in range(draw.choice((1, 1, 2, 5))):
        draw.choice((_piece, _piece, _trainer, _normalizer))(draw, model)
    return model.SerializeToString()


def _piece(draw: Random, model) -> None:
    kind = draw.randrange(5)
    piece = draw.choice(model.pieces)
    if kind == 0:
        piece.piece = draw.choice(PIECES)
    elif kind == 1:
        piece.score = draw.choice(SCORES)
    elif kind == 2:
        piece.type = draw.choice((1, 2, 3, 4, 5, 6))
    elif kind == 3:
        del model.pieces[draw.randrange(len(model.pieces)) + 1 :]
    else:
        model.pieces.add().CopyFrom(piece)


def _trainer(draw: Random, model) -> None:
    spec = model.trainer_spec
    fields = [field for field in spec.DESCRIPTOR.fields if not field.is_repeated]
    _set_any(draw, spec, draw.choice([field for field in fields if field.name != "model_type"]))
    if draw.random() < 0.2:
        spec.model_type = draw.choice((1, 2, 3, 4))


def _normalizer(draw: Random, model) -> None:
    if draw.random() < 0.3:
        model.normalizer_spec.precompiled_charsmap = draw.choice((b"\xff\xff\xff\x7f", b"\0" * 8, draw.randbytes(200)))
    _set_any(draw, model.normalizer_spec, draw.choice(model.normalizer_spec.DESCRIPTOR.fields))


def _set_any(draw: Random, message, field) -> None:
    """Give one field of a protobuf another value of its type."""
    values = {
        field.CPPTYPE_BOOL: (True, False),
        field.CPPTYPE_STRING: PIECES,
        field.CPPTYPE_FLOAT: SCORES,
        field.CPPTYPE_INT32: [number for number in EXTREMES if -(2**31) <= number < 2**31],
        field.CPPTYPE_UINT64: [number for number in EXTREMES if 0 <= number < 2**64],
        field.CPPTYPE_INT64: [number for number in EXTREMES if -(2**63) <= number < 2**63],
    }
    value = draw.choice(values.get(field.cpp_type, (None,)))
    if value is not None:
        setattr(message, field.name, value.encode() if field.type == field.TYPE_BYTES else value)


def check(folder: Path, data: bytes) -> None:
    place(folder / "checkpoint" / "tokenizer.model.v3", data)
    spec = box_tokenizer(opened(folder / "checkpoint", "mistral"), folder / "artifact")
    demand(spec is not None, "the tokenizer is left out")
    tokenizer = open_tokenizer(spec, folder / "artifact")
    for text in TEXTS:
        ids = tokenizer.encode(text)
        demand(tokenizer.encode(text) == ids, "a text has other ids the next time")
        demand(type(tokenizer.decode(ids)) is str, "no text")
