"""Checkpoints that are broken or made to harm: each is refused with one sentence, quickly, and in little memory."""

import json
import os
import re
import shutil
import struct
import sys
import zipfile

import numpy as np
import pytest
import tokenizers
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file, save_file

from export.checkpoints.checkpoint import open_checkpoint
from export.checkpoints.gguf.checkpoint import GgufTensors, _read_header
from export.checkpoints.gguf.tokenizer import recover
from export.checkpoints.location import checkpoint_files
from export.checkpoints.mistral import tekken
from export.checkpoints.source import identity
from export.weights.storing import record_of, store_weights
from runtime.artifact.manifest import Quantization
from runtime.errors import UserError
from tests.helpers.raw_mistral import raw_tensors, write_raw
from tests.helpers.tiny import write_tiny_mistral

Q = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
PARAMS = {
    "dim": 64,
    "n_layers": 1,
    "head_dim": 16,
    "hidden_dim": 96,
    "n_heads": 4,
    "n_kv_heads": 2,
    "norm_eps": 1e-5,
    "vocab_size": 320,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "tiny"
    write_tiny_mistral(folder)
    return folder


@pytest.fixture
def copy(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "copy")


def refused(path, **options):
    with pytest.raises(UserError) as told:
        open_checkpoint(path, "auto", {}, **options)
    return str(told.value)


# Numbers that no model computes with


def changed(folder, name, row, value, dtype=torch.float32):
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(folder / "model.safetensors").items()}
    tensors[name].view(len(tensors[name]), -1)[row, -1] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return open_checkpoint(folder, "auto", {})


def stored(checkpoint, folder, scheme="none", dtype="fp32"):
    return store_weights(record_of(checkpoint, Quantization(scheme=scheme), dtype, {}), checkpoint, folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [Q, NORM, "lm_head.weight"])
def test_a_number_that_is_not_finite_is_refused_with_its_place(copy, tmp_path, value, dtype, name):
    checkpoint = changed(copy, name, 5, value, dtype)
    for scheme in ("none", "int8", "int4"):
        with pytest.raises(UserError, match=f"{name} holds a NaN or an infinite number in row 5, expected finite"):
            stored(checkpoint, tmp_path, scheme)


@pytest.mark.parametrize(("scheme", "dtype", "as_"), [("none", "fp16", "float16"), ("int4", "fp32", "float16")])
def test_a_number_beyond_the_stored_dtype_is_refused_with_its_place(copy, tmp_path, scheme, dtype, as_):
    """70000 in float16, and 10**6 in the float16 scale of an int4 group."""
    checkpoint = changed(copy, Q, 5, 70000.0 if scheme == "none" else 1e6)
    with pytest.raises(UserError, match=rf"wqkv.weight, row 5: a number is too large to store as {as_}; set backend"):
        stored(checkpoint, tmp_path, scheme, dtype)


@pytest.mark.parametrize("name", [Q, NORM, "model.embed_tokens.weight"])
def test_a_number_in_place_of_a_tensor(copy, name):
    tensors = load_file(copy / "model.safetensors") | {name: torch.tensor(1.0)}
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert f"{name} has shape (), expected" in refused(copy)


def test_what_fits_is_stored(copy, tmp_path):
    stored(changed(copy, Q, 5, 65504.0), tmp_path, dtype="fp16")
    stored(changed(copy, Q, 5, 3e38), tmp_path, dtype="bf16")


# Which files make up a checkpoint


