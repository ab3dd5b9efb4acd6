"""One test per rule of the artifact's format.

The library in these tests is text, so loading it would fail in another way.
"""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import safetensors.numpy

from export.stage import ROOT
from runtime.artifact.cpu import machine_features
from runtime.artifact.folder import Artifact, replace_manifest, write_artifact
from runtime.artifact.hashing import BLOCK_BYTES, n_blocks
from runtime.artifact.manifest import (
    SCHEMA_VERSION,
    CpuLevel,
    Manifest,
    ModelConfig,
    ParityRow,
    Quantization,
    Shape,
    TargetSpec,
    TokenizerSpec,
    WeightSpec,
)
from runtime.artifact.signatures import functions_of
from runtime.artifact.tensor_file import TensorFileWriter
from runtime.errors import UserError

LIBRARY = b"this is no ELF file"
MODEL = ModelConfig(
    family="mistral",
    dim=8,
    hidden_dim=16,
    n_layers=2,
    n_heads=2,
    n_kv_heads=1,
    head_dim=4,
    vocab_size=32,
    norm_eps=1e-5,
    rope_theta=1e4,
    sliding_window=(8, None),
    tied_embeddings=True,
)
SHAPE = Shape(slots=2, step_rows=(1, 2), prefill_chunks=(8, 4), cache_len=16)
TARGET = TargetSpec(kind="llvm", dtype="fp32", cpu="this-machine", cpu_features=tuple(sorted(machine_features())))
TOKENIZER = TokenizerSpec(
    kind="tokenizer.json",
    file="tokenizer.json",
    bos_id=1,
    add_bos=True,
    eos_ids=(2, 3),
    chat_template="chat_template.jinja",
)
WEIGHTS = (
    WeightSpec(name="tok_embeddings.weight", shape=(32, 8), dtype="float32", layout="row_major"),
    WeightSpec(name="layers.0.attention.wqkv.weight", shape=(1, 8, 16), dtype="float32", layout="panels_16"),
    WeightSpec(name="layers.1.attention.wqkv.weight", shape=(16, 8), dtype="int8", layout="row_major"),
    WeightSpec(name="layers.1.attention.wqkv.weight.scale", shape=(16,), dtype="float32", layout="row_major"),
)


def arrays(weights=WEIGHTS):
    rng = np.random.default_rng(0)
    return {w.name: (rng.standard_normal(w.shape) * 50).astype(w.dtype) for w in weights}


def fill(folder, weights=WEIGHTS):
    (folder / "library.so").write_bytes(LIBRARY)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    with TensorFileWriter(folder / "weights.safetensors", weights) as writer:
        for name, array in arrays(weights).items():
            writer.write(name, array)


def manifest_of(files, **changes):
    fields = {
        "schema_version": SCHEMA_VERSION,
        "name": "tiny",
        "build_key": "k",
        "model": MODEL,
        "shape": SHAPE,
        "quantization": Quantization(scheme="none"),
        "target": TARGET,
        "functions": functions_of(MODEL, SHAPE, "float32"),
        "weights": WEIGHTS,
        "tokenizer": TOKENIZER,
        "overrides": {},
        "tools": {"apache-tvm": "0", "apache-tvm-ffi": "0"},
        "files": files,
    }
    return Manifest(**fields | changes)


@pytest.fixture
def folder(tmp_path):
    """A valid artifact, alone in its parent folder."""
    return write_artifact(tmp_path / "out" / "tiny", fill, manifest_of).folder


def edit(folder, change):
    """Change `manifest.json` as plain data, bypassing the types."""
    path = folder / "manifest.json"
    data = json.loads(path.read_bytes())
    change(data)
    path.write_text(json.dumps(data))


def entry(data, name):
    return next(item for item in data["files"] if item["path"] == name)


def refusal(folder, **options):
    with pytest.raises(UserError) as error:
        Artifact.open(folder, **options)
    message = str(error.value)
    assert "\n" not in message
    assert str(folder) in message or "this machine" in message
    return message


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


# --- valid artifacts ---


def test_sound_artifact_opens(folder):
    opened = Artifact.open(folder)
    assert opened.manifest == manifest_of(opened.manifest.files)
    assert opened.library.read_bytes() == LIBRARY
    expected = arrays()
    weights = opened.weights()
    assert list(weights) == list(expected)
    for name, array in weights.items():
        np.testing.assert_array_equal(array, expected[name])
        assert array.ctypes.data % 64 == 0
        assert not array.flags.owndata


