import json
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from mistral_common import __file__ as mistral_common_file
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    MistralConfig,
    MistralForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
)

from export.checkpoints import checkpoint as checkpoint_module
from export.checkpoints.checkpoint import half_split_rows, open_checkpoint
from export.conversion import convert as convert_module
from export.conversion.convert import convert, main, other_form
from export.conversion.target_formats import huggingface_config, huggingface_tensors, mistral_params, neighbour_rows
from runtime.errors import UserError
from tests.helpers.raw_mistral import MOE, PARAMS, raw_logits, raw_of_transformers, raw_tensors, write_raw
from tests.helpers.reference import bound, difference
from tests.helpers.tiny import DEFAULTS, write_tiny_mistral

MISTRAL_COMMON = Path(mistral_common_file).parent / "data"
TOKENS = 19
IDS = np.random.default_rng(0).integers(0, PARAMS["vocab_size"], TOKENS)

FORMS = {
    "window": ({"sliding_window": 5}, "MistralForCausalLM"),
    "no window": ({}, "MistralForCausalLM"),
    "other sizes and theta": (
        {"head_dim": 10, "n_heads": 6, "n_kv_heads": 3, "rope_theta": 1e6, "norm_eps": 1e-3, "max_seq_len": 99},
        "MistralForCausalLM",
    ),
    "tied": ({"tied_embeddings": True}, "MistralForCausalLM"),
    "interleaved windows": ({"n_layers": 4, "_sliding_window": [None, 6, 6, 6]}, "MinistralForCausalLM"),
    "mixture": ({"moe": MOE}, "MixtralForCausalLM"),
    "mixture with a window": ({"moe": MOE, "sliding_window": 5}, "MixtralForCausalLM"),
}


def raw(folder: Path, changes: dict, **options) -> tuple[dict, dict[str, torch.Tensor]]:
    """Write a raw checkpoint into `folder`; return its params and tensors."""
    params = PARAMS | changes
    tensors = raw_tensors(params)
    if params.get("tied_embeddings"):
        del tensors["output.weight"]
    write_raw(folder, params, tensors, **options)
    return params, tensors


@pytest.mark.parametrize("name", FORMS)
def test_transformers_loads_what_the_definition_computes(tmp_path, name):
    changes, expected_class = FORMS[name]
    params, tensors = raw(tmp_path / "raw", changes, pth_files=2)
    convert(tmp_path / "raw", tmp_path / "hf", "huggingface")
    theirs, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", attn_implementation="eager", output_loading_info=True
    )
    assert type(theirs).__name__ == expected_class == theirs.config.architectures[0]
    assert not any(loading.values())
    with torch.no_grad():
        found = theirs(torch.from_numpy(IDS)[None]).logits[0].numpy()
    ours = open_checkpoint(tmp_path / "raw", "auto", {})
    assert difference(found, raw_logits(params, tensors, IDS)) < bound(ours.model, TOKENS)
    again = open_checkpoint(tmp_path / "hf", "auto", {})
    assert again.model.sliding_window == ours.model.sliding_window
    assert again.names() == ours.names()
    assert all(np.array_equal(again.tensor(name), ours.tensor(name)) for name in ours.names())


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every safetensors file in a folder."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_there_and_back_is_bit_for_bit(tmp_path, dtype):
    # sizes that no alignment divides
    write_tiny_mistral(tmp_path / "hf", dtype=dtype, head_dim=10, vocab_size=301, intermediate_size=45)
    convert(tmp_path / "hf", tmp_path / "raw", "mistral")
    before = stored(tmp_path / "hf")
    assert_same_bits(stored(tmp_path / "raw"), raw_of_transformers(before, 4, 2))
    assert sorted(path.name for path in (tmp_path / "raw").iterdir()) == ["consolidated.safetensors", "params.json"]
    convert(tmp_path / "raw", tmp_path / "again", "huggingface")
    assert_same_bits(stored(tmp_path / "again"), before)
    assert open_checkpoint(tmp_path / "again", "auto", {}).model == open_checkpoint(tmp_path / "hf", "auto", {}).model
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "again").dtype == dtype