def test_every_file_that_is_opened_is_in_the_key(copy, tmp_path):
    """Shards in a folder below, too."""
    (copy / "weights").mkdir()
    (copy / "model.safetensors").rename(copy / "weights" / "1.safetensors")
    names = load_file(copy / "weights" / "1.safetensors")
    (copy / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(names, "weights/1.safetensors")})
    )
    opened = set()
    watching = True

    def note(event, arguments):
        if watching and event == "open" and str(arguments[0]).startswith(str(copy)):
            opened.add(os.path.realpath(arguments[0]))

    sys.addaudithook(note)
    stored(open_checkpoint(copy, "auto", {}), tmp_path)
    watching = False
    keyed = {os.path.realpath(path) for path in checkpoint_files(copy)}
    assert {os.path.basename(path) for path in opened} >= {"1.safetensors", "config.json", "tokenizer.json"}
    assert opened <= keyed
    before = identity(checkpoint_files(copy))
    with (copy / "weights" / "1.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"abcd")
    assert identity(checkpoint_files(copy)) != before


def test_a_large_file_with_the_same_size_time_and_start_is_another_file(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(bytes(20 * 2**20))
    before, times = identity([path]), path.stat()
    with path.open("r+b") as file:
        file.seek(10 * 2**20 + 12345)
        file.write(b"x")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert identity([path]) != before


@pytest.mark.parametrize("name", ["chat_template.jinja", "model.safetensors", "tokenizer.json"])
def test_a_link_out_of_the_folder_is_refused(copy, tmp_path, name):
    (tmp_path / "signing.key").write_text("secret")
    (copy / name).unlink(missing_ok=True)
    (copy / name).symlink_to("../signing.key")
    assert f"{name} is a link to {tmp_path}/signing.key, outside the checkpoint" in refused(copy)


def test_the_cache_of_a_hub_is_read(copy, tmp_path):
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--x" / "blobs").mkdir()
    for i, file in enumerate(sorted(copy.iterdir())):
        file.rename(tmp_path / "models--x" / "blobs" / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    assert open_checkpoint(snapshot, "auto", {}).model.dim == 64
    (copy / "key").write_text("secret")
    (snapshot / "chat_template.jinja").symlink_to(copy / "key")
    assert "outside the checkpoint" in refused(snapshot)


def test_a_pipe_is_no_checkpoint(tmp_path):
    os.mkfifo(tmp_path / "x.gguf")
    assert "is neither a folder nor a regular file" in refused(tmp_path / "x.gguf")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "anything"])
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (os.mkfifo, "is neither a file nor a folder"),
        (lambda path: path.symlink_to("nowhere"), "is a link that leads nowhere"),
        (lambda path: path.symlink_to(path.name), "is a link that leads nowhere"),
        (lambda path: path.symlink_to("/dev/zero"), "neither a file nor a folder|leads nowhere"),
    ],
)
def test_what_is_no_file_is_not_taken_as_absent(copy, name, make, said):
    (copy / name).unlink(missing_ok=True)
    make(copy / name)
    assert re.search(f"{name} .*({said})", refused(copy))


# Small files


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_half_a_character_in_json(copy, name):
    values = json.loads((copy / name).read_text()) if (copy / name).exists() else {}
    (copy / name).write_text(json.dumps(values | {"chat_template": "\ud800"}))
    assert f"{name} is not valid JSON" in refused(copy)


def test_a_template_in_another_encoding(copy):
    (copy / "chat_template.jinja").write_bytes("Grüße".encode("latin-1"))
    assert "chat_template.jinja is not text in UTF-8: invalid start byte at byte 2; convert it" in refused(copy)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("num_hidden_layers", 10**9, "expected a number of layers from 1 to 4096"),
        ("vocab_size", 2**40, "Expected `int` <= 16777216"),
        ("hidden_size", 2**50, "Expected `int` <="),
    ],
)
def test_absurd_sizes(copy, name, value, expected):
    (copy / "config.json").write_text(json.dumps(json.loads((copy / "config.json").read_text()) | {name: value}))
    assert expected in refused(copy)


def test_a_billion_experts(tmp_path):
    moe = {"num_experts": 10**9, "num_experts_per_tok": 2}
    write_raw(tmp_path, PARAMS | {"moe": moe}, raw_tensors(PARAMS))
    assert "Expected `int` <= 1024" in refused(tmp_path)


# tokenizer.json


def change_tokenizer(folder, change):
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def test_padding_and_truncation_of_the_tokenizer_do_not_matter(tiny, copy):
    tokenizer = tokenizers.Tokenizer.from_file(str(copy / "tokenizer.json"))
    tokenizer.enable_padding(length=2**40, direction="left")
    tokenizer.enable_truncation(1)
    tokenizer.save(str(copy / "tokenizer.json"))
    ours, plain = (open_checkpoint(folder, "auto", {}).tokenizer for folder in (copy, tiny))
    assert (ours.bos_id, ours.eos_ids, ours.add_bos, ours.end_id) == (
        plain.bos_id,
        plain.eos_ids,
        plain.add_bos,
        plain.end_id,
    )