def test_sums_are_those_of_sha256sum_and_weights_those_of_safetensors(folder):
    """The folder as other programs read it."""
    listed = json.loads((folder / "manifest.json").read_bytes())["files"]
    printed = subprocess.run(
        ["sha256sum", *(f["path"] for f in listed)], cwd=folder, capture_output=True, text=True, check=True
    ).stdout
    assert printed.split() == [word for f in listed for word in (f["sha256"], f["path"])]
    stored = safetensors.numpy.load_file(folder / "weights.safetensors")
    for name, array in arrays().items():
        np.testing.assert_array_equal(stored[name], array)


def test_artifact_is_frozen(folder):
    with pytest.raises(dataclasses.FrozenInstanceError):
        Artifact.open(folder).folder = Path("/")


def test_moved_artifact_opens(folder, tmp_path):
    moved = folder.rename(tmp_path / "elsewhere")
    assert Artifact.open(moved).manifest.name == "tiny"


def test_no_tokenizer_is_allowed(tmp_path):
    def fill_bare(folder):
        fill(folder)
        (folder / "tokenizer.json").unlink()
        (folder / "chat_template.jinja").unlink()

    write_artifact(tmp_path / "bare", fill_bare, lambda files: manifest_of(files, tokenizer=None))
    assert Artifact.open(tmp_path / "bare").manifest.tokenizer is None


# --- rule 1: the folder and its kinds of files ---


def test_no_folder(tmp_path):
    assert "there is no artifact folder" in refusal(tmp_path / "none")


def test_file_instead_of_folder(tmp_path):
    (tmp_path / "x").write_text("")
    assert "there is no artifact folder" in refusal(tmp_path / "x")


def test_folder_without_manifest(folder):
    (folder / "manifest.json").unlink()
    assert "has no manifest.json" in refusal(folder)


@pytest.mark.parametrize("name", ["library.so", "weights.safetensors", "tokenizer.json", "manifest.json"])
def test_symlink(folder, tmp_path, name):
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    assert f"{name} is not a regular file" in refusal(folder)


def test_dangling_symlink_as_manifest(folder):
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").symlink_to("nowhere")
    assert "manifest.json is not a regular file" in refusal(folder)


def test_folder_inside(folder):
    (folder / "deeper").mkdir()
    assert "deeper is not a regular file" in refusal(folder)


def test_pipe_as_manifest_does_not_block(folder):
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")
    assert "manifest.json is not a regular file" in refusal(folder)


# --- rule 2: the manifest ---


@pytest.mark.parametrize(
    "content", [b"", b"not JSON", b"\xff\xfe", b"[]", b'{"schema_version":', b'{"a":' + b"[" * 100_000]
)
def test_manifest_not_json(folder, content):
    (folder / "manifest.json").write_bytes(content)
    assert "manifest.json is not a valid manifest" in refusal(folder)


def test_truncated_manifest(folder):
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes()[:-20])
    assert "manifest.json is not a valid manifest" in refusal(folder)


def test_huge_manifest_is_not_read(folder):
    with (folder / "manifest.json").open("r+b") as file:
        file.truncate(2**40)  # sparse; reading it would exhaust the memory
    assert f"manifest.json has {2**40} bytes, expected at most 16777216" in refusal(folder)


@pytest.mark.parametrize("version", [0, SCHEMA_VERSION + 1])
def test_other_schema_version_comes_before_its_unknown_keys(folder, version):
    edit(folder, lambda data: data.update(schema_version=version, key_of_tomorrow=1))
    assert f"manifest.json has schema version {version}, but this runtime reads {SCHEMA_VERSION}" in refusal(folder)


def test_an_artifact_of_rows_that_start_together_is_to_be_compiled_again(folder):
    """What the manifest of schema 7 had in place of slots and functions is not even looked at."""

    def age(data):
        data["schema_version"] = 7
        data["graphs"] = [{**function, "name": "decode"} for function in data.pop("functions")]
        data["shape"] = {"batch": 2, "prefill_chunks": [8, 4], "cache_len": 16}

    edit(folder, age)
    assert refusal(folder) == (
        f"{folder / 'manifest.json'} has schema version 7, but this runtime reads {SCHEMA_VERSION}; "
        "use its own runtime or compile it again"
    )