def test_mixture_there_and_back(tmp_path):
    config = MixtralConfig(
        **{**DEFAULTS, "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": None, "rope_theta": 1e6}
    )
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "raw", "mistral")
    params = json.loads((tmp_path / "raw" / "params.json").read_text())
    assert params["moe"] == {"num_experts": 3, "num_experts_per_tok": 2}
    assert "sliding_window" not in params
    assert stored(tmp_path / "raw")["layers.1.feed_forward.experts.2.w3.weight"].shape == (96, 64)
    convert(tmp_path / "raw", tmp_path / "again", "huggingface")
    assert_same_bits(stored(tmp_path / "again"), stored(tmp_path / "hf"))
    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("hf", "again"))
    assert_same_bits(after, before)


def test_dtypes_stay_apart(tmp_path):
    params, tensors = raw(tmp_path / "raw", {"dim": 25})
    mixed = {
        name: tensor.bfloat16() if "wk" in name or "ffn_norm" in name else tensor for name, tensor in tensors.items()
    }
    write_raw(tmp_path / "raw", params, mixed)
    convert(tmp_path / "raw", tmp_path / "hf", "huggingface")
    assert stored(tmp_path / "hf")["model.layers.0.self_attn.k_proj.weight"].dtype == torch.bfloat16
    data = (tmp_path / "hf" / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    header.pop("__metadata__")
    assert all(entry["data_offsets"][0] % {"F32": 4, "BF16": 2}[entry["dtype"]] == 0 for entry in header.values())
    convert(tmp_path / "hf", tmp_path / "again", "mistral")
    assert_same_bits(stored(tmp_path / "again"), mixed)


def test_shards(tmp_path):
    _, tensors = raw(tmp_path / "raw", {})
    convert(tmp_path / "raw", tmp_path / "whole", "huggingface")
    convert(tmp_path / "raw", tmp_path / "sharded", "huggingface", shard_bytes=15_000)
    files = sorted(path.name for path in (tmp_path / "sharded").glob("*.safetensors"))
    assert len(files) > 2
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert all(sum(t.nbytes for t in load_file(tmp_path / "sharded" / file).values()) <= 15_000 for file in files)
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(t.nbytes for t in tensors.values())}
    assert_same_bits(stored(tmp_path / "sharded"), stored(tmp_path / "whole"))
    assert_same_bits(
        AutoModelForCausalLM.from_pretrained(tmp_path / "sharded").state_dict(), stored(tmp_path / "whole")
    )
    assert (
        open_checkpoint(tmp_path / "sharded", "auto", {}).names()
        == open_checkpoint(tmp_path / "whole", "auto", {}).names()
    )
    convert(tmp_path / "sharded", tmp_path / "again", "mistral")
    assert_same_bits(stored(tmp_path / "again"), tensors)


def test_a_tensor_larger_than_a_shard_has_its_own(tmp_path):
    raw(tmp_path / "raw", {})
    convert(tmp_path / "raw", tmp_path / "hf", "huggingface", shard_bytes=1)
    assert [len(load_file(path)) for path in (tmp_path / "hf").glob("*.safetensors")] == [1] * 21


