"""The config: values of the shipped files (PyYAML is the reference), and one test for each way to get one wrong."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from yaml import safe_load

from export.configuration.config import CompileConfig, artifact_dir, describe_defaults, load_config, stage_parser
from export.stage import ROOT
from runtime.artifact.targets import TARGETS
from runtime.errors import UserError

SHIPPED = sorted((ROOT / "yaml").glob("*.yaml"))

LEAST = """\
name: least
frontend:
  checkpoint: models/least
backend:
  target: llvm
"""

FULL = """\
# every key
name: full-1.0
frontend:
  checkpoint: models/full
  type: gguf
  overrides:
    sliding_window: 64
    norm_eps: 1e-5
    rope_theta: 1.0e+6
    tied_embeddings: false
    family: mistral
    context_length: null
shape:
  slots: 2
  step_rows: [1, 4]
  prefill_chunk:
    - 16
    - 256
  cache_len: 1024
quantize: {scheme: int8}
backend:
  target: cuda
  cpu: znver4
  arch: [sm_90a, sm_86]
  dtype: fp32
workspace:
  path: /tmp/work
  workers: 3
"""


@pytest.fixture
def write(tmp_path):
    """Write a config file and return its path."""

    def write_config(text):
        path = tmp_path / "some.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_config


@pytest.fixture
def refusal(write):
    """Return the message that refuses a config; the file's path appears in it as FILE."""

    def load_and_fail(text, *overrides):
        path = write(text)
        with pytest.raises(UserError) as caught:
            load_config(path, overrides)
        return str(caught.value).replace(str(path), "FILE")

    return load_and_fail


def as_written(config: CompileConfig) -> dict:
    return config.model_dump(mode="json", by_alias=True, exclude_unset=True)


def changed_line(text):
    """The number of the first line in which `text` differs from FULL."""
    return next(
        number
        for number, (new, old) in enumerate(zip(text.splitlines(), FULL.splitlines(), strict=False), 1)
        if new != old
    )


def test_the_shipped_configs_are_there():
    assert {"demo", "fp16", "int8", "tiny"} <= {path.stem for path in SHIPPED}
    assert [path for path in (ROOT / "yaml").rglob("*") if path.suffix != ".yaml"] == []


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_config_loads_as_pyyaml_reads_it(path):
    assert as_written(load_config(path, [])) == safe_load(path.read_text())


def test_least_config_takes_every_default(write):
    assert load_config(write(LEAST), []).model_dump(mode="json") == {
        "name": "least",
        "frontend": {
            "checkpoint": "models/least",
            "type": "auto",
            "head": "auto",
            "adapter": None,
            "instruct": False,
            "chat_template": None,
            "overrides": {},
        },
        "shape": {"slots": 1, "step_rows": None, "prefill_chunks": [128, 16], "cache_len": 4096},
        "quantize": {
            "scheme": "source",
            "group_size": 32,
            "symmetric": True,
            "keep": [],
            "keep_scheme": "int8",
            "method": "weighted_search",
            "calibration": None,
            "cache": "auto",
            "budget": None,
        },
        "backend": {
            "target": "llvm",
            "cpu": ["x86-64-v3", "alderlake", "x86-64-v4", "znver4", "sapphirerapids"],
            "arch": [],
            "dtype": "fp32",
        },
        "workspace": {"path": "out/.work", "workers": None},
    }


def test_cuda_has_its_own_defaults(write):
    backend = load_config(write(LEAST.replace("llvm", "cuda")), []).backend
    assert (backend.arch, backend.dtype) == (("sm_80", "sm_90a"), "fp16")


def test_full_config_reads_every_key(write):
    config = load_config(write(FULL), [])
    expected = safe_load(FULL)
    # a number in YAML 1.2, but text to PyYAML, which reads YAML 1.1
    expected["frontend"]["overrides"]["norm_eps"] = 1e-5
    expected["shape"]["prefill_chunk"] = [256, 16]  # kept in descending order
    expected["backend"]["cpu"] = ["znver4"]
    assert as_written(config) == expected
    assert config.frontend.checkpoint == Path("models/full")  # neither resolved nor joined to the file's folder
    assert config.shape.prefill_chunks == (256, 16)