def test_unknown_key(folder):
    edit(folder, lambda data: data["model"].update(n_wings=8))
    assert "unknown field `n_wings` - at `$.model`" in refusal(folder)


def test_missing_key(folder):
    edit(folder, lambda data: data.pop("functions"))
    assert "missing required field `functions`" in refusal(folder)


def test_wrong_type(folder):
    edit(folder, lambda data: data["shape"].update(slots="1"))
    assert "Expected `int`, got `str` - at `$.shape.slots`" in refusal(folder)


# --- rule 3: names ---


@pytest.mark.parametrize(
    "name",
    [
        "../library.so",
        "/etc/passwd",
        "a/b",
        "a\\b",
        "..",
        ".",
        "",
        "a\0b",
        ".hidden",
        "C:x",
        "a\nb",
        "a b",
        "\u2024so",
        "-rf",
        "x" * 201,
    ],
)
def test_path_tricks(folder, name):
    edit(folder, lambda data: entry(data, "tokenizer.json").update(path=name))
    assert f"the file name {name!r} is not allowed" in refusal(folder)


def test_file_listed_twice(folder):
    edit(folder, lambda data: data["files"].append(entry(data, "library.so")))
    assert "the file library.so is listed 2 times" in refusal(folder)


def test_manifest_lists_itself(folder):
    edit(folder, lambda data: data["files"].append({**entry(data, "library.so"), "path": "manifest.json"}))
    assert "the file manifest.json lists itself" in refusal(folder)


# --- rule 4: required and used ---


@pytest.mark.parametrize("name", ["library.so", "weights.safetensors", "tokenizer.json", "chat_template.jinja"])
def test_required_file_not_listed(folder, name):
    edit(folder, lambda data: data["files"].remove(entry(data, name)))
    assert f"the file {name} is not listed" in refusal(folder)


def test_listed_file_that_nothing_uses(folder):
    edit(folder, lambda data: data["files"].append({**entry(data, "library.so"), "path": "code.py"}))
    assert "the file code.py is listed, but nothing in the manifest uses it" in refusal(folder)


# --- rules 5 and 6: sizes and block lists ---


@pytest.mark.parametrize(
    ("name", "size"), [("library.so", 0), ("library.so", 2**30 + 1), ("tokenizer.json", 2**28 + 1)]
)
def test_absurd_sizes(folder, name, size):
    edit(folder, lambda data: entry(data, name).update(size=size))
    assert f"the file {name} has {size} bytes, expected 1 to" in refusal(folder)


@pytest.mark.parametrize("size", [-1, 2**50 + 1, 2**200])
def test_sizes_that_no_disk_has(folder, size):
    edit(folder, lambda data: entry(data, "weights.safetensors").update(size=size))
    assert "manifest.json is not a valid manifest" in refusal(folder)


def test_absurd_cache(folder):
    huge = 2**40
    changed = msgspec.structs.replace(SHAPE, cache_len=huge)
    functions = json.loads(msgspec.json.encode(functions_of(MODEL, changed, "float32")))
    edit(folder, lambda data: data.update(shape={**data["shape"], "cache_len": huge}, functions=functions))
    assert f"expected at most {huge} elements" in refusal(folder)


def test_block_list_for_a_small_file(folder):
    edit(folder, lambda data: entry(data, "library.so").update(blocks=["0" * 64]))
    assert "the file library.so has 1 block sums, expected 0 for 19 bytes" in refusal(folder)


def test_block_list_of_wrong_length(folder):
    edit(
        folder, lambda data: entry(data, "weights.safetensors").update(size=2 * BLOCK_BYTES + 1, blocks=["0" * 64] * 2)
    )
    assert "the file weights.safetensors has 2 block sums, expected 3" in refusal(folder)


def test_absurd_size_is_refused_for_its_block_list(folder):
    """A size of 2**50 needs 2**26 sums, more than a manifest can hold."""
    edit(folder, lambda data: entry(data, "weights.safetensors").update(size=2**50))
    assert f"has 0 block sums, expected {2**26}" in refusal(folder)


@pytest.mark.parametrize(("size", "blocks"), [(1, 0), (2**24, 0), (2**24 + 1, 2), (2**25, 2), (2**25 + 1, 3)])
def test_number_of_blocks(size, blocks):
    assert n_blocks(size) == blocks