@pytest.mark.parametrize(
    "text", ["", "{}", '{"model": {"type": "BPE", "vocab": {"a": 99999999999999999999}, "merges": []}}', "[" * 10_000]
)
def test_no_tokenizer(copy, text):
    (copy / "tokenizer.json").write_text(text)
    assert "tokenizer.json is not a tokenizer: " in refused(copy)


def test_a_tokenizer_that_panics(copy):
    """The library's own code fails in Rust, which no `except Exception` catches."""

    def unknown(file):
        file["model"] = {"type": "Unigram", "unk_id": 7, "vocab": [["a", 0.0]], "byte_fallback": False}
        return file

    change_tokenizer(copy, unknown)
    assert "tokenizer.json is not a tokenizer: " in refused(copy)


def test_a_tokenizer_that_makes_a_text_a_thousand_times_longer(copy):
    grow = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
    change_tokenizer(copy, lambda file: file | {"normalizer": {"type": "Sequence", "normalizers": [grow] * 3}})
    assert "its normalizer can make a text 1000000000 times as long" in refused(copy)


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"normalizer": {"type": "Prepend", "prepend": "x" * 10**6}}, "its normalizer can make a text 1000000 times"),
        (
            {
                "post_processor": {
                    "type": "TemplateProcessing",
                    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}] * 10_000,
                    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                    "special_tokens": {"<s>": {"id": "<s>", "ids": [1] * 10_000, "tokens": ["<s>"] * 10_000}},
                }
            },
            "its post_processor puts 100000000 tokens around a text",
        ),
    ],
)
def test_a_tokenizer_that_adds_millions(copy, part, said):
    change_tokenizer(copy, lambda file: file | part)
    assert said in refused(copy)


# tekken.json


def tekken_file(**config):
    plain = {"pattern": ".", "default_vocab_size": 300, "default_num_special_tokens": 20, "version": "v3"}
    return json.dumps({"config": plain | config, "vocab": []}).encode()


@pytest.mark.parametrize("sizes", [(300, 2**31), (2**63, 20), (2**62, 2**61), (300, -1)])
def test_absurd_counts_in_tekken(sizes):
    data = tekken_file(default_vocab_size=sizes[0], default_num_special_tokens=sizes[1])
    with pytest.raises(UserError, match=r"declares .* special tokens|is not a tekken tokenizer"):
        tekken.convert(data, "x")


def test_a_deeply_nested_tekken():
    with pytest.raises(UserError, match="is not a tekken tokenizer"):
        tekken.convert(b'{"config":' + b"[" * 10**6, "x")


# .pth


