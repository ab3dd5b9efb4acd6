import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from export.checkpoints.checkpoint import open_checkpoint
from export.checkpoints.hyperparameters import layer_windows
from runtime.errors import UserError
from tests.helpers.tiny import write_tiny_mistral

FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("window", "layer_types", "expected"),
    [
        (5, None, (5, 5, 5, 5)),
        (None, None, (None,) * 4),
        ([5, None, 6, None], None, (5, None, 6, None)),
        ((5, 5, 5, 5), None, (5, 5, 5, 5)),
        (5, [FULL, SLIDING, SLIDING, FULL], (None, 5, 5, None)),
        (5, [FULL] * 4, (None,) * 4),
        (5, [SLIDING] * 4, (5, 5, 5, 5)),
        (None, [FULL] * 4, (None,) * 4),
    ],
)
@pytest.mark.parametrize("repeats", [False, True])
def test_every_form_gives_each_layer_its_window(window, layer_types, expected, repeats):
    assert layer_windows(window, layer_types, 4, repeats=repeats, where="x") == expected


@pytest.mark.parametrize(
    ("pattern", "n_layers", "expected"),
    [([5], 3, (5, 5, 5)), ([None, 5, 5, 5], 8, (None, 5, 5, 5) * 2), ([5, 6], 2, (5, 6)), ([None], 2, (None, None))],
)
def test_patterns_repeat_where_the_format_says_so(pattern, n_layers, expected):
    """Patterns repeat as in `get_cache_sizes` of mistral-inference."""
    assert layer_windows(pattern, None, n_layers, repeats=True, where="x") == expected
    if len(pattern) < n_layers:
        with pytest.raises(
            UserError,
            match=rf"^x lists {len(pattern)} windows in sliding_window, "
            rf"expected one for each of its {n_layers} layers$",
        ):
            layer_windows(pattern, None, n_layers, repeats=False, where="x")


@pytest.mark.parametrize(
    ("window", "layer_types", "repeats", "message"),
    [
        ([5, None, 5], None, True, "lists 3 windows in sliding_window, expected a number that divides its 4 layers"),
        ([5] * 8, None, True, "lists 8 windows in sliding_window, expected a number that divides its 4 layers"),
        ([5] * 5, None, False, "lists 5 windows in sliding_window, expected one for each of its 4 layers"),
        ([], None, True, "lists 0 windows"),
        ([], None, False, "lists 0 windows"),
        ([5] * 4, [SLIDING] * 4, False, "has both a list of windows and layer_types, expected one of them"),
        (5, [SLIDING] * 3, False, "expected a list with one entry for each of its 4 layers"),
        (5, [], False, "expected a list with one entry for each of its 4 layers"),
        (5, SLIDING, False, "expected a list with one entry for each of its 4 layers"),
        (5, 4, False, "expected a list with one entry for each of its 4 layers"),
        (5, {"0": FULL}, False, "expected a list with one entry for each of its 4 layers"),
        (
            5,
            [FULL, FULL, FULL, "linear_attention"],
            False,
            "has 'linear_attention' among its layer_types, expected full_attention or sliding_attention",
        ),
        (5, [FULL, FULL, FULL, None], False, "has None among its layer_types"),
        (5, [FULL, FULL, FULL, [FULL]], False, "has \\['full_attention'\\] among its layer_types"),
        (None, [FULL, FULL, FULL, SLIDING], False, "has sliding_attention among its layer_types but no sliding_window"),
    ],
)
def test_any_other_form_is_refused(window, layer_types, repeats, message):
    with pytest.raises(UserError, match=message) as caught:
        layer_windows(window, layer_types, 4, repeats=repeats, where="folder/config.json")
    assert str(caught.value).startswith("folder/config.json ")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("windows") / "tiny"
    write_tiny_mistral(folder)
    return folder


@pytest.fixture
def copy(tiny, tmp_path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def with_windows(folder: Path, values: dict) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config.pop("sliding_window")
    (folder / "config.json").write_text(json.dumps(config | values))
    return folder


@pytest.mark.parametrize("model_type", ["mistral", "ministral", "mixtral"])
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"sliding_window": 5}, (5, 5)),
        ({"sliding_window": None}, (None, None)),
        ({"sliding_window": [5, None]}, (5, None)),
        ({"sliding_window": 5, "layer_types": [FULL, SLIDING]}, (None, 5)),
        ({"sliding_window": 5, "layer_types": None}, (5, 5)),
    ],
)
def test_forms_of_a_hugging_face_folder(copy, model_type, values, expected):
    if model_type == "mixtral":
        make_mixture(copy)
    with_windows(copy, {"model_type": model_type, "architectures": [f"{model_type.title()}ForCausalLM"], **values})
    assert open_checkpoint(copy, "auto", {}).model.sliding_window == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sliding_window": "5"}, r"Expected `int \| null`, got `str` - at `\$.sliding_window"),
        ({"sliding_window": 5.0}, r"Expected `int \| null`, got `float` - at `\$.sliding_window"),
        ({"sliding_window": True}, r"Expected `int \| null`, got `bool` - at `\$.sliding_window"),
        ({"sliding_window": {"0": 5}}, r"Expected `int \| null`, got `object` - at `\$.sliding_window"),
        ({"sliding_window": [5, "5"]}, r"Expected `int \| null`, got `str` - at `\$.sliding_window"),
        ({"sliding_window": [5, 0]}, r"Expected `int` >= 1 - at `\$.sliding_window"),
        ({"sliding_window": -1}, r"Expected `int` >= 1 - at `\$.sliding_window"),
        ({"sliding_window": [5]}, "lists 1 windows in sliding_window, expected one for each of its 2 layers"),
        ({"sliding_window": 5, "layer_types": "sliding_attention"}, "expected a list with one entry for each"),
    ],
)
def test_unknown_forms_of_a_hugging_face_folder(copy, values, message):
    with pytest.raises(UserError, match=message) as caught:
        open_checkpoint(with_windows(copy, values), "auto", {})
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("override", "expected"), [(7, (7, 7)), (None, (None, None)), ([7, None], (7, None)), ([7], (7, 7))]
)
def test_an_override_replaces_every_form(copy, override, expected):
    with_windows(copy, {"sliding_window": 5, "layer_types": [FULL, SLIDING]})
    assert open_checkpoint(copy, "auto", {"sliding_window": override}).model.sliding_window == expected


def make_mixture(folder: Path) -> None:
    """The tiny model with one expert in each layer, under Mixtral's names."""
    words = {
        "mlp.gate_proj": "block_sparse_moe.experts.0.w1",
        "mlp.down_proj": "block_sparse_moe.experts.0.w2",
        "mlp.up_proj": "block_sparse_moe.experts.0.w3",
    }
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        for theirs, mixtrals in words.items():
            name = name.replace(theirs, mixtrals)
        tensors[name] = tensor
    tensors |= {f"model.layers.{i}.block_sparse_moe.gate.weight": torch.ones(1, 64) for i in range(2)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_local_experts": 1, "num_experts_per_tok": 1}))