def test_override_types_survive(write):
    overrides = load_config(write(FULL), []).frontend.overrides
    assert [type(value) for value in overrides.values()] == [int, float, float, bool, str, type(None)]


def test_config_is_frozen(write):
    config = load_config(write(LEAST), [])
    with pytest.raises(ValueError, match="frozen"):
        config.shape.slots = 2


def test_empty_section_takes_its_defaults(write):
    assert load_config(write(LEAST + "shape:\n  # slots: 4\n"), []) == load_config(write(LEAST), [])


def test_home_folder_is_expanded(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert load_config(write(LEAST), ["frontend.checkpoint=~/models/x"]).frontend.checkpoint == Path(
        "/home/someone/models/x"
    )


@pytest.mark.parametrize("text", [LEAST, FULL, *(path.read_text() for path in SHIPPED)])
def test_description_says_the_same_config_to_any_yaml_reader(write, text):
    config = load_config(write(text), [])
    described = "\n".join(describe_defaults(config)) + "\n"
    complete = config.model_dump(mode="json", by_alias=True)
    assert safe_load(described.replace("1e-05", "1.0e-5")) == complete  # PyYAML requires the decimal point
    assert load_config(write(described), []) == config


def test_description_marks_exactly_the_defaults(write):
    config = load_config(write(LEAST), ["shape.slots=1"])
    marked = {line.split(":")[0].strip() for line in describe_defaults(config) if line.endswith("  # default")}
    stored = {
        "scheme",
        "group_size",
        "symmetric",
        "keep",
        "keep_scheme",
        "method",
        "calibration",
        "cache",
        "budget",
    }
    rest = {
        "type",
        "step_rows",
        "head",
        "adapter",
        "instruct",
        "chat_template",
        "overrides",
        "prefill_chunk",
        "cache_len",
        "cpu",
        "arch",
        "dtype",
        "path",
        "workers",
    }
    assert marked == stored | rest


@pytest.mark.parametrize(
    "text", ["1e5", "true", "null", "12", "0x1f", "a b", "x: y", "# no", "", "é", "-", "~", '"', "a\nb", "\x7f"]
)
def test_description_quotes_text_that_looks_like_something_else(write, text):
    config = load_config(write(LEAST), [f"frontend.overrides.field={json.dumps(text)}"])
    assert load_config(write("\n".join(describe_defaults(config))), []).frontend.overrides == {"field": text}


def test_set_wins_over_the_file_and_the_last_one_wins(write):
    sets = [
        "shape.cache_len=512",
        "shape.cache_len=2048",
        "quantize.scheme=int8",
        "frontend.overrides.sliding_window=null",
    ]
    config = load_config(write(FULL), sets)
    assert config.shape.cache_len == 2048
    assert config.quantize.scheme == "int8"
    assert config.frontend.overrides["sliding_window"] is None
    assert config.frontend.overrides["family"] == "mistral"


def test_set_takes_lists_and_whole_sections(write):
    config = load_config(write(FULL), ["backend.arch=[sm_120]", "shape={cache_len: 32, prefill_chunk: 8}"])
    assert config.backend.arch == ("sm_120",)
    assert (config.shape.slots, config.shape.prefill_chunks, config.shape.cache_len) == (1, (8,), 32)


def test_set_reaches_sections_that_the_file_lacks(write):
    assert load_config(write(LEAST), ["workspace.workers=2"]).workspace.workers == 2


def test_set_can_turn_a_cuda_config_into_a_cpu_one(write):
    config = load_config(write(FULL), ["backend.target=llvm", "backend.arch=[]"])
    assert (config.backend.target, config.backend.arch) == ("llvm", ())


@pytest.mark.parametrize(
    ("old", "new", "key", "valid", "hint"),
    [
        (
            "  cache_len:",
            "  cache_length:",
            "shape.cache_length",
            "slots, step_rows, prefill_chunk, cache_len",
            "shape.cache_len",
        ),
        ("quantize:", "quantise:", "quantise", "name, frontend, shape, quantize, backend, workspace", "quantize"),
        ("  cpu:", "  checkpoint:", "backend.checkpoint", "target, cpu, arch, dtype", "frontend.checkpoint"),
    ],
)
def test_unknown_key_is_named_with_its_line_and_the_valid_keys(refusal, old, new, key, valid, hint):
    text = FULL.replace(old, new)
    message = refusal(text)
    assert message.startswith(f"FILE:{changed_line(text)}: unknown key {key}, the valid keys ")
    assert f" are {valid};" in message
    assert message.endswith(f"did you mean {hint}?")


def test_unknown_key_without_a_likeness_gets_no_guess(refusal):
    assert "did you mean" not in refusal(LEAST + "zzz: 1\n")


def test_how_weights_are_stored(write):
    quantize = (
        "\nquantize: {scheme: int4, group_size: 64, symmetric: false, "
        "keep: [head, last], keep_scheme: none, method: gptq, calibration: some/text, cache: fp16, budget: 2}\n"
    )
    config = load_config(write(LEAST + quantize), [])
    q = config.quantize
    assert (q.scheme, q.group_size, q.symmetric, q.keep, q.keep_scheme, q.budget) == (
        "int4",
        64,
        False,
        ("head", "last"),
        "none",
        2.0,
    )
    assert (q.method, q.calibration) == ("gptq", Path("some/text"))
    assert config.cache_dtype == "fp16"


@pytest.mark.parametrize(
    ("key", "scheme"), [("scheme", "int4_dynamic"), ("scheme", "bf16_dot"), ("keep_scheme", "int8_dynamic")]
)
def test_schemes_that_cuda_lacks_are_refused(write, key, scheme):
    with pytest.raises(
        UserError,
        match=rf"quantize\.{key} is {scheme}, which this version does not compile for cuda; "
        "use source, none, fp8, int8 or int4",
    ):
        load_config(write(FULL), [f"quantize.{key}={scheme}"])


def test_caches_that_a_target_lacks_are_refused(write, monkeypatch):
    monkeypatch.setitem(TARGETS, "cuda", replace(TARGETS["cuda"], caches=("fp16", "fp32")))
    with pytest.raises(
        UserError, match=r"quantize\.cache is int8, which this version does not compile for cuda; use fp16 or fp32"
    ):
        load_config(write(FULL), ["quantize.cache=int8"])


@pytest.mark.parametrize(
    ("dtype", "cache", "expected"),
    [("fp32", "auto", "fp32"), ("bf16", "auto", "fp16"), ("fp16", "fp32", "fp32"), ("fp32", "int8", "int8")],
)
def test_caches_follow_the_dtype_unless_told_otherwise(write, dtype, cache, expected):
    assert load_config(write(LEAST), [f"backend.dtype={dtype}", f"quantize.cache={cache}"]).cache_dtype == expected


@pytest.mark.parametrize(
    ("old", "new", "found", "expected"),
    [
        ("slots: 2", "slots: 0", "shape.slots is 0", "a whole number from 1 to 1024"),
        ("slots: 2", "slots: 1025", "shape.slots is 1025", "a whole number from 1 to 1024"),
        ("slots: 2", 'slots: "2"', 'shape.slots is "2"', "a whole number from 1"),
        ("slots: 2", "slots: true", "shape.slots is true", "a whole number from 1"),
        ("slots: 2", "slots: 2.0", "shape.slots is 2.0", "a whole number from 1"),
        ("[1, 4]", "[2, 4]", "shape.step_rows is [2, 4]", "different whole numbers that begins with 1, or none"),
        ("[1, 4]", "[1, 4, 4]", "shape.step_rows is [1, 4, 4]", "different whole numbers that begins with 1"),
        ("[1, 4]", "[1, 0]", "shape.step_rows is [1, 0]", "different whole numbers that begins with 1"),
        ("[1, 4]", "[]", "shape.step_rows is []", "different whole numbers that begins with 1"),
        ("[1, 4]", "4", "shape.step_rows is 4", "different whole numbers that begins with 1"),
        ("cache_len: 1024", "cache_len: 99999999999", "shape.cache_len is 99999999999", "a whole number from 1"),
        ("cache_len: 1024", "cache_len: 0", "shape.cache_len is 0", "a whole number from 1"),
        ("- 256", "- 0", "shape.prefill_chunk is [16, 0]", "or a list of different ones"),
        (
            "prefill_chunk:\n    - 16\n    - 256",
            "prefill_chunk: [16, 16]",
            "shape.prefill_chunk is [16, 16]",
            "or a list of different ones",
        ),
        ("type: gguf", "type: onnx", "frontend.type is onnx", "one of auto, huggingface, mistral, gguf"),
        (
            "checkpoint: models/full",
            "checkpoint: 7",
            "frontend.checkpoint is 7",
            "the path of a checkpoint folder or file",
        ),
        (
            "checkpoint: models/full",
            'checkpoint: ""',
            'frontend.checkpoint is ""',
            "the path of a checkpoint folder or file",
        ),
        (
            "sliding_window: 64",
            "sliding_window: [a]",
            "frontend.overrides.sliding_window is [a]",
            "a number, text, true",
        ),
        (
            "sliding_window: 64",
            "sliding_window: 1e999",
            "frontend.overrides.sliding_window is inf",
            "a number, text, true",
        ),
        (
            "quantize: {scheme: int8}",
            "quantize: {scheme: int3}",
            "quantize.scheme is int3",
            "none, bf16_dot, fp8, int8, int8_dynamic, int4 or int4_dynamic",
        ),
        ("{scheme: int8}", "{group_size: 48}", "quantize.group_size is 48", "32"),
        ("{scheme: int8}", "{keep: [middle]}", "quantize.keep", "head, first, last"),
        ("{scheme: int8}", "{method: gptp}", "quantize.method is gptp", "search, weighted_search or gptq"),
        ("{scheme: int8}", "{calibration: 3}", "quantize.calibration is 3", "the path of a text file"),
        ("{scheme: int8}", "{budget: 0}", "quantize.budget is 0", "a percentage above 0"),
        ("quantize: {scheme: int8}", "quantize: int8", "quantize is int8", "a mapping with the keys scheme"),
        ("target: cuda", "target: metal", "backend.target is metal", "one of llvm, cuda"),
        (
            "arch: [sm_90a, sm_86]",
            "arch: [sm_90a, sm86]",
            "backend.arch is [sm_90a, sm86]",
            "a list of different CUDA architectures",
        ),
        (
            "arch: [sm_90a, sm_86]",
            "arch: [sm_86, sm_86]",
            "backend.arch is [sm_86, sm_86]",
            "a list of different CUDA architectures",
        ),
        ("arch: [sm_90a, sm_86]", "arch: sm_86", "backend.arch is sm_86", "a list of different CUDA architectures"),
        ("cpu: znver4", "cpu: znver4 -mattr=x", "backend.cpu is ", "LLVM's name of a CPU level"),
        ("dtype: fp32", "dtype: fp64", "backend.dtype is fp64", "fp32, fp16 or bf16"),
        ("workers: 3", "workers: 0", "workspace.workers is 0", "or null for all cores"),
        ("workers: 3", "workers: 100000", "workspace.workers is 100000", "a whole number from 1 to 256, or null"),
        ("name: full-1.0", "name: .full", "name is .full", "no leading dot"),
        ("name: full-1.0", "name: a/b", "name is a/b", "no leading dot"),
        ("name: full-1.0", 'name: "a\\n"', "name is ", "no leading dot"),
        ("name: full-1.0", "name: 1.0", "name is 1.0", "in quotes if it looks like a number"),
    ],
)
def test_wrong_value_is_named_with_its_line_and_what_was_expected(refusal, old, new, found, expected):
    text = FULL.replace(old, new)
    message = refusal(text)
    assert message.startswith(f"FILE:{changed_line(text)}: {found}")
    assert expected in message.split(", expected ")[1]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "cache_len: 1024",
            "cache_len: 128",
            "shape.prefill_chunk holds 256, which exceeds shape.cache_len (128); set shape.",
        ),
        ("target: cuda", "target: llvm", "backend.arch is for cuda, but backend.target is llvm; remove backend.arch"),
        (
            "cpu: znver4",
            "cpu: [x86-64-v3, znver4]",
            "backend.cpu lists x86-64-v3, znver4, but backend.target is cuda, whose host code has one level; name the",
        ),
        ("[sm_90a, sm_86]", "[]", "backend.arch is empty, but backend.target is cuda; list an architecture"),
    ],
)
def test_conflict_is_named_with_the_remedy(refusal, old, new, message):
    text = FULL.replace(old, new)
    key = message.split()[0].split(".")[1]
    line = next(number for number, line in enumerate(text.splitlines(), 1) if line.startswith(f"  {key}:"))
    assert refusal(text).startswith(f"FILE:{line}: {message}")