def test_malformed_sum(folder):
    edit(folder, lambda data: entry(data, "library.so").update(sha256="A" * 64))
    assert "manifest.json is not a valid manifest" in refusal(folder)


# --- rule 7: agreement within the manifest ---


LOGITS = {"name": "logits", "shape": [1, 1, 32], "dtype": "float32"}
FUNCTIONS = "[('prefill_8', 1, 8), ('prefill_4', 1, 4), ('step_1', 1, 1), ('step_2', 2, 1)]"


def of_function(place, change):
    """A change to a function of the manifest."""
    return lambda data: change(data["functions"][place])


def of_inputs(place, change):
    """A change to the inputs of a function."""
    return of_function(place, lambda function: change(function["signature"]["inputs"]))


@pytest.mark.parametrize(
    ("change", "clause"),
    [
        (lambda d: d["model"].update(sliding_window=[8]), "2 layers, but 1 entries in sliding_window"),
        (lambda d: d["model"].update(n_heads=3, n_kv_heads=2), "3 heads, expected a multiple of its 2 n_kv_heads"),
        (lambda d: d["model"].update(norm_eps=0.0), "norm_eps 0.0"),
        (
            lambda d: d["model"].update(vocab_size=31),
            "has logits [1, 1, 32] float32 among its outputs, expected logits [1, 1, 31] float32",
        ),
        (lambda d: d["model"].update(head_dim=8), "expected past_key_values.0.key [2, 1, 16, 8]"),
        (lambda d: d["shape"].update(cache_len=17), "expected past_key_values.1.key [2, 1, 32, 4]"),
        (lambda d: d["model"].update(sliding_window=[8, 10]), "expected past_key_values.1.key [2, 1, 32, 4]"),
        (
            lambda d: d["shape"].update(slots=3),
            "has past_key_values.0.key [2, 1, 16, 4] float32 among its inputs, expected past_key_values.0.key [3, 1, ",
        ),
        (lambda d: d["shape"].update(prefill_chunks=[4, 8]), "the prefill chunks are [4, 8], expected at least one"),
        (lambda d: d["shape"].update(prefill_chunks=[8, 8, 4]), "the prefill chunks are [8, 8, 4]"),
        (lambda d: d["shape"].update(prefill_chunks=[]), "the prefill chunks are []"),
        (
            lambda d: d["shape"].update(step_rows=[2, 1]),
            "the rows of steps are [2, 1], expected 1 and perhaps more, each only once and the smallest first",
        ),
        (lambda d: d["shape"].update(step_rows=[1, 2, 2]), "the rows of steps are [1, 2, 2], expected 1 and"),
        (lambda d: d["shape"].update(step_rows=[2]), "the rows of steps are [2], expected 1 and"),
        (lambda d: d["shape"].update(step_rows=[]), "the rows of steps are [], expected 1 and"),
        (
            lambda d: d["shape"].update(step_rows=[1, 2**24 + 1]),
            "a call takes 16777217 tokens, expected at most 16777216",
        ),
        (
            lambda d: d["shape"].update(prefill_chunks=[2**24 + 1]),
            "a call takes 16777217 tokens, expected at most 16777216",
        ),
        (lambda d: d["shape"].update(step_rows=[1]), f"are {FUNCTIONS}, expected {FUNCTIONS[:-19]}]"),
        (lambda d: d["functions"].pop(), f"are {FUNCTIONS[:-19]}], expected {FUNCTIONS}"),
        (lambda d: d.update(functions=[]), f"are [], expected {FUNCTIONS}"),
        (lambda d: d["functions"].reverse(), f"expected {FUNCTIONS}"),
        (of_function(2, lambda function: function.update(name="decode")), "('decode', 1, 1), ('step_2', 2, 1)], exp"),
        (of_function(2, lambda function: function.update(tokens=2)), "('step_1', 1, 2), "),
        (of_function(3, lambda function: function.update(rows=1)), "('step_2', 1, 1)], expected"),
        (of_inputs(0, lambda inputs: inputs.pop()), "function prefill_8 has 7 inputs, expected 8"),
        (of_inputs(1, lambda inputs: inputs.pop(3)), "function prefill_4 has 7 inputs, expected 8"),
        (
            of_inputs(2, lambda inputs: inputs.insert(3, {"name": "column", "shape": [1], "dtype": "int64"})),
            "function step_1 has 8 inputs, expected 7",
        ),
        (
            of_inputs(3, lambda inputs: inputs[2].update(shape=[1])),
            "function step_2 has slots [1] int64 among its inputs, expected slots [2] int64",
        ),
        (
            of_inputs(1, lambda inputs: inputs[3].update(name="slots")),
            "function prefill_4 has slots [1] int64 among its inputs, expected column [1] int64",
        ),
        (
            of_inputs(0, lambda inputs: inputs[4].update(dtype="int8")),
            "function prefill_8 has 8 inputs, expected 12",
        ),
        (
            of_inputs(0, lambda inputs: inputs[4].update(dtype="uint16")),
            "the cache past_key_values.0.key is uint16, expected float32, float16, float8_e4m3fn, int8, uint8",
        ),
        (
            of_inputs(0, lambda inputs: inputs[4].update(dtype="uint8")),
            "is uint8, expected that only with a head_dim that is a multiple of 32, found 4",
        ),
        (
            of_inputs(0, lambda inputs: inputs[5].update(dtype="float16")),
            "past_key_values.0.value [2, 1, 16, 4] float16 among its inputs",
        ),
        (
            of_function(0, lambda function: function["signature"]["outputs"].append({**LOGITS, "name": "more"})),
            "the function prefill_8 has 2 outputs, expected 1",
        ),
        (lambda d: d["weights"].append(d["weights"][0]), "a weight is listed twice"),
        (lambda d: d["weights"][1].update(name="layers.2.attention.wqkv.weight"), "but layer 0 has no weights"),
        (lambda d: d["weights"][3].update(name="layers.7.attention.wo.weight"), "but layer 7 has weights too"),
        (lambda d: d["weights"][1].update(layout="zigzag"), "layers.0.attention.wqkv.weight has layout 'zigzag'"),
        (lambda d: d["weights"][1].update(layout="panels_8"), "layers.0.attention.wqkv.weight has shape [1, 8, 16]"),
        (lambda d: d["weights"][0].update(shape=[8, 32]), "tok_embeddings.weight has shape [8, 32], expected [32, 8]"),
        (lambda d: d["tokenizer"].update(eos_ids=[2, 32]), "special id 32, expected 0 to 31"),
        (lambda d: d["tokenizer"].update(bos_id=-1), "special id -1, expected 0 to 31"),
        (lambda d: d["tokenizer"].update(bos_id=None), "add_bos but no bos_id"),
        (lambda d: d["target"].update(arch=["sm_80"]), "the target llvm lists the architectures sm_80"),
        (lambda d: d["target"].update(kind="cuda"), "the target cuda lists no architecture"),
        (lambda d: d["target"].update(kind="cuda", arch=["80"]), "the target lists the architecture '80'"),
        (
            lambda d: d["target"].update(better_levels=[{"cpu": "this-machine", "features": []}]),
            "the target lists the cpu level this-machine 2 times, expected once",
        ),
        (
            lambda d: d["target"].update(better_levels=[{"cpu": "znver9", "features": []}]),
            "the file library.znver9.so is not listed, but an artifact needs it",
        ),
        (
            lambda d: d["target"].update(better_levels=[{"cpu": "../znver9", "features": []}]),
            "the file library.../znver9.so is not listed, but an artifact needs it",
        ),
    ],
)
def test_disagreement(folder, change, clause):
    edit(folder, change)
    assert clause in refusal(folder)


