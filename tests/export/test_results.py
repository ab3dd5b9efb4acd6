"""Keys of the export's results: the results that a setting makes again, and those that it leaves alone."""

import pytest

from export.configuration.config import load_config
from export.results import export_record, graphs_key, open_configured, shape_of, weights_key
from runtime.errors import UserError
from tests.helpers.artifacts import Case, write_case

CASE = Case({"num_hidden_layers": 1}, {"shape": {"prefill_chunk": 4, "cache_len": 8}})


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """The keys of stored weights and of graphs, with some settings changed."""
    folder = tmp_path_factory.mktemp("keys")
    path = write_case("keys", CASE, folder)

    def keys_with(*settings):
        config = load_config(path, [f"frontend.checkpoint={folder / 'checkpoint'}", *settings])
        return weights_key(config), graphs_key(config)

    return keys_with


@pytest.mark.parametrize(
    "setting",
    [
        "name=another",
        "backend.cpu=native",
        "quantize.scheme=none backend.target=cuda backend.dtype=fp32",
        "workspace.workers=1",
        "workspace.path=elsewhere",
        "quantize.budget=3",
    ],
)
def test_the_machine_and_the_name_make_nothing_of_an_export_again(keys, setting):
    scheme = [given for given in setting.split() if given.startswith("quantize.scheme")]
    assert keys(*setting.split()) == keys(*scheme)


def test_a_target_that_rounds_activations_for_carried_weights_makes_them_again(keys):
    assert keys("backend.target=cuda", "backend.dtype=fp32")[0] != keys()[0]


def test_heads_that_are_no_whole_groups_are_refused(keys, tmp_path):
    path = write_case("odd", CASE, tmp_path)
    config = load_config(path, [f"frontend.checkpoint={tmp_path / 'checkpoint'}", "quantize.cache=int4"])
    with pytest.raises(
        UserError,
        match=r"quantize\.cache is int4, which stores keys and values in groups of 32 numbers, "
        r"but the model's head_dim is 16, expected a multiple of it; use fp32, fp16, fp8 or int8",
    ):
        export_record(config, open_configured(config))


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        (["shape.slots=1"], (1,)),
        (["shape.slots=2"], (1, 2)),
        (["shape.slots=3"], (1, 2, 4)),
        (["shape.slots=16"], (1, 2, 4, 8, 16)),
        (["shape.slots=100"], (1, 2, 4, 8, 16)),
        (["shape.slots=100", "backend.target=cuda", "backend.dtype=fp32"], (1, 2, 4, 8, 16, 32, 64, 128)),
        (["shape.slots=100", "shape.step_rows=[3, 1]"], (1, 3)),
    ],
)
def test_steps_have_rows_for_all_slots_as_far_as_a_target_goes(tmp_path, settings, rows):
    path = write_case("rows", CASE, tmp_path)
    config = load_config(path, [f"frontend.checkpoint={tmp_path / 'checkpoint'}", *settings])
    assert shape_of(config).step_rows == rows


def test_a_method_and_its_text_change_only_what_is_rounded_to_4_bits(keys, tmp_path):
    text = tmp_path / "text"
    text.write_text("one")
    settings = ["quantize.method=gptq", f"quantize.calibration={text}"]
    assert keys(*settings) == keys()
    found = [keys("quantize.scheme=int4", *settings[:n])[0] for n in range(3)]
    assert len(set(found)) == 3
    text.write_text("two")
    assert keys("quantize.scheme=int4", *settings)[0] != found[2]
    without = [keys("quantize.scheme=int4", "quantize.method=search", *given) for given in ([], settings[1:])]
    assert without[0] == without[1]
    with pytest.raises(UserError, match="nowhere cannot be read: No such file"):
        keys("quantize.scheme=int4", "quantize.calibration=nowhere")


@pytest.mark.parametrize(
    "setting",
    ["shape.cache_len=24", "shape.prefill_chunk=2", "shape.slots=2", "shape.step_rows=[1, 2]", "quantize.cache=fp16"],
)
def test_shapes_and_caches_leave_stored_weights_alone(keys, setting):
    weights, graphs = keys(setting)
    assert weights == keys()[0]
    assert graphs != keys()[1]


@pytest.mark.parametrize(
    "setting",
    [
        "quantize.scheme=int8",
        "quantize.keep=[head]",
        "quantize.group_size=64",
        "backend.dtype=fp16",
        "frontend.type=huggingface",
        "frontend.overrides.sliding_window=6",
    ],
)
def test_what_is_read_and_stored_changes_both(keys, setting):
    weights, graphs = keys(setting)
    before = keys("frontend.type=auto") if "frontend.type" in setting else keys()
    assert weights != before[0]
    assert graphs != before[1]


def test_an_adapter_changes_both(keys, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"1")
    first = keys(f"frontend.adapter={tmp_path}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"2")
    second = keys(f"frontend.adapter={tmp_path}")
    for one, other in ((keys(), first), (first, second)):
        assert one[0] != other[0]
        assert one[1] != other[1]


def test_the_text_of_a_template_counts_and_not_where_it_lies(keys, tmp_path):
    first, second = tmp_path / "a.jinja", tmp_path / "b.jinja"
    first.write_text("{{ messages[0].content }}")
    second.write_bytes(b"\xef\xbb\xbf" + first.read_bytes())
    before, given, elsewhere = keys(), *(keys(f"frontend.chat_template={path}") for path in (first, second))
    assert before[0] != given[0]
    assert given == elsewhere
    second.write_text("{{ messages[0].content }}!")
    assert keys(f"frontend.chat_template={second}")[0] != given[0]
    with pytest.raises(UserError, match=r"nowhere.jinja cannot be read: No such file or directory"):
        keys("frontend.chat_template=nowhere.jinja")