def test_rows_of_steps_are_kept_in_ascending_order(write):
    config = load_config(write(LEAST), ["shape.step_rows=[8, 1, 2]"])
    assert config.shape.step_rows == (1, 2, 8)
    assert load_config(write(LEAST), ["shape.step_rows=1"]).shape.step_rows == (1,)


def test_chunk_as_long_as_the_cache_is_allowed(write):
    assert load_config(write(LEAST), ["shape.cache_len=128"]).shape.prefill_chunks == (128, 16)


def test_missing_keys_are_listed_together(refusal):
    needs = "every config needs name, frontend.checkpoint, backend.target"
    assert (
        refusal("shape:\n  slots: 1\n") == f"FILE: name and frontend.checkpoint and backend.target not given, {needs}"
    )
    assert refusal(LEAST.replace("  target: llvm", "  cpu: native")) == f"FILE:4: backend.target not given, {needs}"


def test_typo_of_a_required_key_is_reported_as_a_typo(refusal):
    message = refusal(LEAST.replace("checkpoint", "checkpiont"))
    assert message.startswith("FILE:3: unknown key frontend.checkpiont")
    assert message.endswith("did you mean frontend.checkpoint?")


@pytest.mark.parametrize(
    ("text", "start"),
    [
        (LEAST + "  cpu: native\n  cpu: znver4\n", "FILE:7: key 'cpu' is given twice (first on line 6)"),
        (LEAST + "shape: [1\n", "FILE:7: while parsing a flow sequence"),
        (LEAST + "shape:\n\tslots: 1\n", "FILE:7: while scanning for the next token"),
        (LEAST + "shape: \x07\n", "FILE:6: control character '\\x07'"),
        (LEAST + "? [a]\n: 1\n", "FILE:6: a key is a list or a mapping"),
        (LEAST + "shape: &s\n  slots: 1\nworkspace: *s\n", "FILE:8: aliases are not supported"),
        (
            LEAST + "shape: !!python/object:os.system {}\n",
            "FILE:6: tag tag:yaml.org,2002:python/object:os.system is not supported here",
        ),
        (LEAST + "shape: !!int {}\n", "FILE:6: tag tag:yaml.org,2002:int is not supported here"),
        (LEAST + "---\nname: b\n", "FILE:6: expected a single document"),
        (LEAST + "shape: " + "[" * 5000, "FILE: lists or mappings nested too deeply"),
        (LEAST.replace("least\n", "9" * 5000 + "\n"), "FILE:1: '9999"),
        ("", "config FILE holds nothing, expected a mapping"),
        ("- name: x\n", "config FILE holds [{name: x}], expected a mapping"),
    ],
)
def test_text_that_is_no_plain_yaml_mapping_is_refused_with_its_line(refusal, text, start):
    assert refusal(text).startswith(start)


