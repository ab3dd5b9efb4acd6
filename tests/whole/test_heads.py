"""Heads other than a language model's, in checkpoints written by transformers.

The classes of transformers are compared with static torch, onnxruntime and the artifact.
"""

import base64
import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from tokenizers import processors
from transformers import (
    MistralForCausalLM,
    MistralForQuestionAnswering,
    MistralForSequenceClassification,
    MistralForTokenClassification,
    MistralModel,
)

from build.compile import compile_job
from build.parity import run_artifact_rungs
from export.checkpoints.checkpoint import Checkpoint, open_checkpoint
from export.configuration.config import CompileConfig
from export.golden import golden_prompts
from export.job import Job
from export.onnx_graphs.graphs import OnnxGraphs
from export.parity import run_rungs
from export.pipeline import export_model
from export.proof.ladder import load_trace
from export.proof.steppers import checkpoint_weights, static_model
from export.results import open_configured
from runtime import chat, classify, embed, generate, verify
from runtime.artifact.bounds import relative_bound
from runtime.artifact.consistency import check_manifest
from runtime.artifact.folder import Artifact
from runtime.decoding.labels import best_span
from runtime.engines.engine import Engine, Row
from runtime.engines.side_by_side import SideBySide
from runtime.errors import UserError
from runtime.server.running.served_model import open_served_model
from tests.helpers import reference, scripted_engine, serving
from tests.helpers.artifacts import ONE_LEVEL, Shifted, onnx_shifted, random_ids, torch_shifted
from tests.helpers.tiny import DEFAULTS, TOKENIZER_CONFIG, byte_tokenizer

WINDOW = 8
CACHE_LEN = 40
LENGTHS = (1, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 3)
BATCH = 2
PAD = 3  # an id that no row holds: transformers uses it to find a sequence's last token
LABELS = {0: "zero", 1: "one", 2: "two", 3: "three", 4: "four"}
TEXTS = ("a text", "another, longer than the window", "é")


@dataclass(frozen=True)
class Case:
    """A class of transformers, and how its checkpoint is compiled."""

    kind: type[transformers.PreTrainedModel]
    model: Mapping[str, Any]
    chunks: tuple[int, ...]
    head: str = "auto"
    ends: bool = False  # whether the tokenizer appends </s> to a text


CASES = {
    "sequence_classification": Case(
        MistralForSequenceClassification, {"sliding_window": WINDOW, "id2label": LABELS}, (4,)
    ),
    "token_classification": Case(MistralForTokenClassification, {"sliding_window": WINDOW, "id2label": LABELS}, (5,)),
    "question_answering": Case(MistralForQuestionAnswering, {"sliding_window": None}, (5,)),
    "embedding": Case(MistralForCausalLM, {"sliding_window": WINDOW}, (6,), head="embedding", ends=True),
}


@dataclass(frozen=True)
class Compiled:
    """A case's folder, which holds the checkpoint, and its artifact."""

    case: Case
    folder: Path
    config: CompileConfig
    checkpoint: Checkpoint
    graphs: OnnxGraphs
    artifact: Path

    @property
    def bound(self) -> float:
        return relative_bound(self.checkpoint.model, CACHE_LEN, "fp32")


def write_checkpoint(
    folder: Path, kind: type[transformers.PreTrainedModel], *, ends: bool = False, **changes: Any
) -> transformers.PreTrainedModel:
    """Write a random model of one layer and the byte tokenizer as transformers saves them.

    No bias is zero and no norm is one.
    """
    config = kind.config_class(**(DEFAULTS | {"num_hidden_layers": 1, "pad_token_id": PAD} | changes))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = kind(config).eval()
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "bias")):
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    tokenizer = byte_tokenizer(config.vocab_size)
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG | {"pad_token": "[INST]"}))
    return model