def test_files_are_plain_safetensors(tmp_path):
    raw(tmp_path / "raw", {})
    convert(tmp_path / "raw", tmp_path / "hf", "huggingface")
    with safe_open(tmp_path / "hf" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_params_say_windows_shortly(tmp_path):
    write_tiny_mistral(tmp_path / "hf", num_hidden_layers=4)
    model = open_checkpoint(tmp_path / "hf", "auto", {}).model
    assert mistral_params(model) == {
        "dim": 64, "hidden_dim": 96, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "vocab_size": 320,
        "norm_eps": 1e-5, "rope_theta": 1e4, "tied_embeddings": False, "max_seq_len": 512, "sliding_window": 32,
    }  # fmt: skip
    interleaved = open_checkpoint(tmp_path / "hf", "auto", {"sliding_window": [8, None]}).model
    assert mistral_params(interleaved)["sliding_window"] == [8, None]
    assert huggingface_config(interleaved)["layer_types"] == ["sliding_attention", "full_attention"] * 2
    assert huggingface_config(interleaved)["sliding_window"] == 8


def test_rows_change_places_and_back():
    rows = np.random.default_rng(0).standard_normal((24, 5))
    assert np.array_equal(half_split_rows(neighbour_rows(rows, 4), 4), rows)
    assert neighbour_rows(np.arange(6)[:, None], 1)[:, 0].tolist() == [0, 3, 1, 4, 2, 5]


def test_tensors_for_others(tmp_path):
    """The parity ladder builds its reference from these: names and arrays, straight from the raw files."""
    raw(tmp_path / "raw", {})
    convert(tmp_path / "raw", tmp_path / "hf", "huggingface")
    tensors = huggingface_tensors(open_checkpoint(tmp_path / "raw", "auto", {}))
    assert_same_bits(
        {name: torch.from_numpy(tensors.tensor(name)) for name in tensors.names()}, stored(tmp_path / "hf")
    )


def test_sentencepiece_tokenizer(tmp_path):
    raw(tmp_path / "raw", {})
    shutil.copy(MISTRAL_COMMON / "mistral_instruct_tokenizer_240323.model.v3", tmp_path / "raw" / "tokenizer.model.v3")
    notes = convert(tmp_path / "raw", tmp_path / "hf", "huggingface")
    assert len(notes) == 1
    assert "has no chat template, so none was written" in notes[0]
    data = (tmp_path / "raw" / "tokenizer.model.v3").read_bytes()
    assert {path.name: path.read_bytes() for path in (tmp_path / "hf").glob("tokenizer.model*")} == {
        "tokenizer.model": data,
        "tokenizer.model.v3": data,
    }
    generation = GenerationConfig.from_pretrained(tmp_path / "hf")
    assert (generation.bos_token_id, generation.eos_token_id) == (1, 2)
    ours = open_checkpoint(tmp_path / "hf", "auto", {}).tokenizer
    assert (ours.kind, ours.data, ours.bos_id, ours.eos_ids) == ("sentencepiece", data, 1, (2,))
    assert convert(tmp_path / "hf", tmp_path / "again", "mistral") == ()
    assert (tmp_path / "again" / "tokenizer.model.v3").read_bytes() == data


def test_tekken_tokenizer(tmp_path):
    raw(tmp_path / "raw", {})
    file = json.loads((MISTRAL_COMMON / "tekken_240718.json").read_text())
    # converting the whole file takes long
    file["config"] |= {"default_vocab_size": 1500, "default_num_special_tokens": 1000}
    (tmp_path / "raw" / "tekken.json").write_text(json.dumps(file | {"vocab": file["vocab"][:500]}))
    convert(tmp_path / "raw", tmp_path / "hf", "huggingface")
    assert (tmp_path / "hf" / "tekken.json").read_bytes() == (tmp_path / "raw" / "tekken.json").read_bytes()
    ours = open_checkpoint(tmp_path / "hf", "auto", {}).tokenizer
    assert (ours.kind, ours.bos_id, ours.eos_ids) == ("tokenizer.json", 1, (2,))
    text = "Grüße aus Ääkköslä: 12345!"
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs.decode(theirs(text, add_special_tokens=False).input_ids) == text


def test_no_tokenizer_is_said(tmp_path):
    raw(tmp_path / "raw", {})
    assert convert(tmp_path / "raw", tmp_path / "hf", "huggingface") == (
        f"{tmp_path / 'raw'} has no tokenizer, so none was written",
    )
    assert not (tmp_path / "hf" / "generation_config.json").exists()
    write_tiny_mistral(tmp_path / "tiny")
    (note,) = convert(tmp_path / "tiny", tmp_path / "again", "mistral")
    assert "has no tokenizer for Mistral's own format" in note


def test_a_chat_template_that_is_lost_is_said(tmp_path):
    write_tiny_mistral(tmp_path / "tiny")
    shutil.copy(MISTRAL_COMMON / "tokenizer.model.v1", tmp_path / "tiny" / "tokenizer.model")
    (note,) = convert(tmp_path / "tiny", tmp_path / "raw", "mistral")
    assert note.startswith("Mistral's own format has no place for a chat template")


def test_notes_of_the_source_are_passed_on(tmp_path):
    write_tiny_mistral(tmp_path / "hf", num_hidden_layers=4)
    (tmp_path / "hf" / "params.json").write_text(json.dumps({"n_layers": 4, "_sliding_window": [None, 8]}))
    notes = convert(tmp_path / "hf", tmp_path / "raw", "mistral")
    assert "overrules config.json" in notes[0]
    assert json.loads((tmp_path / "raw" / "params.json").read_text())["sliding_window"] == [None, 8]


def test_one_block_of_rows_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_module, "BLOCK_ELEMENTS", 2**14)
    _, tensors = raw(tmp_path / "raw", {"vocab_size": 40_000})
    size = tensors["output.weight"].nbytes
    del tensors
    tracemalloc.start()
    convert(tmp_path / "raw", tmp_path / "hf", "huggingface")
    convert(tmp_path / "hf", tmp_path / "again", "mistral")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "again" / "consolidated.safetensors").stat().st_size > 2 * size
    assert peak < size / 2