def test_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"missing\.yaml does not exist; give the path of a YAML file"):
        load_config(tmp_path / "missing.yaml", [])
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        load_config(tmp_path, [])
    (tmp_path / "latin.yaml").write_bytes("name: é".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.yaml is not UTF-8 text \(byte 6\)"):
        load_config(tmp_path / "latin.yaml", [])


@pytest.mark.parametrize(
    ("override", "rest"),
    [
        ("shape.cache_len", " is not an override; expected --set key.path=value"),
        ("=5", " is not an override; expected --set key.path=value"),
        ("shape..slots=5", " is not an override; expected --set key.path=value"),
        ("shape.cachelen=5", ": unknown key shape.cachelen, the valid keys in shape"),
        ("cache_len=5", ": unknown key cache_len, the valid keys at the top level are"),
        ("shape.batch=2", ": unknown key shape.batch, the valid keys in shape are slots, step_rows,"),
        ("shape.slots=x", ": shape.slots is x, expected a whole number"),
        ("shape.slots=", ": shape.slots is null, expected a whole number"),
        ("shape.prefill_chunk=[8, -1]", ": shape.prefill_chunk is [8, -1], expected a whole number"),
        ("shape.prefill_chunk=[8", ": while parsing a flow sequence"),
        ("name.first=x", ": name is full-1.0 (FILE:2), so it has no keys to set"),
        (
            "frontend=x",
            ": frontend is x, expected a mapping with the keys "
            "checkpoint, type, head, adapter, instruct, chat_template, overrides",
        ),
    ],
)
def test_wrong_override_is_named_in_place_of_the_line(refusal, override, rest):
    assert refusal(FULL, override).startswith(f"--set {override}{rest}")


def test_override_that_replaces_a_list_takes_the_blame_for_its_items(refusal):
    message = refusal(FULL, "shape.prefill_chunk=[0, 16, 32]")
    assert message.startswith("--set shape.prefill_chunk=[0, 16, 32]: shape.prefill_chunk is [0, 16, 32], expected")


def test_artifact_folder_has_the_name_of_the_file():
    assert artifact_dir(Path("/elsewhere/my-model.v2.yaml")) == Path("out/my-model.v2")


@pytest.mark.parametrize("path", ["", "..yaml", "x/..", "my model.yaml", ".work.yaml"])
def test_file_name_that_makes_no_artifact_folder_is_refused(path):
    with pytest.raises(UserError, match="cannot name an artifact folder"):
        artifact_dir(Path(path))


def test_command_line_of_a_stage():
    given = stage_parser("a stage").parse_args(
        ["yaml/x.yaml", "--set", "a.b=1", "--dump", "out/dump", "--set", "c=[2, 3]"]
    )
    assert (given.config, given.overrides, given.dump) == (Path("yaml/x.yaml"), ["a.b=1", "c=[2, 3]"], Path("out/dump"))
    bare = stage_parser("a stage").parse_args(["yaml/x.yaml"])
    assert (bare.overrides, bare.dump) == ([], None)


def test_import_loads_no_heavy_package():
    code = (
        "import sys, export.configuration.config; "
        "print(*sorted({'torch', 'onnx', 'tvm', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "\n"


def test_two_chat_formats_are_refused(write):
    with pytest.raises(UserError, match=r"frontend.chat_template is chat.jinja, but frontend.instruct asks for the"):
        load_config(write(LEAST), ["frontend.chat_template=chat.jinja", "frontend.instruct=true"])