def test_wrong_target(folder):
    edit(folder, lambda data: data["target"].update(kind="tpu"))
    assert "Invalid enum value 'tpu' - at `$.target.kind`" in refusal(folder)


# --- rule 8: the listing ---


@pytest.mark.parametrize("name", ["library.so", "weights.safetensors", "tokenizer.json", "chat_template.jinja"])
def test_missing_file(folder, name):
    (folder / name).unlink()
    assert f"{name} is missing" in refusal(folder)


@pytest.mark.parametrize("name", ["code.py", ".hidden", "library.so.bak"])
def test_extra_file(folder, name):
    (folder / name).write_text("")
    assert f"{name} is not listed in manifest.json" in refusal(folder)


@pytest.mark.parametrize("name", ["library.so", "weights.safetensors", "tokenizer.json"])
def test_truncated(folder, name):
    size = (folder / name).stat().st_size
    os.truncate(folder / name, size - 1)
    assert f"{name} has {size - 1} bytes, expected {size}" in refusal(folder)


def test_appended(folder):
    with (folder / "library.so").open("ab") as file:
        file.write(b"x")
    assert "library.so has 20 bytes, expected 19" in refusal(folder)


# --- rule 9: the machine ---


@pytest.mark.parametrize("kind", ["llvm", "cuda"])
def test_other_machine(folder, kind):
    """The level named in the message has a flag that no processor has.

    The host code of a CUDA artifact needs that flag as well.
    """
    arch = ["sm_80"] if kind == "cuda" else []
    edit(
        folder,
        lambda data: data["target"].update(kind=kind, arch=arch, cpu="x86-64-v9", cpu_features=["sse2", "avx9000"]),
    )
    assert "this machine lacks avx9000, which the artifact's cpu level x86-64-v9 needs" in refusal(folder)
    assert Artifact.open(folder, for_this_machine=False).manifest.target.cpu == "x86-64-v9"