@pytest.fixture(scope="module")
def compile_head(tmp_path_factory):
    @cache
    def compiled(name: str) -> Compiled:
        case, folder = CASES[name], tmp_path_factory.mktemp(name)
        write_checkpoint(folder / "checkpoint", case.kind, ends=case.ends, **case.model)
        shape = {"prefill_chunk": list(case.chunks), "cache_len": CACHE_LEN}
        path = Path(f"{name}.yaml")
        with contextlib.chdir(folder):
            frontend = {"checkpoint": str(folder / "checkpoint"), "head": case.head}
            path.write_text(
                json.dumps(
                    {
                        "name": name,
                        "frontend": frontend,
                        "shape": shape,
                        "backend": {"target": "llvm", "cpu": ONE_LEVEL},
                    }
                )
            )
            job = Job.load(path)
            checkpoint, graphs = open_configured(job.config), export_model(job)
            compile_job(job)
        return Compiled(
            case, folder, job.config, checkpoint, OnnxGraphs.open(folder / graphs.path), folder / "out" / name
        )

    return compiled


@pytest.fixture(scope="module", params=CASES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def case(compile_head, name):
    return compile_head(name)


@pytest.fixture(scope="module")
def engine(case):
    return Engine.open(case.artifact, threads=1)


@pytest.fixture(scope="module")
def theirs(case):
    return case.case.kind.from_pretrained(case.folder / "checkpoint", attn_implementation="eager").eval()


def rows_of(length: int, vocab_size: int) -> list[list[int]]:
    """One row of the given length and one about half as long, both without the padding id."""
    rows = [random_ids(length, vocab_size, 1), random_ids(length // 2 + 1, vocab_size, 2)]
    return [[PAD + 1 if token == PAD else token for token in row] for row in rows]


def expected_outputs(model: transformers.PreTrainedModel, rows: list[list[int]]) -> list[NDArray[np.float32]]:
    """Outputs of transformers for each row of one batch, padded on the left.

    They are (tokens, n_outputs), or (1, n_outputs) for a whole sequence.
    """
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    with torch.no_grad():
        if isinstance(model, MistralForCausalLM):
            found = model.model(ids, attention_mask=mask).last_hidden_state
        else:
            answer = model(ids, attention_mask=mask)
            found = answer.logits if "logits" in answer else torch.stack([answer.start_logits, answer.end_logits], -1)
    if found.dim() == 2:
        return [row[None] for row in found.numpy()]
    return [row[-len(ids) :] for row, ids in zip(found.numpy(), rows, strict=True)]


def chunked_outputs(
    model: Shifted, rows: list[list[int]], size: int, *, every_token: bool
) -> list[NDArray[np.float32]]:
    """The same as `expected_outputs` for rows fed from position 0 in chunks of one size, padded on the left."""
    total = -(-max(map(len, rows)) // size) * size
    ids = np.array([[0] * (total - len(row)) + row for row in rows], np.int64)
    positions = np.array([range(len(row) - total, len(row)) for row in rows])
    outputs = []
    for start in range(0, total, size):
        columns = slice(start, start + size)
        answer, *model.caches = model.call(ids[:, columns], positions[:, columns], *model.caches)
        outputs.append(answer)
    joined = np.concatenate(outputs, axis=1) if every_token else outputs[-1]
    return [joined[i, -len(row) if every_token else -1 :] for i, row in enumerate(rows)]


def difference(found: list[NDArray[Any]], expected: list[NDArray[Any]]) -> float:
    """`reference.difference` over all rows together."""
    assert [row.shape for row in found] == [row.shape for row in expected]
    return reference.difference(np.concatenate(found), np.concatenate(expected))


@pytest.mark.parametrize("length", LENGTHS)
def test_static_torch(case, theirs, length):
    model = case.checkpoint.model
    module = static_model(model, CACHE_LEN, checkpoint_weights(case.checkpoint))
    rows = rows_of(length, model.vocab_size)
    expected = expected_outputs(theirs, rows)
    for size in (1, 3, WINDOW):
        found = chunked_outputs(
            torch_shifted(module, BATCH), rows, size, every_token=model.head != "sequence_classification"
        )
        assert difference(found, expected) <= case.bound, size


@pytest.mark.parametrize("length", LENGTHS)
def test_onnxruntime(case, theirs, length):
    model = case.checkpoint.model
    rows = rows_of(length, model.vocab_size)
    expected = expected_outputs(theirs, rows)
    for size in case.case.chunks:
        every_token = model.head != "sequence_classification"
        found = [chunked_outputs(onnx_shifted(case.graphs), [row], size, every_token=every_token)[0] for row in rows]
        assert difference(found, expected) <= case.bound, size


@pytest.mark.parametrize("length", LENGTHS)
def test_the_artifact(case, theirs, engine, length):
    rows = rows_of(length, case.checkpoint.model.vocab_size)
    expected = expected_outputs(theirs, rows)
    assert difference([engine.head_outputs(row) for row in rows], expected) <= case.bound
    assert engine.tokens(0) == []


def test_a_text_gives_the_same_bits_whatever_came_before_it(case, engine):
    long, short = rows_of(LENGTHS[-1], case.checkpoint.model.vocab_size)
    first = engine.head_outputs(short)
    for before in (long, short[::-1]):
        engine.head_outputs(before)
        assert np.array_equal(engine.head_outputs(short), first)


def test_every_rung_of_the_ladder(case, engine, tmp_path):
    rows = run_rungs(case.config, case.checkpoint, case.graphs, tmp_path / "trace.npz")
    rows += run_artifact_rungs(Artifact.open(case.artifact), *load_trace(tmp_path / "trace.npz"))
    assert sorted(row.rung for row in rows) == list("123445")
    assert all(row.passed for row in rows)


def test_the_manifest_says_what_the_graphs_give(case, engine, name):
    model = engine.manifest.model
    assert (model.head, [function.name for function in engine.manifest.functions]) == (
        name,
        [f"prefill_{size}" for size in case.case.chunks],
    )
    assert model.labels == (tuple(LABELS.values()) if "id2label" in case.case.model else None)
    stored = {weight.name for weight in engine.manifest.weights if weight.name.startswith("output")}
    assert (
        stored
        == {
            "sequence_classification": {"output.weight"},
            "token_classification": {"output.weight", "output.bias"},
            "question_answering": {"output.weight", "output.bias"},
            "embedding": set(),
        }[name]
    )


def run(command, capsys, *arguments: object) -> Any:
    assert command.main([*map(str, arguments), "--threads", "1"]) == 0
    return capsys.readouterr().out


def text_flags() -> list[str]:
    return [flag for text in TEXTS for flag in ("--text", text)]


def pipeline_of(task: str, compiled: Compiled) -> Any:
    return transformers.pipeline(task, str(compiled.folder / "checkpoint"), device="cpu", dtype=torch.float32)


def test_classify_labels_texts_as_the_pipeline_does(compile_head, capsys):
    case = compile_head("sequence_classification")
    expected = pipeline_of("text-classification", case)(list(TEXTS), top_k=None)
    found = json.loads(run(classify, capsys, case.artifact, *text_flags(), "--json"))
    assert [answer["text"] for answer in found] == list(TEXTS)
    for answer, scores in zip(found, expected, strict=True):
        assert [row["label"] for row in answer["scores"]] == [row["label"] for row in scores]
        assert [row["score"] for row in answer["scores"]] == pytest.approx([row["score"] for row in scores], rel=1e-4)
    lines = run(classify, capsys, case.artifact, *text_flags()).splitlines()
    assert lines == [f"{answer['label']} {answer['score']:.4f}" for answer in found]


def test_classify_labels_tokens_as_the_pipeline_does(compile_head, capsys):
    case = compile_head("token_classification")
    pipeline = pipeline_of("token-classification", case)
    found = json.loads(run(classify, capsys, case.artifact, *text_flags(), "--json"))
    for answer in found:
        expected = pipeline(answer["text"], ignore_labels=[])
        assert [(token["token"], token["label"]) for token in answer["tokens"]] == [
            (token["word"], token["entity"]) for token in expected
        ]
        assert [token["score"] for token in answer["tokens"]] == pytest.approx(
            [float(token["score"]) for token in expected], rel=1e-4
        )
    lines = run(classify, capsys, case.artifact, *text_flags()).splitlines()
    assert len(lines) == sum(len(answer["tokens"]) for answer in found)


def test_classify_answers_a_question(compile_head, capsys):
    """The likeliest span, over all spans of transformers' logits for the pair as its tokenizer encodes it."""
    case = compile_head("question_answering")
    question, limit = "which?", 4
    tokenizer = transformers.AutoTokenizer.from_pretrained(case.folder / "checkpoint")
    model = MistralForQuestionAnswering.from_pretrained(case.folder / "checkpoint").eval()
    texts = ("some text", "one more text")
    flags = [flag for text in texts for flag in ("--text", text)]
    found = json.loads(
        run(classify, capsys, case.artifact, "--question", question, *flags, "--max-answer-tokens", limit, "--json")
    )
    for answer, text in zip(found, texts, strict=True):
        pair = tokenizer(question, text, return_tensors="pt")["input_ids"]
        own = len(text)  # one token per byte
        with torch.no_grad():
            logits = model(pair)
        starts, ends = (end[0, -own:].double().softmax(0).numpy() for end in (logits.start_logits, logits.end_logits))
        score, start, end = max((starts[i] * ends[j], i, j) for i in range(own) for j in range(i, min(i + limit, own)))
        assert answer["answer"] == text[start : end + 1].strip()
        assert answer["score"] == pytest.approx(score, rel=1e-4)
    assert run(
        classify, capsys, case.artifact, "--question", question, *flags, "--max-answer-tokens", limit
    ).splitlines() == [f"{answer['answer']} {answer['score']:.4f}" for answer in found]


@pytest.mark.parametrize("pool", ["last", "mean"])
@pytest.mark.parametrize("normalize", [False, True])
def test_embed_pools_the_last_hidden_states(compile_head, capsys, pool, normalize):
    case = compile_head("embedding")
    states = pipeline_of("feature-extraction", case)  # runs the base model, which gives the last hidden state
    flags = ["--pool", pool, *(["--normalize"] if normalize else [])]
    found = json.loads(run(embed, capsys, case.artifact, *text_flags(), *flags, "--json"))
    for answer, text in zip(found, TEXTS, strict=True):
        hidden = np.array(states(text)[0])
        vector = hidden[-1] if pool == "last" else hidden.mean(0)
        vector = vector / np.linalg.norm(vector) if normalize else vector
        assert answer["tokens"] == len(hidden)
        # a pooled vector is smaller than its largest state
        assert reference.difference(np.array(answer["embedding"]), vector) <= 2 * case.bound
    lines = run(embed, capsys, case.artifact, *text_flags(), *flags).splitlines()
    assert [list(map(float, line.split())) for line in lines] == [
        pytest.approx(answer["embedding"]) for answer in found
    ]


@pytest.fixture
def serve_head(compile_head):
    """A running server of one of `CASES`."""
    with contextlib.ExitStack() as stack:
        yield lambda name: stack.enter_context(
            serving.running(lambda: open_served_model(compile_head(name).artifact, 1, 0))
        )


def test_the_server_embeds_as_the_command_does(compile_head, serve_head, capsys):
    case = compile_head("embedding")
    expected = json.loads(run(embed, capsys, case.artifact, *text_flags(), "--json"))
    server = serve_head("embedding")
    answer = server.ask("/v1/embeddings", {"model": serving.NAME, "input": TEXTS}).json
    assert [row["embedding"] for row in answer["data"]] == [one["embedding"] for one in expected]
    assert [row["index"] for row in answer["data"]] == list(range(len(TEXTS)))
    tokens = sum(one["tokens"] for one in expected)
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    packed = {
        "model": serving.NAME,
        "input": TEXTS[0],
        "encoding_format": "base64",
        "dimensions": case.checkpoint.model.dim,
    }
    (row,) = server.ask("/v1/embeddings", packed).json["data"]
    assert np.frombuffer(base64.b64decode(row["embedding"]), "<f4").tolist() == expected[0]["embedding"]
    ids = server.ask("/tokenize", {"prompt": TEXTS[0]}).json["tokens"]
    as_ids = server.ask("/v1/embeddings", {"model": serving.NAME, "input": [[*ids, 2], [5]]}).json["data"]
    assert as_ids[0]["embedding"] == expected[0]["embedding"]  # 2 ends a text here
    assert server.ask("/v1/embeddings", {"model": serving.NAME, "input": [*ids, 2]}).json["data"] == as_ids[:1]


@pytest.mark.parametrize("name", ["sequence_classification", "token_classification", "question_answering"])
def test_the_server_labels_as_the_command_does(compile_head, serve_head, capsys, name):
    question = ["--question", "which?"] if name == "question_answering" else []
    texts = [flag for text in TEXTS for flag in ("--text", text)]
    expected = json.loads(run(classify, capsys, compile_head(name).artifact, *texts, *question, "--json"))
    asked = {"model": serving.NAME, "input": TEXTS, **({"question": question[1]} if question else {})}
    found = serve_head(name).ask("/classify", asked).json
    assert [row["index"] for row in found["data"]] == list(range(len(TEXTS)))
    for row, one in zip(found["data"], expected, strict=True):
        common = row.keys() & one.keys()
        assert common >= {"tokens"} or "score" in common
        assert {key: row[key] for key in common} == {key: one[key] for key in common}
    if name == "sequence_classification":
        for row in found["data"]:
            scores = {each["label"]: each["score"] for each in row["scores"]}
            assert row["probs"] == [scores[label] for label in LABELS.values()]
            assert row["num_classes"] == len(LABELS)


def test_best_span_prefers_what_both_ends_say():
    logits = np.full((4, 2), -9, np.float32)
    logits[3, 0] = logits[1, 1] = 3  # a likely start after the likeliest end
    logits[0, 0] = logits[2, 1] = 1
    assert best_span(logits, 4) == best_span(logits, 2)
    assert (best_span(logits, 4).start, best_span(logits, 4).end) == (0, 1)
    assert best_span(logits, 1).start == best_span(logits, 1).end


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (
            transformers.MixtralForTokenClassification,
            {"num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": WINDOW},
        ),
        (transformers.MinistralForSequenceClassification, {"sliding_window": WINDOW, "id2label": LABELS}),
        (transformers.LlamaForQuestionAnswering, {}),
        (transformers.LlamaForSequenceClassification, {"num_labels": 1, "tie_word_embeddings": True}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_other_families(tmp_path, kind, changes):
    theirs = write_checkpoint(tmp_path, kind, **changes)
    checkpoint = open_checkpoint(tmp_path, "auto", {})
    module = static_model(checkpoint.model, CACHE_LEN, checkpoint_weights(checkpoint))
    rows = rows_of(LENGTHS[-1], checkpoint.model.vocab_size)
    found = chunked_outputs(
        torch_shifted(module, BATCH), rows, 5, every_token=checkpoint.model.head != "sequence_classification"
    )
    assert difference(found, expected_outputs(theirs, rows)) <= relative_bound(checkpoint.model, CACHE_LEN, "fp32")


def test_a_bare_model_is_an_embedding(tmp_path):
    """The same decoder with and without the prefix `model.` in its names; the head of the whole model is left out."""
    whole = write_checkpoint(tmp_path / "whole", MistralForCausalLM)
    bare = MistralModel(whole.config).eval()
    bare.load_state_dict(whole.model.state_dict())
    bare.save_pretrained(tmp_path / "bare")
    ours, forced = (
        open_checkpoint(tmp_path / "bare", "auto", {}),
        open_checkpoint(tmp_path / "whole", "auto", {}, head="embedding"),
    )
    assert ours.model == forced.model
    assert ours.names() == forced.names()
    assert all(np.array_equal(ours.tensor(name), forced.tensor(name)) for name in ours.names())
    assert "output.weight" not in ours.names()
    assert open_checkpoint(tmp_path / "whole", "auto", {}).model.head == "causal_lm"


def test_labels(tmp_path):
    def fields(**changes: Any) -> tuple[Any, ...]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        write_checkpoint(folder, MistralForSequenceClassification, **changes)
        model = open_checkpoint(folder, "auto", {}).model
        return model.n_labels, model.labels, model.label_scores

    assert fields() == (2, None, "softmax")  # transformers writes no names for the two labels that it assumes
    assert fields(num_labels=1)[::2] == (1, "sigmoid")
    assert fields(num_labels=1, problem_type="regression")[::2] == (1, "logits")
    assert fields(id2label=LABELS, problem_type="multi_label_classification") == (5, tuple(LABELS.values()), "sigmoid")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    write_checkpoint(folder, MistralForTokenClassification, id2label=LABELS)
    return folder


@pytest.mark.parametrize(
    ("changes", "head", "message"),
    [
        (
            {"architectures": ["MistralForRewards"]},
            "auto",
            r"architectures \['MistralForRewards'\], expected one of MistralForCausalLM, .*frontend.head",
        ),
        ({"architectures": ["MistralModel", "MistralForCausalLM"]}, "auto", "expected one of"),
        ({"architectures": "MistralModel"}, "auto", "expected one of"),
        ({"architectures": [["MistralModel"]]}, "auto", "expected one of"),
        ({}, "causal_lm", "lacks the tensor lm_head.weight"),
        ({}, "question_answering", "lacks the tensor qa_outputs.weight"),
        ({}, "sequence_classification", "holds the tensor score.bias.*no place"),
        ({}, "rewards", "frontend.head is rewards, .*expected auto or one of causal_lm, "),
        ({"id2label": {"0": "a"}}, "auto", r"score.weight has shape \(5, 64\), expected \(1, 64\)"),
        ({"id2label": {"0": "a", "2": "b"}}, "auto", "id2label with the keys 0, 2, expected 0 to 1"),
        ({"id2label": {"0": 7}}, "auto", "id2label"),
        ({"token_classification_bias": False}, "auto", "token_classification_bias"),
    ],
)
def test_refused_checkpoints(classifier, tmp_path, changes, head, message):
    for path in classifier.iterdir():
        (tmp_path / path.name).hardlink_to(path)
    config = json.loads((classifier / "config.json").read_text()) | changes
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message) as error:
        open_checkpoint(tmp_path, "auto", {}, head=head)
    assert "\n" not in str(error.value)


def test_commands_refuse_other_heads(compile_head, tmp_path, monkeypatch):
    labels, vectors, spans = (
        compile_head(name).artifact for name in ("token_classification", "embedding", "question_answering")
    )
    with pytest.raises(UserError, match=r"has the head token_classification, .*run `python -m runtime.classify`"):
        generate.main([str(labels), "--prompt", "a"])
    with pytest.raises(UserError, match=r"has the head embedding, .*run `python -m runtime.embed`"):
        chat.main([str(vectors)])
    with pytest.raises(UserError, match=r"run `python -m runtime.embed`"):
        classify.main([str(vectors), "--text", "a"])
    with pytest.raises(UserError, match=r"run `python -m runtime.classify`"):
        embed.main([str(labels), "--text", "a"])
    with pytest.raises(UserError, match="has the head token_classification; leave --question out"):
        classify.main([str(labels), "--text", "a", "--question", "b"])
    with pytest.raises(UserError, match="has the head question_answering; pass --question"):
        classify.main([str(spans), "--text", "a"])
    with pytest.raises(UserError, match="--text is empty"):
        classify.main([str(spans), "--text", "", "--question", "b"])
    with pytest.raises(UserError, match="--max-answer-tokens is 0"):
        classify.main([str(spans), "--text", "a", "--question", "b", "--max-answer-tokens", "0"])
    with pytest.raises(UserError, match="has the head embedding and no golden prompts to compare with"):
        verify.main([str(vectors)])
    scripted_engine.install(monkeypatch, tmp_path, scripted_engine.ScriptedEngine([]))
    with pytest.raises(UserError, match=r"has the head causal_lm, .*run `python -m runtime.generate`"):
        classify.main([str(tmp_path), "--text", "a"])


def test_the_engine_refuses_other_uses(engine):
    for use in (engine.prefill, engine.feed, lambda slot, ids: engine.step([Row(slot, ids[0])])):
        with pytest.raises(UserError, match="which generates no text; run"):
            use(0, [1])
    model = msgspec.structs.replace(engine.manifest.model, head="causal_lm")
    with pytest.raises(
        UserError, match=r"has the head causal_lm, which generates text; run `python -m runtime.generate`"
    ):
        replace(engine, manifest=msgspec.structs.replace(engine.manifest, model=model)).head_outputs([1])
    with pytest.raises(UserError, match="outside the vocabulary"):
        engine.head_outputs([1, engine.manifest.model.vocab_size])
    with pytest.raises(UserError, match="empty"):
        engine.head_outputs([])


def test_a_text_beyond_a_full_cache_is_refused(compile_head):
    engine = Engine.open(compile_head("question_answering").artifact, threads=1)
    assert len(engine.head_outputs([5] * CACHE_LEN)) == CACHE_LEN
    with pytest.raises(UserError, match="41 more tokens do not fit"):
        engine.head_outputs([5] * (CACHE_LEN + 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": "causal_lm", "n_labels": None, "labels": None}, r"the functions \(name, rows, tokens\) are"),
        ({"n_labels": None, "labels": None}, "has n_labels None, expected a number"),
        ({"head": "embedding"}, "has n_labels 5, expected none"),
        ({"labels": ("one",)}, "has 1 labels, expected n_labels = 5"),
        ({"tied_embeddings": True}, "is tied to the embeddings"),
        (
            {"head": "sequence_classification"},
            r"the function prefill_5 has 5 inputs, expected 6",
        ),
        ({"n_labels": 4, "labels": None}, r"expected label_logits \[1, 5, 4\]"),
    ],
)
def test_a_manifest_that_disagrees_is_refused(compile_head, changes, message):
    manifest = Engine.open(compile_head("token_classification").artifact, threads=1).manifest
    check_manifest(manifest, "m")
    with pytest.raises(UserError, match=message):
        check_manifest(msgspec.structs.replace(manifest, model=msgspec.structs.replace(manifest.model, **changes)), "m")
    weights = tuple(weight for weight in manifest.weights if weight.name != "output.bias")
    with pytest.raises(UserError, match=r"has the weights output.weight, expected output.weight, output.bias"):
        check_manifest(msgspec.structs.replace(manifest, weights=weights), "m")


def test_golden_prompts_of_heads(case, engine):
    """They are computed by torch, one layer at a time; the artifact gives the same, and a wrong number is found."""
    prompts = golden_prompts(case.graphs)
    assert [prompt.next_ids.size for prompt in prompts] == [0, 0]
    texts = SideBySide(engine, 1)
    checks = verify.replay(texts, prompts)
    assert [check.ok for check in checks] == [True, True], checks
    wrong = prompts[1].outputs.copy()
    wrong[-1, 0] += 0.01 * np.abs(wrong).max()
    assert [check.ok for check in verify.replay(texts, [replace(prompts[1], outputs=wrong)])] == [False]
