"""lm-evaluation-harness itself on an artifact, with tasks that need no network."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from build.tools.lm_eval.__main__ import main
from build.tools.lm_eval.scoring import Scorer
from runtime.engines.engine import Engine
from runtime.errors import UserError
from runtime.text.tokenizer import open_tokenizer
from tests.helpers.artifacts import bound, effective_weights

pytest.importorskip("lm_eval", exc_type=ImportError, reason="needs `make setup EVAL=1`")

TASKS = Path(__file__).parent / "tasks"
DOCUMENTS = [json.loads(line) for line in (TASKS / "lines.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def artifact(compile_case):
    return compile_case("batched").artifact


@pytest.fixture(scope="module")
def scorer(artifact):
    engine = Engine.open(artifact)
    return Scorer(engine, open_tokenizer(engine.manifest.tokenizer, engine.folder))


def test_the_harness_reports_what_the_scorer_finds(artifact, scorer, tmp_path, monkeypatch, capsys):
    """Accuracy, bits per byte and exact matches, worked out from the scorer's own answers."""
    monkeypatch.chdir(TASKS)  # where the tasks' data files are
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "results.json"
    names = ["tiny_choice", "tiny_text", "tiny_answer"]
    flags = ["--tasks", ",".join(names), "--tasks-folder", str(TASKS), "--json", str(path)]
    assert main([str(artifact), *flags]) == 0
    results = json.loads(path.read_text())

    right = 0
    for document in DOCUMENTS:
        pairs = [(document["question"], f" {choice}") for choice in document["choices"]]
        scores = [score for score, _ in scorer.loglikelihood(pairs)]
        right += scores.index(max(scores)) == document["answer"]
    assert results["tiny_choice"]["acc,none"] == pytest.approx(right / len(DOCUMENTS))

    texts = [document["text"] for document in DOCUMENTS]
    bits = -sum(scorer.loglikelihood_rolling(texts)) / math.log(2) / sum(len(text.encode()) for text in texts)
    assert results["tiny_text"]["bits_per_byte,none"] == pytest.approx(bits)

    settings = {"until": ["\n"], "max_gen_toks": 8}
    answers = scorer.generate_until([(document["question"], settings) for document in DOCUMENTS])
    wanted = [document["choices"][document["answer"]] for document in DOCUMENTS]
    matches = [found == right for found, right in zip(answers, wanted, strict=True)]
    assert results["tiny_answer"]["exact_match,none"] == pytest.approx(sum(matches) / len(matches))
    assert "tiny_choice" in capsys.readouterr().out


def test_answers_are_those_of_the_harness_with_transformers(compile_case, scorer, tmp_path, monkeypatch):
    """The harness's own adapter for transformers asks the same checkpoint, and both see the same requests.

    A log-likelihood is off by at most twice as much as the logits, for each token. That adapter asks for whole texts
    with bos twice where the tokenizer adds it, so these are not compared.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    from build.tools.lm_eval.harness import ArtifactModel

    case = compile_case("batched")
    monkeypatch.chdir(TASKS)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def answers(model, **settings):
        manager = TaskManager(include_path=str(TASKS), include_defaults=False)
        names = ["tiny_choice", "tiny_answer"]
        samples = lm_eval.simple_evaluate(model=model, tasks=names, task_manager=manager, **settings)["samples"]
        return {name: [answer for sample in samples[name] for answer in sample["filtered_resps"]] for name in names}

    theirs = answers("hf", model_args=f"pretrained={case.folder / 'checkpoint'},device=cpu,dtype=float32")
    ours = answers(ArtifactModel(scorer))
    assert len(ours["tiny_choice"]) == sum(len(document["choices"]) for document in DOCUMENTS)
    # a token of a byte-level vocabulary is a byte; no logit is larger than the norms of a state and of a head's row
    weights = effective_weights(case.graphs)
    head = np.linalg.norm(weights["output.weight"], axis=1).max()
    largest = head * np.sqrt(case.checkpoint.model.dim) * np.abs(weights["norm.weight"]).max()
    tolerance = 2 * len(" of light") * bound(case.graphs) * largest
    for (found, greedy), (expected, same) in zip(ours["tiny_choice"], theirs["tiny_choice"], strict=True):
        assert found == pytest.approx(expected, abs=tolerance)
        assert greedy == same
    assert ours["tiny_answer"] == theirs["tiny_answer"]


def test_an_unknown_task_is_refused(artifact):
    with pytest.raises(UserError, match="--tasks names no_such_task, which lm_eval does not know"):
        main([str(artifact), "--tasks", "no_such_task"])