def test_write_for_another_machine(tmp_path):
    target = msgspec.structs.replace(TARGET, cpu="x86-64-v9", cpu_features=("sse2", "avx9000"))
    with pytest.raises(UserError, match="avx9000"):
        write_artifact(tmp_path / "x", fill, lambda files: manifest_of(files, target=target))
    assert list(tmp_path.iterdir()) == []
    write_artifact(tmp_path / "x", fill, lambda files: manifest_of(files, target=target), for_this_machine=False)
    assert (tmp_path / "x" / "manifest.json").is_file()


def test_a_machine_without_a_better_level(tmp_path):
    """It has the lowest, which is enough."""
    better = CpuLevel(cpu="x86-64-v9", features=("sse2", "avx9000"))
    target = msgspec.structs.replace(TARGET, better_levels=(better,))

    def with_both(folder):
        fill(folder)
        (folder / "library.x86-64-v9.so").write_bytes(b"better")

    artifact = write_artifact(tmp_path / "x", with_both, lambda files: manifest_of(files, target=target))
    assert artifact.sealed_library(better).read_bytes() == b"better"
    assert artifact.sealed_library(target.levels[0]).read_bytes() == LIBRARY
    write_artifact(tmp_path / "x", with_both, lambda files: manifest_of(files, target=target))  # replaces it
    (tmp_path / "x" / "library.x86-64-v9.so").write_bytes(b"worse!")
    assert "library.x86-64-v9.so is damaged" in refusal(tmp_path / "x")


# --- rule 10: the header of the weights ---


def weights_refusal(tmp_path, weights):
    with pytest.raises(UserError) as error:
        write_artifact(tmp_path / "x", lambda folder: fill(folder, weights), manifest_of)
    return str(error.value)


def replaced(**changes):
    return (msgspec.structs.replace(WEIGHTS[0], **changes), *WEIGHTS[1:])


@pytest.mark.parametrize(
    ("weights", "clause"),
    [
        (WEIGHTS[:-1], "holds 3 tensors, but manifest.json lists 4"),
        ((WEIGHTS[1], WEIGHTS[0], *WEIGHTS[2:]), "tensor 0 is layers.0.attention.wqkv.weight"),
        (
            replaced(name="tok_embeddings"),
            "tensor 0 is tok_embeddings float32 [32, 8], but manifest.json lists tok_embeddings.weight",
        ),
        (replaced(shape=(8, 32)), "tensor 0 is tok_embeddings.weight float32 [8, 32]"),
        (replaced(dtype="int32"), "tensor 0 is tok_embeddings.weight int32 [32, 8]"),
    ],
)
def test_weights_that_the_manifest_does_not_list(tmp_path, weights, clause):
    assert clause in weights_refusal(tmp_path, weights)


def test_unaligned_weights(tmp_path):
    """Eight more spaces after the header: the safetensors package may write them, but they rule out mapping."""

    def fill_unaligned(folder):
        fill(folder)
        path = folder / "weights.safetensors"
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        path.write_bytes((length + 8).to_bytes(8, "little") + data[8 : 8 + length] + b" " * 8 + data[8 + length :])
        assert set(safetensors.numpy.load_file(path)) >= {w.name for w in WEIGHTS}

    with pytest.raises(UserError, match=r"tok_embeddings\.weight begins at byte \d+, expected a multiple of 64"):
        write_artifact(tmp_path / "x", fill_unaligned, manifest_of)


# --- rule 11: contents ---