def test_the_command_detects_the_direction(tmp_path, monkeypatch, capsys):
    raw(tmp_path / "raw", {})
    for source, target, mark in (("raw", "hf", "config.json"), ("hf", "again", "params.json")):
        monkeypatch.setattr(sys, "argv", ["convert", str(tmp_path / source), str(tmp_path / target)])
        assert main() == 0
        assert capsys.readouterr().out == f"{tmp_path / target}\n"
        assert (tmp_path / target / mark).is_file()
    assert_same_bits(stored(tmp_path / "again"), stored(tmp_path / "raw"))


def test_both_forms_in_one_folder(tmp_path, monkeypatch):
    raw(tmp_path / "raw", {})
    convert(tmp_path / "raw", tmp_path / "both", "huggingface")
    shutil.copytree(tmp_path / "raw", tmp_path / "both", dirs_exist_ok=True)
    with pytest.raises(
        UserError,
        match=r"has both config.json and params.json; choose the format to write with --to huggingface or --to mistral",
    ):
        other_form(tmp_path / "both")
    monkeypatch.setattr(sys, "argv", ["convert", str(tmp_path / "both"), str(tmp_path / "again"), "--to", "mistral"])
    assert main() == 0
    assert_same_bits(stored(tmp_path / "again"), stored(tmp_path / "raw"))
    with pytest.raises(UserError, match=r"has neither config.json nor params.json, expected a checkpoint's folder"):
        other_form(tmp_path)


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


INEXPRESSIBLE = {
    r"windows of \[4, 5\] positions, which no class of transformers supports, expected one": {"sliding_window": [4, 5]},
    "the layers of a mixture of experts differ in their window, which no class of transformers supports": {
        "moe": MOE,
        "sliding_window": [5, None],
    },
}


@pytest.mark.parametrize("message", INEXPRESSIBLE)
def test_windows_that_transformers_cannot_say(tmp_path, message):
    raw(tmp_path / "raw", INEXPRESSIBLE[message])
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "raw", tmp_path / "hf", "huggingface")
    assert not (tmp_path / "hf").exists()


