import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from mistral_common import __file__ as mistral_common_file
from safetensors.torch import load_file, save_file
from transformers import MistralConfig, MistralForCausalLM

from export.checkpoints.checkpoint import open_checkpoint
from export.checkpoints.tokenizers.chat import Chat
from export.proof.steppers import TorchStepper, checkpoint_weights, static_model
from runtime.errors import UserError
from tests.helpers.raw_mistral import MOE, PARAMS, raw_logits, raw_of_transformers, raw_tensors, write_raw
from tests.helpers.reference import bound, difference, logits
from tests.helpers.tiny import DEFAULTS, write_tiny_mistral

MISTRAL_COMMON = Path(mistral_common_file).parent / "data"
TOKENS = 19
IDS = np.random.default_rng(0).integers(0, PARAMS["vocab_size"], TOKENS).tolist()
# two orders of the same float64 sums: hundreds of operations of 2**-53 each, on values that cancel little
EXACT = 1e-12

FORMS = {
    "window": {"sliding_window": 5},
    "no window": {},
    "null window": {"sliding_window": None},
    "a window for each layer": {"n_layers": 3, "sliding_window": [None, 4, 7]},
    "a pattern of windows": {"n_layers": 4, "sliding_window": [4, None]},
    "hidden windows": {"n_layers": 4, "_sliding_window": [None, 6, 6, 6]},
    "hidden window": {"sliding_window": None, "_sliding_window": 6},
    "theta of a window": {"rope_theta": None, "sliding_window": 5},
    "theta without a window": {"rope_theta": None},
    "large theta": {"rope_theta": 1e8},
    "head_dim unlike dim / n_heads": {"head_dim": 10, "n_heads": 6, "n_kv_heads": 3},
    "head_dim as dim / n_heads": {"head_dim": 6},
    "every head its own keys": {"n_kv_heads": 4},
    "one head of keys": {"n_kv_heads": 1},
}
EXPECTED_THETA = {"theta of a window": 1e4, "theta without a window": 1e6, "large theta": 1e8}


def params_of(changes: dict) -> dict:
    """PARAMS with changes; `rope_theta: None` leaves it out."""
    return {key: value for key, value in (PARAMS | changes).items() if not (key == "rope_theta" and value is None)}


@pytest.mark.parametrize("name", FORMS)
def test_logits_are_those_of_the_definition(tmp_path, name):
    """The permuted, fused, half-split tensors mean what the complex rotation of neighbours made of the originals."""
    params = params_of(FORMS[name])
    tensors = raw_tensors(params)
    checkpoint = open_checkpoint(write_raw(tmp_path, params, tensors), "auto", {})
    assert checkpoint.model.rope_theta == EXPECTED_THETA.get(name, 1e4)
    found = logits(checkpoint.model, {name: checkpoint.tensor(name) for name in checkpoint.names()}, IDS)
    assert difference(found, raw_logits(params, tensors, IDS)) < EXACT


@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        ({"sliding_window": 5}, (5, 5, 5, 5)),
        ({"sliding_window": None}, (None,) * 4),
        ({"_sliding_window": [None, 6, 6, 6]}, (None, 6, 6, 6)),
        ({"sliding_window": [6, None]}, (6, None, 6, None)),
        ({"sliding_window": [6]}, (6, 6, 6, 6)),
    ],
)
def test_every_form_of_windows(tmp_path, windows, expected):
    params = params_of({"n_layers": 4, **windows})
    assert (
        open_checkpoint(write_raw(tmp_path, params, raw_tensors(params)), "mistral", {}).model.sliding_window
        == expected
    )


