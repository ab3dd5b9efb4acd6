"""The real model, end to end: greedy tokens at fp32 equal those of transformers with the same weights; int8 costs under 1 % perplexity."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from build.tools.quality import measure, text
from export.checkpoints.checkpoint import open_checkpoint
from export.fetch import DOWNLOADS, fetch
from export.proof.reference_model import load_reference
from export.stage import ROOT
from runtime.decoding.sampler import Sampler, SamplingOptions
from runtime.engines.engine import Engine
from runtime.generate import generate
from runtime.text.tokenizer import open_tokenizer
from tests.helpers.shipped import OWN_LIMIT, PYTHON, box_environment, install, own_bytes, unpack

pytestmark = pytest.mark.slow

HOST = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
NEW_TOKENS = 64
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):",
    "Water boils at",
    "The three primary colours are",
    "In 1969, the first",
    "My favourite recipe begins with two eggs and",
    "Question: What is 12 times 12? Answer:",
    "Das Wetter ist heute",
)
LONG_TOKENS = 700
WINDOW = 64
WINDOWED_LENGTHS = (63, 64, 65, 131, 300)


@pytest.fixture(scope="session")
def gguf() -> Path:
    return fetch(DOWNLOADS["demo"], ROOT / "out" / "downloads")


def compiled(folder: Path, gguf: Path, name: str, **changes: object) -> Path:
    """Compile SmolLM2 at fp32 in `folder`; one prefill graph keeps it short."""
    config = {
        "name": name,
        "frontend": {"checkpoint": str(gguf), "type": "gguf", "overrides": changes.pop("overrides", {})},
        "shape": {"prefill_chunk": [128], "cache_len": 1024},
        "backend": {"target": "llvm", "dtype": "fp32"},
        **changes,
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    subprocess.run([sys.executable, "-m", "build", path.name], cwd=folder, env=HOST, check=True)
    return folder / "out" / name


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("smollm2")


@pytest.fixture(scope="module")
def fp32(folder, gguf) -> Path:
    return compiled(folder, gguf, "fp32")


@pytest.fixture(scope="module")
def windowed(folder, gguf) -> Path:
    return compiled(folder, gguf, "windowed", overrides={"sliding_window": WINDOW})


@pytest.fixture(scope="module")
def int8(folder, gguf) -> Path:
    return compiled(folder, gguf, "int8", quantize={"scheme": "int8"})


def ours(artifact: Path, prompts: list[list[int]]) -> list[list[int]]:
    engine = Engine.open(artifact)
    answers = []
    for ids in prompts:
        engine.reset()
        steps = generate(engine, ids, Sampler(SamplingOptions()), max_tokens=NEW_TOKENS, eos_ids=())
        answers.append([step.token_id for step in steps])
    return answers


def theirs(gguf: Path, overrides: dict[str, object], prompts: list[list[int]]) -> list[list[int]]:
    model = load_reference(gguf, "gguf", open_checkpoint(gguf, "gguf", overrides).model)
    model.generation_config.eos_token_id = None
    answers = []
    for ids in prompts:
        given = torch.tensor([ids])
        made = model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
        )
        answers.append(made[0, len(ids) :].tolist())
    return answers


def long_text(artifact: Path, tokens: int) -> list[int]:
    manifest = Engine.open(artifact).manifest
    ids = open_tokenizer(manifest.tokenizer, artifact).encode(text())
    assert len(ids) >= tokens
    return ids[:tokens]


def test_greedy_tokens_equal_transformers_on_ten_prompts(fp32, gguf):
    tokenizer = open_tokenizer(Engine.open(fp32).manifest.tokenizer, fp32)
    prompts = [*(tokenizer.encode(text) for text in PROMPTS), long_text(fp32, LONG_TOKENS)]
    assert len(prompts) == 10
    found = ours(fp32, prompts)
    assert found == theirs(gguf, {}, prompts)
    assert "Paris" in tokenizer.decode(found[0])


def test_greedy_tokens_equal_transformers_across_the_window(windowed, gguf):
    prompts = [long_text(windowed, n) for n in WINDOWED_LENGTHS]
    assert ours(windowed, prompts) == theirs(gguf, {"sliding_window": WINDOW}, prompts)


def test_int8_costs_less_than_one_percent_of_perplexity(fp32, int8):
    baseline, quantized = measure({"none": fp32, "int8": int8})
    assert baseline.tokens > 900
    assert quantized.perplexity < 1.01 * baseline.perplexity
    assert quantized.weight_bytes < 0.27 * baseline.weight_bytes


def test_the_shipped_model_writes_the_same_text_in_an_empty_environment(int8, folder, tmp_path):
    """No network, no torch, no onnx, no compiler; and the golden prompts, computed by torch here, hold there."""
    subprocess.run(
        [sys.executable, "-m", "build.shipping.ship", "int8.yaml", "--pythons", PYTHON],
        cwd=folder,
        env=HOST,
        check=True,
    )
    box = unpack(folder / "out" / "int8.tar.zst", tmp_path)
    assert install(box).returncode == 0
    arguments = ["--prompt", PROMPTS[0], "--max-tokens", "24", "--json"]

    def run(python: Path | str, artifact: Path, *command: str) -> dict[str, object]:
        result = subprocess.run(
            [python, "-m", command[0], artifact, *command[1:]],
            cwd=box,
            env=box_environment(),
            check=False,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return json.loads(result.stdout)

    there = run(box / ".venv/bin/python", box / "artifact", "runtime.generate", *arguments)
    here = run(sys.executable, int8, "runtime.generate", *arguments)
    assert there["token_ids"] == here["token_ids"]
    assert "Paris" in there["text"]
    checks = run(box / ".venv/bin/python", box / "artifact", "runtime.verify", "--json")["checks"]
    assert sum("golden prompt" in check["check"] for check in checks) == 2
    assert own_bytes(box) <= OWN_LIMIT
