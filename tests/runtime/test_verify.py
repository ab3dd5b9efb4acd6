"""The self-check, with an engine whose caches are a list.

It must pass a correct engine and name each kind of wrong one.
"""

import json

import msgspec
import numpy as np
import pytest

from runtime import verify as module
from runtime.artifact.bounds import relative_bound
from runtime.artifact.golden import MAX_TOKENS, GoldenPrompt, sequence_length
from runtime.artifact.manifest import (
    Function,
    Manifest,
    ModelConfig,
    Quantization,
    Shape,
    Signature,
    TargetSpec,
    TensorSpec,
)
from runtime.errors import UserError
from runtime.verify import replay, table, verify

VOCAB, WINDOW, CHUNK = 50, 12, 8
MODEL = ModelConfig(
    family="mistral",
    dim=16,
    hidden_dim=64,
    n_layers=2,
    n_heads=2,
    n_kv_heads=1,
    head_dim=8,
    vocab_size=VOCAB,
    norm_eps=1e-5,
    rope_theta=1e4,
    sliding_window=(WINDOW, None),
    tied_embeddings=True,
)


def bound_of(manifest):
    return relative_bound(
        manifest.model, manifest.shape.cache_len, manifest.cache_dtype, rounding=manifest.quantization.rounding
    )


def manifest_of(*, windows=(WINDOW, None), chunks=(CHUNK, 4), cache_len=64, slots=2, dtype="fp32", kind="llvm"):
    return Manifest(
        schema_version=1,
        name="fake",
        build_key="",
        model=msgspec.structs.replace(MODEL, sliding_window=windows, n_layers=len(windows)),
        shape=Shape(slots=slots, step_rows=(1, 2), prefill_chunks=chunks, cache_len=cache_len),
        quantization=Quantization(scheme="none"),
        target=TargetSpec(kind=kind, dtype=dtype, cpu="x86-64-v3", cpu_features=()),
        functions=(
            Function(
                name="step_1",
                rows=1,
                tokens=1,
                signature=Signature(inputs=(TensorSpec(name="past", shape=(1,), dtype=STORED[dtype]),), outputs=()),
            ),
        ),
        weights=(),
        tokenizer=None,
        overrides={},
        tools={},
        files=(),
    )


STORED = {"fp32": "float32", "fp16": "float16"}


class FakeEngine:
    """Texts side by side whose logits are an age-weighted mean of the embeddings of the last WINDOW ids.

    So order and window both matter.
    """

    def __init__(self, manifest=None, room=None):
        self.manifest = manifest or manifest_of()
        self._limit = room
        self._embeddings = np.random.default_rng(1).standard_normal((VOCAB, VOCAB)).astype(np.float32)
        self.reset()

    @classmethod
    def open(cls, _path, threads, public_key, minimum_build=0):
        assert threads is None
        return cls()

    @property
    def slots(self):
        return self.manifest.shape.slots

    batch = slots

    def reset(self):
        self.rows = [[] for _ in range(self.batch)]

    def room(self):
        return None if self._limit is None else self._limit - len(self.rows[0])

    def visible(self, row):
        return row[-WINDOW:]

    def logits(self):
        return np.stack(
            [
                np.arange(1, len(seen) + 1, dtype=np.float32) @ self._embeddings[seen]
                for seen in map(self.visible, self.rows)
            ]
        )

    def append(self, columns):
        for row, new in zip(self.rows, columns, strict=True):
            row.extend(new)
        assert self._limit is None or len(self.rows[0]) <= self._limit

    def prefill(self, prompts):
        self.append(prompts)
        return self.logits()

    def decode(self, ids):
        self.append([[token_id] for token_id in ids])
        return self.logits()