@pytest.mark.parametrize("windows", [{"sliding_window": 5}, {"n_layers": 2, "sliding_window": [5, None]}])
def test_mixture(tmp_path, windows):
    """The static model itself is compared, since the reference in tests/helpers/reference.py is dense.

    It computes in float32, hence its bound.
    """
    params = params_of({"moe": MOE, **windows})
    tensors = raw_tensors(params)
    checkpoint = open_checkpoint(write_raw(tmp_path, params, tensors), "auto", {})
    model = checkpoint.model
    assert (model.family, model.n_experts, model.experts_per_token) == ("mixtral", 4, 2)
    stacked = torch.cat([tensors[f"layers.1.feed_forward.experts.{e}.w{x}.weight"] for e in range(4) for x in "13"])
    assert np.array_equal(checkpoint.tensor("layers.1.feed_forward.experts.w13.weight"), stacked.numpy())
    stepper = TorchStepper(static_model(model, TOKENS, checkpoint_weights(checkpoint)), "float32")
    stepper.reset(1)
    found = stepper.step(np.array([IDS]), np.array([0]))
    assert difference(found[0], raw_logits(params, tensors, IDS)[-1]) < bound(model, TOKENS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("files", [0, 1, 3])
def test_every_container_gives_the_same_tensors(tmp_path, files, dtype):
    tensors = raw_tensors(PARAMS, dtype=dtype)
    checkpoint = open_checkpoint(write_raw(tmp_path, PARAMS, tensors, pth_files=files), "mistral", {})
    exact = raw_tensors(PARAMS)
    assert checkpoint.source_bytes == sum(t.nbytes for t in tensors.values())
    assert {str(checkpoint.tensor(name).dtype) for name in checkpoint.names()} == {str(dtype).removeprefix("torch.")}
    for ours, parts in (
        ("norm", ("norm",)),
        ("layers.1.feed_forward.w13", ("layers.1.feed_forward.w1", "layers.1.feed_forward.w3")),
    ):
        expected = torch.cat([exact[f"{part}.weight"].to(dtype) for part in parts]).float().numpy()
        assert np.array_equal(checkpoint.tensor(f"{ours}.weight").astype(np.float32), expected)


def test_weights_of_transformers_come_back(tmp_path):
    """A model saved by transformers, and written by the test in Mistral's format, opens as the same bits.

    So the permutation is the inverse.
    """
    write_tiny_mistral(tmp_path / "hf")
    values = {name: DEFAULTS[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads")}
    params = {
        "dim": values["hidden_size"], "n_layers": 2, "head_dim": 16, "hidden_dim": 96, "n_heads": 4, "n_kv_heads": 2,
        "norm_eps": 1e-5, "vocab_size": 320, "rope_theta": 1e4, "sliding_window": 32, "max_seq_len": 512,
    }  # fmt: skip
    state = MistralForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    theirs = open_checkpoint(tmp_path / "hf", "auto", {})
    ours = open_checkpoint(write_raw(tmp_path / "raw", params, raw_of_transformers(state, 4, 2)), "auto", {})
    assert ours.model == theirs.model
    assert ours.names() == theirs.names()
    assert all(np.array_equal(ours.tensor(name), theirs.tensor(name)) for name in ours.names())


def test_parameters_saved_with_gradients(tmp_path):
    tensors = raw_tensors(PARAMS)
    write_raw(tmp_path, PARAMS, {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}, pth_files=1)
    assert np.array_equal(open_checkpoint(tmp_path, "auto", {}).tensor("norm.weight"), tensors["norm.weight"].numpy())


def test_transposed_storage_is_read_row_major(tmp_path):
    tensors = raw_tensors(PARAMS)
    write_raw(tmp_path, PARAMS, {name: tensor.t().contiguous().t() for name, tensor in tensors.items()}, pth_files=1)
    assert np.array_equal(
        open_checkpoint(tmp_path, "auto", {}).tensor("output.weight"), tensors["output.weight"].numpy()
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    return write_raw(tmp_path_factory.mktemp("raw") / "raw", PARAMS, raw_tensors(PARAMS))


@pytest.fixture
def copy(written, tmp_path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copy"))


def edit(path: Path, changes: dict) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


CONTEXTS = [
    ({}, None),
    ({"max_seq_len": 99}, 99),
    ({"max_position_embeddings": 98}, 98),
    ({"max_seq_len": 99, "max_position_embeddings": 98}, 99),
]


@pytest.mark.parametrize(("changes", "expected"), CONTEXTS)
def test_context_length(copy, changes, expected):
    edit(copy / "params.json", changes)
    assert open_checkpoint(copy, "auto", {}).model.context_length == expected


def test_keys_that_carry_nothing_may_be_there(copy):
    before = open_checkpoint(copy, "auto", {}).model
    edit(
        copy / "params.json",
        {"max_batch_size": 8, "model_type": "transformer", "vision_encoder": None, "lora": None, "moe": None},
    )
    assert open_checkpoint(copy, "auto", {}).model == before


def test_tied_head(copy):
    tensors = load_file(copy / "consolidated.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if name != "output.weight"}, copy / "consolidated.safetensors"
    )
    with pytest.raises(UserError, match=r"lacks the tensor output.weight"):
        open_checkpoint(copy, "auto", {})
    edit(copy / "params.json", {"tied_embeddings": True})
    assert open_checkpoint(copy, "auto", {}).model.tied_embeddings


def test_tokenizer(copy):
    assert open_checkpoint(copy, "auto", {}).tokenizer is None
    shutil.copy(MISTRAL_COMMON / "tokenizer.model.v1", copy / "tokenizer.model")
    tokenizer = open_checkpoint(copy, "auto", {}).tokenizer
    assert (tokenizer.kind, tokenizer.bos_id, tokenizer.eos_ids, tokenizer.add_bos, tokenizer.instruct) == (
        "sentencepiece",
        1,
        (2,),
        True,
        None,
    )
    assert open_checkpoint(copy, "auto", {}, chat=Chat(instruct=True)).tokenizer.instruct == "v1"


def refused(folder: Path, kind: str = "mistral") -> str:
    """The one sentence that refuses a folder and names it."""
    with pytest.raises(UserError) as caught:
        open_checkpoint(folder, kind, {})
    message = str(caught.value)
    assert str(folder) in message
    assert "\n" not in message
    assert len(message) < 500
    return message


BAD_PARAMS = {
    "has the unknown key 'ffn_dim_multiplier'; expected keys of a text model": {"ffn_dim_multiplier": 1.3},
    "has the unknown key 'num_experts'": {"moe": MOE, "num_experts": 4},
    "has both sliding_window and _sliding_window, expected one of them": {
        "sliding_window": 5,
        "_sliding_window": [5, None],
    },
    "lists 3 windows in sliding_window, expected a number that divides its 2 layers": {"_sliding_window": [5, None, 5]},
    "lists 0 windows": {"sliding_window": []},
    "Expected `int | null`, got `str` - at `$.sliding_window": {"sliding_window": "5"},
    "Expected `int | null`, got `float` - at `$.sliding_window": {"sliding_window": 5.5},
    "Expected `int | null`, got `bool` - at `$.sliding_window": {"sliding_window": True},
    "Expected `int | null`, got `object` - at `$.sliding_window": {"sliding_window": {"size": 5}},
    "Expected `int | null`, got `array` - at `$.sliding_window": {"sliding_window": [[5]]},
    "Expected `int` >= 1 - at `$.sliding_window": {"sliding_window": [0, None]},
    "has model_type: 'mamba', which is not supported; expected 'transformer' or none": {"model_type": "mamba"},
    "has the unknown key 'multimodal'": {"multimodal": {"whisper_model_args": {}}},
    "has quantization: ": {"quantization": {"qformat_weight": "int4"}},
    "yarn is malformed: Object missing required field `original_max_position_embeddings`": {"yarn": {"factor": 4}},
    "yarn is malformed: Object contains unknown field `gamma`": {
        "yarn": {"factor": 4, "original_max_position_embeddings": 16, "gamma": 1}
    },
    "llama_4_scaling is malformed: Object missing required field `beta`": {
        "llama_4_scaling": {"original_max_position_embeddings": 16}
    },
    "moe is malformed: Object missing required field `num_experts_per_tok`": {"moe": {"num_experts": 4}},
    "moe is malformed: Object contains unknown field `shared`": {"moe": MOE | {"shared": 1}},
    "moe is malformed: Expected `int`, got `str`": {"moe": MOE | {"num_experts": "4"}},
    "moe is malformed: Expected `object`, got `bool`": {"moe": False},
    "gives each token 5 of 4 experts, expected at most all of them": {"moe": MOE | {"num_experts_per_tok": 5}},
    "Expected `int` >= 1 - at `$.n_experts`": {"moe": MOE | {"num_experts": 0}},
    "lacks dim, which gives the model's dim": {"dim": None},
    "has n_layers: '2', expected a number of layers": {"n_layers": "2"},
    "gives a rope_theta of 0.0, expected a positive number": {"rope_theta": 0.0},
    "has 4 heads and 3 key-value heads, expected the first number to be a multiple of the second": {"n_kv_heads": 3},
    "lacks the tensor layers.0.feed_forward.gate.weight and 25 more": {"moe": MOE},
    "lacks the tensor layers.2.attention_norm.weight and 8 more": {"n_layers": 3},
    "holds the tensor layers.1.attention.wk.weight and 8 more, which has no place in a mistral model": {"n_layers": 1},
    "tok_embeddings.weight has shape (50, 24), expected (51, 24) by": {"vocab_size": 51},
    "layers.0.attention.wq.weight has shape (32, 24), expected (24, 24) by": {"head_dim": 6},
}


@pytest.mark.parametrize("message", BAD_PARAMS)
def test_bad_params_are_refused(copy, message):
    edit(copy / "params.json", BAD_PARAMS[message])
    found = refused(copy)
    assert message in found
    assert "params.json" in found


@pytest.mark.parametrize(("text", "message"), [("{", "is not valid JSON"), ("[]", "holds a list, expected an object")])
def test_params_that_are_no_object(copy, text, message):
    (copy / "params.json").write_text(text)
    assert message in refused(copy)


WK = "layers.1.attention.wk.weight"
BAD_TENSORS = {
    f"lacks the tensor {WK}, which": lambda t: {name: tensor for name, tensor in t.items() if name != WK},
    "holds the tensor layers.0.attention.wq.bias, which has no place in a mistral model": lambda t: (
        t | {"layers.0.attention.wq.bias": torch.zeros(32)}
    ),
    "holds the tensor vision_encoder.ln_pre.weight, which": lambda t: (
        t | {"vision_encoder.ln_pre.weight": torch.zeros(8)}
    ),
    f"{WK} has shape (16, 25), expected (16, 24)": lambda t: t | {WK: torch.zeros(16, 25)},
    f"{WK} has shape (384,), expected (16, 24)": lambda t: t | {WK: torch.zeros(384)},
    f"{WK} has shape (), expected (16, 24)": lambda t: t | {WK: torch.tensor(1.0)},
    f"{WK} has dtype int8, expected one of float32, float16, bfloat16": lambda t: (
        t | {WK: torch.zeros(16, 24, dtype=torch.int8)}
    ),
}


@pytest.mark.parametrize("files", [0, 2])
@pytest.mark.parametrize("message", BAD_TENSORS)
def test_every_tensor_is_accounted_for(tmp_path, message, files):
    write_raw(tmp_path, PARAMS, BAD_TENSORS[message](raw_tensors(PARAMS)), pth_files=files)
    assert message in refused(tmp_path)


def test_which_files_hold_the_weights(copy):
    torch.save(raw_tensors(PARAMS), copy / "consolidated.00.pth")
    assert "has both consolidated.safetensors and consolidated.00.pth, expected one of them" in refused(copy)
    (copy / "consolidated.safetensors").unlink()
    assert open_checkpoint(copy, "auto", {}).model.dim == PARAMS["dim"]
    (copy / "consolidated.00.pth").unlink()
    assert "has neither consolidated.safetensors nor consolidated.*.pth" in refused(copy)
    (copy / "params.json").unlink()
    assert "has no params.json" in refused(copy)


def test_truncated_safetensors(copy):
    path = copy / "consolidated.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert "consolidated.safetensors is truncated" in refused(copy)


@pytest.fixture
def pth(tmp_path) -> Path:
    return write_raw(tmp_path, PARAMS, raw_tensors(PARAMS), pth_files=2)


class Payload:
    """An object that a hostile file would pickle: unpickling it makes the folder `made`."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self):
        return os.mkdir, (str(self.made),)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_not_run(pth, tmp_path, zipped):
    made = tmp_path / "made"
    torch.save(
        raw_tensors(PARAMS) | {"extra": Payload(made)},
        pth / "consolidated.01.pth",
        _use_new_zipfile_serialization=zipped,
    )
    torch.load(pth / "consolidated.01.pth", weights_only=False)
    made.rmdir()  # fails if the payload is harmless
    message = refused(pth)
    assert not made.exists()
    assert (
        "would run posix.mkdir when it is loaded, expected only tensors; none of its code was run"
        if zipped
        else "is in the form of torch before release 1.6, which is not read; fetch the checkpoint as safetensors"
    ) in message
    assert "weights_only" not in message  # torch would advise running it


def test_more_than_tensors(pth):
    other = {
        "nested": {"norm.weight": torch.zeros(3)},
        "list": [1],
        "text": "x",
        "sparse": torch.eye(3).to_sparse(),
        "meta": torch.zeros(3, device="meta"),
    }
    for name, value in other.items():
        torch.save(raw_tensors(PARAMS) | {name: value}, pth / "consolidated.01.pth")
        assert "consolidated.01.pth holds something other than named tensors, expected a state dict" in refused(pth)
    torch.save([torch.zeros(3)], pth / "consolidated.01.pth")
    assert "something other than named tensors" in refused(pth)


def test_a_tensor_in_two_files(pth):
    torch.save(raw_tensors(PARAMS), pth / "consolidated.01.pth")
    assert (
        "consolidated.01.pth holds the tensor layers.0.attention.wk.weight, which another file holds too, expected"
        in refused(pth)
    )


def test_a_missing_file(pth):
    (pth / "consolidated.01.pth").unlink()
    assert "lacks the tensor" in refused(pth)


@pytest.mark.parametrize(
    "damage",
    [lambda data: b"", lambda data: b"junk" * 99, lambda data: data[:-30], lambda data: data[: len(data) // 2]],
)
def test_damaged_containers(pth, damage):
    path = pth / "consolidated.00.pth"
    path.write_bytes(damage(path.read_bytes()))
    assert (
        "00.pth is truncated or not a zip file of tensors, as torch saves them; fetch it again, or as safetensors"
        in refused(pth)
    )


def test_flipped_bytes_never_end_in_a_trace(pth):
    """Any damage to the description of the tensors gives a sentence, or tensors that the file accounts for."""
    path = pth / "consolidated.00.pth"
    data = path.read_bytes()
    start = data.index(b"ctorch._utils")  # the pickled description comes before the numbers
    generator = np.random.default_rng(0)
    sentences = []
    for _ in range(150):
        changed = bytearray(data)
        for place in generator.integers(start, start + 2000, 2):
            changed[place] = generator.integers(256)
        path.write_bytes(changed)
        try:
            open_checkpoint(pth, "mistral", {})
        except UserError as error:
            sentences.append(str(error))
    assert len(sentences) > 50
    assert not any("\n" in sentence for sentence in sentences)


def test_a_folder_in_place_of_a_file(pth):
    (pth / "consolidated.00.pth").unlink()
    (pth / "consolidated.00.pth").mkdir()
    assert "consolidated.00.pth cannot be read: Is a directory" in refused(pth)


@pytest.fixture
def beside(tmp_path) -> Path:
    """A Hugging Face folder like the published Ministral's: one window in config.json, the true ones in params.json."""
    config = MistralConfig(**(DEFAULTS | {"num_hidden_layers": 4, "sliding_window": 8, "max_position_embeddings": 64}))
    MistralForCausalLM(config).save_pretrained(tmp_path)
    params = {
        "dim": 64,
        "n_layers": 4,
        "head_dim": 16,
        "hidden_dim": 96,
        "n_heads": 4,
        "n_kv_heads": 2,
        "norm_eps": 1e-5,
        "vocab_size": 320,
    }
    (tmp_path / "params.json").write_text(
        json.dumps(params | {"rope_theta": 1e4, "_sliding_window": [None, 8, 8, 8], "max_seq_len": 256})
    )
    return tmp_path


def test_the_rotary_base_of_params_overrules_too(beside):
    edit(beside / "params.json", {"rope_theta": 1e8})
    checkpoint = open_checkpoint(beside, "auto", {})
    assert checkpoint.model.rope_theta == 1e8
    assert checkpoint.notes[0].endswith("and rope_theta is 100000000.0, not 10000.0")


def test_params_overrule_config(beside):
    checkpoint = open_checkpoint(beside, "auto", {})
    assert (checkpoint.model.sliding_window, checkpoint.model.context_length) == ((None, 8, 8, 8), 256)
    assert checkpoint.notes == (
        f"{beside / 'params.json'} overrules config.json, since Mistral's own software reads it: "
        "windows are [none, 8, 8, 8], not 8 and the context has 256 positions, not 64",
    )
    edit(beside / "params.json", {"_sliding_window": [8, None]})
    assert "windows are [8, none] repeated, not 8" in open_checkpoint(beside, "auto", {}).notes[0]
    edit(beside / "params.json", {"_sliding_window": None, "max_seq_len": 64})
    checkpoint = open_checkpoint(beside, "auto", {})
    assert checkpoint.model.sliding_window == (None,) * 4
    assert checkpoint.notes[0].endswith("reads it: windows are none, not 8")


@pytest.mark.parametrize(
    "windows", [{"_sliding_window": 8}, {"sliding_window": 8, "_sliding_window": None}, {"_sliding_window": [8, 8]}]
)
def test_files_that_agree_give_no_note(beside, windows):
    edit(beside / "params.json", {"max_seq_len": 64, **windows})
    checkpoint = open_checkpoint(beside, "auto", {})
    assert (checkpoint.notes, checkpoint.model.sliding_window, checkpoint.model.context_length) == ((), (8,) * 4, 64)


def test_params_without_a_context_leave_that_of_config(beside):
    edit(beside / "params.json", {"max_seq_len": None, "_sliding_window": 8})
    checkpoint = open_checkpoint(beside, "auto", {})
    assert (checkpoint.notes, checkpoint.model.context_length) == ((), 64)


def test_an_override_has_the_last_word(beside):
    assert open_checkpoint(beside, "auto", {"sliding_window": 4}).model.sliding_window == (4,) * 4


def test_layer_types_are_overruled_as_well(beside):
    edit(beside / "config.json", {"layer_types": ["full_attention", *["sliding_attention"] * 3]})
    edit(beside / "params.json", {"max_seq_len": 64})
    assert open_checkpoint(beside, "auto", {}).notes == ()
    edit(beside / "params.json", {"_sliding_window": 8})
    assert open_checkpoint(beside, "auto", {}).model.sliding_window == (8,) * 4


BAD_BESIDE = {
    "has n_layers: 3, but the config.json beside it has num_hidden_layers: 4, expected files of one": {"n_layers": 3},
    "has both sliding_window and _sliding_window": {"sliding_window": 8},
    "lists 3 windows in sliding_window": {"_sliding_window": [8, 8, None]},
}


@pytest.mark.parametrize("message", BAD_BESIDE)
def test_bad_params_beside_a_config(beside, message):
    edit(beside / "params.json", BAD_BESIDE[message])
    assert message in refused(beside, "huggingface")
