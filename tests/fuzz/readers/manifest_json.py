"""An artifact's manifest, as a box reads it; one that is accepted must agree with the artifact in every number."""

import json
import math
from functools import partial
from pathlib import Path

import msgspec
import numpy as np

from runtime.artifact.folder import Artifact, write_artifact
from runtime.artifact.manifest import (
    SCHEMA_VERSION,
    FileEntry,
    Manifest,
    ModelConfig,
    Quantization,
    Shape,
    TargetSpec,
    TokenizerSpec,
    WeightSpec,
    to_json,
)
from runtime.artifact.signatures import functions_of
from runtime.artifact.tensor_file import TensorFileWriter
from tests.fuzz.mutations import spoil_json
from tests.fuzz.reader import Reader, demand, place

MODEL = ModelConfig(
    family="mistral",
    dim=8,
    hidden_dim=16,
    n_layers=1,
    n_heads=2,
    n_kv_heads=1,
    head_dim=4,
    vocab_size=32,
    norm_eps=1e-5,
    rope_theta=1e4,
    sliding_window=(8,),
    tied_embeddings=True,
)
SHAPE = Shape(slots=2, step_rows=(1, 2), prefill_chunks=(8, 4), cache_len=16)
WEIGHTS = (
    WeightSpec(name="tok_embeddings.weight", shape=(32, 8), dtype="float32", layout="row_major"),
    WeightSpec(name="layers.0.attention.wqkv.weight", shape=(1, 8, 16), dtype="float32", layout="panels_16"),
)
TOKENIZER = TokenizerSpec(
    kind="tokenizer.json", file="tokenizer.json", bos_id=1, add_bos=True, eos_ids=(2, 3), chat_template="template.jinja"
)


def open_reader(folder: Path) -> Reader:
    artifact = write_artifact(folder / "artifact", fill, manifest_of, for_this_machine=False).folder
    data = (artifact / "manifest.json").read_bytes()
    large = json.loads(data)
    large["model"]["n_layers"] = large["shape"]["slots"] = 2**40
    return Reader([data], spoil_json, partial(check, artifact), {"2^40 layers": json.dumps(large).encode()})


def fill(folder: Path) -> None:
    (folder / "library.so").write_bytes(b"this is no library")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "template.jinja").write_text("{{ messages }}")
    with TensorFileWriter(folder / "weights.safetensors", WEIGHTS) as writer:
        writer.leave_zero()


def manifest_of(files: tuple[FileEntry, ...]) -> Manifest:
    return Manifest(
        schema_version=SCHEMA_VERSION,
        name="tiny",
        build_key="k",
        model=MODEL,
        shape=SHAPE,
        quantization=Quantization(scheme="none"),
        target=TargetSpec(kind="llvm", dtype="fp32", cpu="x86-64-v3", cpu_features=("avx2",)),
        functions=functions_of(MODEL, SHAPE, "float32"),
        weights=WEIGHTS,
        tokenizer=TOKENIZER,
        overrides={"rope_theta": 1e4},
        tools={"apache-tvm": "0"},
        files=files,
    )


def check(artifact: Path, data: bytes) -> None:
    place(artifact / "manifest.json", data)
    opened = Artifact.open(artifact, for_this_machine=False)
    manifest = opened.manifest
    demand(msgspec.json.decode(to_json(manifest), type=Manifest) == manifest, "it does not survive being written")
    model, tokenizer = manifest.model, manifest.tokenizer
    demand(math.isfinite(model.norm_eps) and math.isfinite(model.rope_theta), "the model has infinite numbers")
    demand(len(model.sliding_window) == model.n_layers, "the model has other windows than layers")
    demand(
        manifest.functions == functions_of(model, manifest.shape, manifest.caches[0].dtype),
        "other functions",
    )
    ids = (*tokenizer.eos_ids, tokenizer.bos_id, tokenizer.end_id) if tokenizer else ()
    demand(all(i is None or 0 <= i < model.vocab_size for i in ids), "the tokenizer has ids outside the vocabulary")
    names = {entry.path for entry in manifest.files} | {"manifest.json"}
    demand(names == {path.name for path in artifact.iterdir()}, "it lists other files than there are")
    weights = opened.weights()
    for spec in manifest.weights:
        demand(weights[spec.name].shape == spec.shape, "a weight has another shape")
        demand(bool(np.all(weights[spec.name] == 0)), "a weight has other numbers")