@pytest.mark.parametrize("name", ["library.so", "tokenizer.json", "chat_template.jinja"])
def test_flipped_bit(folder, name):
    flip(folder / name, 1)
    assert f"{name} is damaged" in refusal(folder)


@pytest.mark.parametrize("offset", [-1, -500])
def test_flipped_bit_in_weights(folder, offset):
    flip(folder / "weights.safetensors", offset)
    assert "weights.safetensors is damaged: the file has SHA-256" in refusal(folder)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """An artifact whose weights take a little more than two blocks."""
    weights = (*WEIGHTS, WeightSpec(name="big", shape=(2 * BLOCK_BYTES + 100,), dtype="int8", layout="row_major"))
    folder = tmp_path_factory.mktemp("large") / "x"
    return write_artifact(folder, lambda f: fill(f, weights), lambda files: manifest_of(files, weights=weights)).folder


def test_block_sums_are_plain_sums_of_the_blocks(large):
    listed = next(f for f in Artifact.open(large).manifest.files if f.path == "weights.safetensors")
    data = (large / "weights.safetensors").read_bytes()
    assert listed.sha256 == hashlib.sha256(data).hexdigest()
    assert listed.blocks == tuple(hashlib.sha256(data[i : i + 2**24]).hexdigest() for i in range(0, len(data), 2**24))
    assert len(listed.blocks) == 3


@pytest.mark.parametrize(("offset", "block"), [(2**24 - 1, 1), (2**24, 2), (-1, 3)])
def test_flipped_bit_names_its_block(large, offset, block):
    flip(large / "weights.safetensors", offset)
    try:
        assert f"weights.safetensors is damaged: block {block} of 3" in refusal(large)
    finally:
        flip(large / "weights.safetensors", offset)


def test_wrong_block_sum(large):
    data = (large / "manifest.json").read_text()
    listed = entry(json.loads(data), "weights.safetensors")
    try:
        (large / "manifest.json").write_text(data.replace(listed["blocks"][1], "0" * 64))
        assert "block 2 of 3 (from byte 16777216)" in refusal(large)
    finally:
        (large / "manifest.json").write_text(data)


# --- writing ---


def siblings(folder):
    return sorted(path.name for path in folder.parent.iterdir())


def test_writing_replaces_the_old_artifact(folder):
    mapped = Artifact.open(folder).weights()
    write_artifact(folder, fill, lambda files: manifest_of(files, name="second"))
    assert Artifact.open(folder).manifest.name == "second"
    assert siblings(folder) == ["tiny"]
    # the old file is still mapped
    np.testing.assert_array_equal(mapped["tok_embeddings.weight"], arrays()["tok_embeddings.weight"])


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failure_while_filling_leaves_the_old_artifact(folder, failure):
    def fail(fresh):
        fill(fresh)
        raise failure

    with pytest.raises(type(failure)):
        write_artifact(folder, fail, lambda files: manifest_of(files, name="second"))
    assert siblings(folder) == ["tiny"]
    assert Artifact.open(folder).manifest.name == "tiny"


def test_failed_rename_brings_the_old_artifact_back(folder, monkeypatch):
    rename = Path.rename

    def fail_once(self, target):
        if self.suffix == ".tmp":
            raise PermissionError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(PermissionError):
        write_artifact(folder, fill, lambda files: manifest_of(files, name="second"))
    assert siblings(folder) == ["tiny"]
    assert Artifact.open(folder).manifest.name == "tiny"


def test_artifact_that_does_not_open_is_not_put_in_place(folder):
    with pytest.raises(UserError, match="nothing in the manifest uses it"):
        write_artifact(folder, fill, lambda files: manifest_of(files, tokenizer=None))
    assert siblings(folder) == ["tiny"]
    assert Artifact.open(folder).manifest.tokenizer == TOKENIZER


def test_another_run_in_between(folder, monkeypatch):
    """Both runs finish, and the artifact of the later one is there, whole."""
    rename, raced = Path.rename, []

    def race(self, target):
        if self.suffix == ".tmp" and not raced:
            raced.append(True)
            target.mkdir()
            fill(target)  # the other run's artifact
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", race)
    write_artifact(folder, fill, lambda files: manifest_of(files, name="second"))
    assert raced
    assert Artifact.open(folder).manifest.name == "second"
    assert siblings(folder) == ["tiny"]


