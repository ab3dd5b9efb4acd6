"""A GGUF checkpoint; its tensors must be what the package `gguf` unpacks, and none may lie over another."""

import struct
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import gguf
import numpy as np
from gguf.quants import dequantize, quantize

from tests.fuzz.limits import start_clock
from tests.fuzz.mutations import set_number, spoil_bytes
from tests.fuzz.reader import Reader, demand, place
from tests.fuzz.tiny_files import (
    CHATML,
    DIM,
    GGUF,
    HEADS,
    HIDDEN,
    KV_HEADS,
    box_tokenizer,
    json_tokenizer,
    opened,
    sentencepiece_model,
    tensors,
)

TEXT, ARRAY = 8, 9  # GGUF's numbers of these types
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a number, by its type
PLAIN = {"F32", "F16", "BF16"}


def open_reader(folder: Path) -> Reader:
    seeds = [
        written(folder / f"{kind}-{packing}.gguf", kind, packing)
        for kind, packing in (("gpt2", "F32"), ("llama", "Q8_0"), ("llama", "Q4_0"), ("gpt2", "BF16"))
    ]
    seeds.append(written(folder / "mixture.gguf", "gpt2", "Q8_0", pre="tekken", experts=2))
    (folder / "artifact").mkdir()
    return Reader(seeds, spoil, partial(check, folder), known_of(seeds[1]))


def written(path: Path, kind: str, packing: str, *, pre: str = "gpt-2", experts: int = 0) -> bytes:
    """A file of the tiny model, or a mixture of as many experts, with one of the two kinds of tokenizers."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(DIM)
    writer.add_block_count(1)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_tokenizer_model(kind)
    if kind == "gpt2":
        vocab = sorted(json_tokenizer().get_vocab().items(), key=lambda item: item[1])
        tokens, types = [name for name, _ in vocab], [3 if i < 7 else 1 for _, i in vocab]
        writer.add_tokenizer_pre(pre)
        writer.add_token_merges(["a b", "ab c"])
    else:
        pieces = sentencepiece_model(290).pieces
        tokens, types = [piece.piece for piece in pieces], [piece.type for piece in pieces]
        writer.add_token_scores([piece.score for piece in pieces])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHATML)
    stored = tensors(GGUF)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(1)
        stored = mixture(stored, experts)
    for name, tensor in stored.items():
        used = gguf.GGMLQuantizationType[packing if tensor.ndim > 1 else "F32"]
        writer.add_tensor(name, quantize(tensor, used), raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def mixture(dense: dict[str, Any], experts: int) -> dict[str, Any]:
    """The tensors of a mixture whose experts are all the feed-forward of a dense model."""
    stacked = {
        name.replace(".weight", "_exps.weight"): np.stack([tensor] * experts)
        for name, tensor in dense.items()
        if ".ffn_" in name and "norm" not in name
    }
    kept = {name: tensor for name, tensor in dense.items() if name.replace(".weight", "_exps.weight") not in stacked}
    return kept | stacked | {"blk.0.ffn_gate_inp.weight": np.ones((experts, DIM), np.float32)}


def fields(data: bytes) -> Iterator[tuple[str, int, int]]:
    """(what, offset, size) of every number in a valid file's header."""
    yield "tensors", 8, 8
    yield "keys", 16, 8
    n_tensors, n_keys = struct.unpack_from("<QQ", data, 8)
    at = 24
    for _ in range(n_keys):
        key, at = yield from _text(data, at)
        yield "type of a value", at, 4
        at = yield from _value(data, at + 4, struct.unpack_from("<I", data, at)[0], key)
    for _ in range(n_tensors):
        _, at = yield from _text(data, at)
        yield "dimensions", at, 4
        dims = struct.unpack_from("<I", data, at)[0]
        yield from (("size of a dimension", at + 4 + 8 * i, 8) for i in range(dims))
        at += 4 + 8 * dims
        yield "type of a tensor", at, 4
        yield "offset of a tensor", at + 4, 8
        at += 12


def _text(data: bytes, at: int) -> Any:
    yield "length of a text", at, 8
    size = struct.unpack_from("<Q", data, at)[0]
    return data[at + 8 : at + 8 + size].decode(), at + 8 + size


def _value(data: bytes, at: int, kind: int, key: str) -> Any:
    if kind == TEXT:
        return (yield from _text(data, at))[1]
    if kind != ARRAY:
        yield key, at, SIZES[kind]
        return at + SIZES[kind]
    yield "type of an array", at, 4
    yield f"count of {key}", at + 4, 8
    kind, count = struct.unpack_from("<IQ", data, at)
    at += 12
    for i in range(count):
        if kind == TEXT and i > 3:  # the first texts of an array are enough to spoil
            at += 8 + struct.unpack_from("<Q", data, at)[0]
        else:
            at = yield from _value(data, at, kind, key)
    return at


def spoil(draw: Random, data: bytes) -> bytes:
    """Change numbers of the header, or its texts without their lengths, or any bytes."""
    found = list(fields(data))
    kinds = sorted({what for what, _, _ in found})
    kind = draw.choice(kinds)  # otherwise the many ids of tokens would be changed most
    places = [(at, size) for what, at, size in found if what == kind]
    if draw.random() < 0.3:
        changed = bytearray(data)
        at, size = draw.choice(places)
        # small numbers: other types, and other numbers of dimensions; or a number of the same kind from elsewhere
        other, _ = draw.choice(places)
        changed[at : at + size] = data[other : other + size]
        if draw.random() < 0.7:
            set_number(changed, at, size, draw.randrange(100))
        return bytes(changed)
    return spoil_bytes(draw, data, places)


def check(folder: Path, data: bytes) -> None:
    path = place(folder / "x.gguf", data)
    found = opened(path, "gguf")
    box_tokenizer(found, folder / "artifact")
    start_clock()
    theirs = gguf.GGUFReader(path).tensors
    spans = sorted((int(tensor.data_offset), int(tensor.n_bytes)) for tensor in theirs)
    for (start, nbytes), (following, _) in pairwise(spans):
        demand(start + nbytes <= following, "two tensors share bytes")
    for tensor in theirs:
        ours = np.ascontiguousarray(found.source.read(tensor.name, slice(None)))
        plain = tensor.tensor_type.name in PLAIN
        expected = tensor.data if plain else dequantize(np.array(tensor.data), tensor.tensor_type)
        demand(
            ours.tobytes() == np.ascontiguousarray(expected).tobytes(),
            "a tensor has other numbers than the package unpacks",
        )


def known_of(seed: bytes) -> dict[str, bytes]:
    def with_number(kind: str, number: int) -> bytes:
        changed = bytearray(seed)
        _, at, size = next(field for field in fields(seed) if field[0] == kind)
        set_number(changed, at, size, number)
        return bytes(changed)

    return {
        "an array of 2^60": with_number("count of tokenizer.ggml.tokens", 2**60),
        "2^40 tensors": with_number("tensors", 2**40),
        "2^61 keys": with_number("keys", 2**61),
        "a token of type 99": with_number("tokenizer.ggml.token_type", 99),
        "a tensor over another": with_number("offset of a tensor", 64),
        "an offset that wraps": with_number("offset of a tensor", 2**64 - 64),
        "a tensor without dimensions": with_number("dimensions", 0),
    }