def repacked(path, change):
    """Write the archive of a .pth again: `change` gives a record's bytes and the compression."""
    with zipfile.ZipFile(path) as archive:
        records = [(info, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for info, data in records:
            archive.writestr(info.filename, *change(info.filename, data))


@pytest.fixture
def pth(tmp_path):
    return write_raw(tmp_path / "raw", PARAMS, raw_tensors(PARAMS), pth_files=1)


def test_compressed_records(pth):
    path = pth / "consolidated.00.pth"
    repacked(path, lambda name, data: (data, zipfile.ZIP_DEFLATED if name.endswith("/data/3") else zipfile.ZIP_STORED))
    assert "holds the compressed record 'consolidated.00/data/3', expected records stored" in refused(pth)


def test_a_bomb(pth):
    path = pth / "consolidated.00.pth"
    bomb = bytes(2**26)
    repacked(path, lambda name, data: (bomb, zipfile.ZIP_DEFLATED) if name.endswith("data.pkl") else (data, 0))
    assert "holds the compressed record" in refused(pth)


@pytest.mark.parametrize("change", [lambda data: data[:-64], lambda data: data + bytes(64)])
def test_a_record_of_another_size_than_its_tensor(pth, change):
    path = pth / "consolidated.00.pth"
    repacked(path, lambda name, data: (change(data) if name.endswith("/data/3") else data, zipfile.ZIP_STORED))
    assert "expected one record of its size for each tensor" in refused(pth)


def test_a_file_named_data_is_read(pth):
    """torch names the folder inside after the file."""
    with zipfile.ZipFile(pth / "consolidated.00.pth") as archive:
        records = {
            info.filename.replace("consolidated.00/", "data/", 1): archive.read(info) for info in archive.infolist()
        }
    with zipfile.ZipFile(pth / "consolidated.00.pth", "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    assert open_checkpoint(pth, "auto", {}).model.dim == PARAMS["dim"]


def test_tensors_that_share_a_storage_are_read(tmp_path):
    tensors = raw_tensors(PARAMS)
    both = torch.cat([tensors["layers.0.attention.wk.weight"], tensors["layers.0.attention.wv.weight"]])
    tensors |= {"layers.0.attention.wk.weight": both[:32], "layers.0.attention.wv.weight": both[32:]}
    write_raw(tmp_path, PARAMS, tensors, pth_files=1)
    ours = open_checkpoint(tmp_path, "auto", {})
    assert np.array_equal(ours.tensor("layers.0.attention.wqkv.weight")[-32:], both[32:].numpy())


# GGUF


def header(*parts, tensors=0, keys=0, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + b"".join(parts)


def text(value):
    return struct.pack("<Q", len(value)) + value


def place(name=b"token_embd.weight", shape=(32, 2), packing=0, offset=0):
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, packing, offset)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"GGUF", "its header is cut short at byte 4"),
        (header(keys=2**60), "has 1152921504606846976 keys, more than the 0 bytes left"),
        (header(tensors=2**60), "has 1152921504606846976 tensors, more than the"),
        (header(struct.pack("<Q", 2**63) + bytes(64), keys=1), "bytes in a string, more than the"),
        *(
            (
                header(text(b"a"), struct.pack("<IIQ", 9, kind, 2**60), bytes(64), keys=1),
                "values in an array, more than",
            )
            for kind in (0, 8, 12)
        ),
        (header(text(b"a"), struct.pack("<IIQ", 9, 9, 1), bytes(64), keys=1), "an array of arrays"),
        (header(text(b"a"), struct.pack("<I", 77), bytes(64), keys=1), "a value of the unknown type 77"),
        (header(place(shape=()), bytes(640), tensors=1), "has 0 dimensions, expected 1 to 4"),
        (header(place(shape=(1,) * 5), bytes(640), tensors=1), "has 5 dimensions, expected 1 to 4"),
        (header(place(shape=(2**62, 4)), bytes(640), tensors=1), "it is truncated"),
        (header(place(shape=(31, 2), packing=8), bytes(640), tensors=1), "expected rows of a multiple of 32 numbers"),
        (header(place(offset=2**63), bytes(640), tensors=1), "it is truncated"),
        (
            header(place(), place(b"b", offset=64), bytes(640), tensors=2),
            "b begins at byte 64 of the data and overlaps",
        ),
        (header(version=1), "it has version 1, expected 2 or 3"),
        (header(version=3 << 24), "its byte order is not this machine's"),
    ],
)
def test_a_header_that_lies(tmp_path, data, said):
    (tmp_path / "x.gguf").write_bytes(data)
    found = refused(tmp_path / "x.gguf")
    assert "is not a complete GGUF file: " in found
    assert said in found


def test_a_packing_without_a_name(tmp_path):
    (tmp_path / "x.gguf").write_bytes(header(place(packing=255), bytes(640), tensors=1))
    assert "has the unknown type 255, which cannot be unpacked; use a file of another quantization" in refused(
        tmp_path / "x.gguf"
    )


def test_a_token_of_an_unknown_type():
    keys = {"model": "llama", "tokens": ["a", "b"], "token_type": [2, 99], "scores": [0.0, 0.0]}
    with pytest.raises(UserError, match="the header has a token of the unknown type 99, expected 1 to 6"):
        recover({f"tokenizer.ggml.{key}": value for key, value in keys.items()}, "the header")


def test_a_vector_may_be_quantized(tmp_path):
    """Its blocks are not rows, but it is read all the same."""
    values = np.linspace(-1, 1, 128, dtype=np.float32)
    packed = quantize(values[None], GGMLQuantizationType.Q8_0)
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("output_norm.weight", packed[0], raw_dtype=GGMLQuantizationType.Q8_0)
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    tensors = GgufTensors(_read_header(tmp_path / "x.gguf")[1])
    expected = dequantize(packed, GGMLQuantizationType.Q8_0)[0]
    assert np.array_equal(tensors.read("output_norm.weight", slice(None)), expected)
    assert np.array_equal(tensors.read("output_norm.weight", slice(30, 70)), expected[30:70])