class ForgetfulPrefill(FakeEngine):
    """A prefill that attends to the already rolled cache: it loses the window at a chunk's edge."""

    def prefill(self, prompts):
        self.append([prompt[len(prompt) // CHUNK * CHUNK :] for prompt in prompts])
        return self.logits()


class EndlessDecode(FakeEngine):
    """A decode without the window."""

    def decode(self, ids):
        self.visible = lambda row: row
        logits = super().decode(ids)
        del self.visible
        return logits


class LostCache(FakeEngine):
    """A correct prefill whose caches decode does not see."""

    def prefill(self, prompts):
        logits = super().prefill(prompts)
        self.reset()
        return logits


class OneWrongRow(FakeEngine):
    """A prefill that mixes up the rows of a batch."""

    def prefill(self, prompts):
        return super().prefill([prompts[0]] * len(prompts))


class NotANumber(FakeEngine):
    """One logit overflows at the third step."""

    def decode(self, ids):
        logits = super().decode(ids)
        if len(self.rows[0]) == 3:
            logits[0, 7] = np.nan
        return logits


class Imprecise(FakeEngine):
    """A prefill that is off by a hundredth, far more than float32 explains."""

    def prefill(self, prompts):
        return super().prefill(prompts) * np.float32(1.01)


class AnotherOrder(FakeEngine):
    """A prefill that is off by what another order of sums makes of float32."""

    def prefill(self, prompts):
        return super().prefill(prompts) * np.float32(1 + 2**-22)


def failed(engine):
    return [check.check for check in verify(engine) if not check.ok]


ONE_PREFILL = "one prefill against decode steps"
CONTINUED = f"prefill of {WINDOW}, then decode, against decode steps"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (FakeEngine, []),
        (ForgetfulPrefill, [ONE_PREFILL, CONTINUED]),
        (EndlessDecode, [ONE_PREFILL]),
        (LostCache, [CONTINUED]),
        (OneWrongRow, [ONE_PREFILL, CONTINUED]),
        (NotANumber, [f"logits of {WINDOW + 5} decode steps"]),
        (Imprecise, [ONE_PREFILL, CONTINUED]),
        (AnotherOrder, [ONE_PREFILL, CONTINUED]),
    ],
)
def test_faults_are_found(kind, expected):
    assert failed(kind()) == expected


def test_a_gpu_may_sum_in_other_orders():
    manifest = manifest_of(kind="cuda")
    assert failed(AnotherOrder(manifest)) == []
    assert failed(Imprecise(manifest)) == [ONE_PREFILL, CONTINUED]


def test_caches_are_left_empty():
    engine = FakeEngine()
    engine.prefill([[1], [2]])
    assert failed(engine) == []
    assert engine.rows == [[], []]


@pytest.mark.parametrize("room", [1, 3, 5, 6, 64])
def test_full_attention_stays_within_its_room(room):
    """The fake's `append` asserts that nothing beyond its room is ever fed."""
    assert failed(FakeEngine(manifest_of(windows=(None, None)), room=room)) == []


@pytest.mark.parametrize(
    ("options", "room", "length"),
    [
        ({}, None, WINDOW + 5),
        ({"windows": (4096, 64)}, None, 69),
        ({"windows": (4096,)}, None, CHUNK + 5),
        ({"windows": (4096,), "chunks": (512, 64)}, None, MAX_TOKENS),
        ({"windows": (None,), "cache_len": 64}, 64, 64),
        ({"windows": (None,), "cache_len": 2048}, 2048, CHUNK + 5),
    ],
)
def test_sequence_length(options, room, length):
    manifest = manifest_of(**options)
    assert sequence_length(manifest.model, manifest.shape, room) == length


def test_bound_in_numbers():
    """(8 * 2 + 2) sums of at most 64 terms, by hand: 2 * 18 * 8 * 2**-24; fp16 adds 2 * sqrt(18) * 2**-11."""
    assert bound_of(manifest_of()) == pytest.approx(1.7166e-5, rel=1e-4)
    assert bound_of(manifest_of(dtype="fp16")) == pytest.approx(1.7166e-5 + 4.1432e-3, rel=1e-4)


def test_bound_covers_what_another_order_of_summation_does():
    """Two orders of one float32 sum differ by less than the bound for a whole model; a wrong term differs by more."""
    rng = np.random.default_rng(3)
    weight, x = rng.standard_normal((VOCAB, 64)).astype(np.float32), rng.standard_normal(64).astype(np.float32)
    one, other = weight @ x, (weight[:, ::-1] * x[::-1]).cumsum(-1, dtype=np.float32)[:, -1]
    difference = np.abs(one - other).max() / np.abs(other).max()
    assert 0 < difference < bound_of(manifest_of())


def test_table_is_aligned():
    lines = table(verify(FakeEngine())).splitlines()
    assert [line.split()[-1] for line in lines] == ["ok", "yes", "yes", "yes", "yes"]
    column = lines[0].index("found")
    assert {line[column - 2 : column] for line in lines} == {"  "}
    assert all(line[column] != " " for line in lines)
    assert "NO" in table(verify(Imprecise()))


@pytest.fixture
def use_engine(monkeypatch):
    """Make `runtime.engines.engine` offer this class.

    The command imports the module when it starts; the real class needs a compiled library.
    """

    def use(kind):
        monkeypatch.setattr("runtime.engines.engine.Engine", kind)
        monkeypatch.setattr("runtime.engines.side_by_side.SideBySide", lambda engine, _batch: engine)

    return use


def test_command_prints_a_table(use_engine, capsys):
    use_engine(FakeEngine)
    assert module.main(["out/x"]) == 0
    assert capsys.readouterr().out.startswith("check ")


def test_command_prints_json(use_engine, capsys):
    use_engine(FakeEngine)
    assert module.main(["out/x", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["ok"] is True
    assert printed["checks"][0] == {"check": "files", "found": "1 sound", "expected": "1 sound", "ok": True}


def test_command_fails_in_one_sentence(use_engine, capsys):
    use_engine(Imprecise)
    with pytest.raises(
        UserError, match=rf"out/x does not compute .* \({ONE_PREFILL}: 1.0e-02 relative, expected at most 0.0e\+00"
    ):
        module.main(["out/x", "--json"])
    assert json.loads(capsys.readouterr().out)["ok"] is False


def golden_prompt(engine, ids, steps=3):
    """A golden prompt with the engine's own answer."""
    engine.reset()
    outputs, chosen = [engine.prefill([ids] * engine.batch)[0].copy()], []
    for _ in range(steps):
        chosen.append(int(outputs[-1].argmax()))
        outputs.append(engine.decode([chosen[-1]] * engine.batch)[0].copy())
    return GoldenPrompt(np.array(ids), np.stack(outputs), np.array(chosen))


def test_golden_prompts_hold_for_a_right_engine_and_fail_for_other_numbers():
    engine = FakeEngine()
    prompt = golden_prompt(engine, list(range(1, 2 * WINDOW)))
    assert [check.ok for check in replay(engine, [prompt])] == [True, True]
    other = prompt.outputs.copy()
    other[-1, 3] += 0.01 * np.abs(other[-1]).max()  # one logit of one step
    numbers, _ = replay(engine, [GoldenPrompt(prompt.ids, other, prompt.next_ids)])
    assert not numbers.ok
    swapped = prompt.outputs.copy()
    best = swapped[0].argmax()
    swapped[0, (best + 1) % VOCAB] = swapped[0, best] * 1.5  # another greedy token
    _, tokens = replay(engine, [GoldenPrompt(prompt.ids, swapped, prompt.next_ids)])
    assert not tokens.ok
    assert (
        tokens.found
        == f"{len(prompt.outputs) * engine.batch - engine.batch} of {len(prompt.outputs) * engine.batch} the same"
    )
    assert engine.room() == FakeEngine().room()