def test_a_head_that_the_other_form_has_no_place_for(tmp_path):
    MistralForSequenceClassification(MistralConfig(**DEFAULTS, pad_token_id=0)).save_pretrained(tmp_path / "hf")
    with pytest.raises(UserError, match="has the head sequence_classification, which only its own format supports"):
        convert(tmp_path / "hf", tmp_path / "raw", "mistral")


def test_targets_that_are_taken(tmp_path):
    raw(tmp_path / "raw", {})
    with pytest.raises(UserError, match=r"raw is not empty, expected a new folder"):
        convert(tmp_path / "raw", tmp_path / "raw", "huggingface")
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UserError, match="file is not a folder, expected a new one"):
        convert(tmp_path / "raw", tmp_path / "file", "huggingface")
    with pytest.raises(UserError, match=r"cannot be written: .*File exists"):
        convert(tmp_path / "raw", tmp_path / "file" / "hf", "huggingface")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="link is not a folder"):
        convert(tmp_path / "raw", tmp_path / "link", "huggingface")
    assert (tmp_path / "file").read_text() == "kept"
    (tmp_path / "empty").mkdir()
    convert(tmp_path / "raw", tmp_path / "empty", "huggingface")
    assert (tmp_path / "empty" / "model.safetensors").is_file()


def test_a_disk_without_room(tmp_path, monkeypatch):
    raw(tmp_path / "raw", {})
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"has 0.0 GB free, but the checkpoint takes 0.0 GB; make room"):
        convert(tmp_path / "raw", tmp_path / "hf", "huggingface")
    assert not (tmp_path / "hf").exists()


def test_a_source_that_shrinks_leaves_nothing(tmp_path, monkeypatch):
    raw(tmp_path / "raw", {})
    write_file = convert_module.write_shards

    def shrink(*arguments):
        os.truncate(tmp_path / "raw" / "consolidated.safetensors", 9000)
        write_file(*arguments)

    monkeypatch.setattr(convert_module, "write_shards", shrink)
    with pytest.raises(UserError, match="has shrunk since it was opened"):
        convert(tmp_path / "raw", tmp_path / "hf", "huggingface")
    assert not (tmp_path / "hf").exists()
    assert leftovers(tmp_path) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from export.conversion import convert
inner = convert.write_shards
def write(folder, stem, tensors, shard_bytes, advance):
    written = []
    def counted(nbytes):
        written.append(nbytes)
        if len(written) == 9:
            os.kill(os.getpid(), signal.SIGKILL)
    inner(folder, stem, tensors, shard_bytes, counted)
convert.write_shards = write
convert.convert(Path(sys.argv[1]), Path(sys.argv[2]), "huggingface")
"""


def test_a_killed_run_leaves_no_half_folder(tmp_path):
    raw(tmp_path / "raw", {})
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "raw", tmp_path / "hf"], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not (tmp_path / "hf").exists()
    assert len(leftovers(tmp_path)) == 1
    running = tmp_path / f".hf.convert-{os.getppid()}"  # as if another process were working on it
    running.mkdir()
    convert(tmp_path / "raw", tmp_path / "hf", "huggingface")
    assert leftovers(tmp_path) == [running.name]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").config.hidden_size == PARAMS["dim"]


@pytest.mark.parametrize("form", ["mistral", "huggingface"])
def test_a_bad_source_is_refused_before_anything_is_written(tmp_path, form):
    write_tiny_mistral(tmp_path / "huggingface")
    raw(tmp_path / "mistral", {})
    (path,) = (tmp_path / form).glob("*.safetensors")
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if "norm.weight" not in name}, path, {"format": "pt"})
    with pytest.raises(UserError, match="lacks the tensor"):
        convert(tmp_path / form, tmp_path / "out", {"mistral": "huggingface", "huggingface": "mistral"}[form])
    assert not (tmp_path / "out").exists()