KILLED = """
import os, signal, sys
from pathlib import Path
from runtime.artifact.folder import write_artifact

def fill(folder):
    (folder / "library.so").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)

write_artifact(Path(sys.argv[1]), fill, lambda files: None)
"""


@pytest.mark.parametrize("first", [True, False])
def test_killed_writer_leaves_nothing_half(tmp_path, first):
    """A killed writer leaves either no artifact or the old one; the next writer removes its leftovers."""
    folder = tmp_path / "tiny"
    if not first:
        write_artifact(folder, fill, manifest_of)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(folder)], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    left = [name for name in siblings(folder) if name != "tiny"]
    assert len(left) == 1
    assert left[0].endswith(".tmp")
    if first:
        assert "there is no artifact folder" in refusal(folder)
    else:
        assert Artifact.open(folder).manifest.name == "tiny"
    write_artifact(folder, fill, manifest_of)
    assert siblings(folder) == ["tiny"]


@pytest.fixture
def dead_pid():
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_writer_killed_between_its_renames(folder, dead_pid):
    """The old artifact comes back even if the next writer fails."""
    folder.rename(folder.with_name(f".tiny.{dead_pid}.old"))

    def fail(_fresh):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_artifact(folder, fail, manifest_of)
    assert Artifact.open(folder).manifest.name == "tiny"


def test_leftovers_of_living_writers_and_of_others_stay(folder, dead_pid):
    living, other = folder.with_name(f".tiny.{os.getppid()}.tmp"), folder.with_name(f".tiny2.{dead_pid}.tmp")
    stale = [folder.with_name(f".tiny.{dead_pid}.old"), folder.with_name(f".tiny.{os.getpid()}.tmp")]
    for path in (living, other, *stale):
        path.mkdir()
    stale_manifest = folder.with_name(f".tiny.{dead_pid}.manifest")
    stale_manifest.write_text("{")
    write_artifact(folder, fill, manifest_of)
    assert siblings(folder) == sorted([living.name, other.name, "tiny"])


def test_other_folders_are_never_replaced(tmp_path):
    precious = tmp_path / "photos"
    precious.mkdir()
    (precious / "cat.jpg").write_text("meow")
    with pytest.raises(UserError, match="photos exists and is not an artifact"):
        write_artifact(precious, fill, manifest_of)
    with pytest.raises(UserError, match=r"cat\.jpg exists and is not an artifact"):
        write_artifact(precious / "cat.jpg", fill, manifest_of)
    assert siblings(precious / "cat.jpg") == ["cat.jpg"]


def test_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="x cannot be written: File exists"):
        write_artifact(tmp_path / "file" / "x", fill, manifest_of)


# --- the manifest alone ---

ROW = ParityRow(rung="r", compared="a with b", max_abs=0.0, max_rel=0.0, top1_agreement=1.0, bound=1e-3, passed=True)


def test_replace_manifest(folder):
    before = Artifact.open(folder).manifest
    replace_manifest(folder, msgspec.structs.replace(before, parity=(ROW,)))
    assert Artifact.open(folder).manifest == msgspec.structs.replace(before, parity=(ROW,))
    assert siblings(folder) == ["tiny"]


def test_replace_manifest_keeps_the_old_one_on_failure(folder, monkeypatch):
    before = Artifact.open(folder).manifest

    def fail(_self, _target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        replace_manifest(folder, msgspec.structs.replace(before, parity=(ROW,)))
    assert Artifact.open(folder).manifest == before
    assert siblings(folder) == ["tiny"]


def test_replace_manifest_refuses_other_files(folder):
    before = Artifact.open(folder).manifest
    with pytest.raises(AssertionError, match="needs write_artifact"):
        replace_manifest(folder, msgspec.structs.replace(before, files=before.files[1:]))


# --- nothing is loaded ---


def test_opening_loads_no_library_and_no_tvm(folder):
    """In a fresh interpreter, neither the artifact's library nor TVM is mapped after a successful open."""
    code = (
        "import sys; from pathlib import Path; from runtime.artifact.folder import Artifact; "
        "Artifact.open(Path(sys.argv[1]));"
        "maps = Path('/proc/self/maps').read_text(); assert 'library.so' not in maps and 'tvm' not in maps;"
        "assert not {'tvm', 'tvm_ffi', 'torch', 'onnx', 'transformers', 'ctypes.util'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
