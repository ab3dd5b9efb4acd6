"""The ladder's cases and comparisons: what each rung is fed, and what counts as a failure."""

import numpy as np
import pytest

from export.proof.ladder import Case, compare, lengths, load_trace, make_cases, pairs_with, save_trace, ways_agree
from runtime.artifact.manifest import ModelConfig, Shape


def model(*windows):
    return ModelConfig(
        family="mistral",
        dim=8,
        hidden_dim=8,
        n_layers=len(windows),
        n_heads=2,
        n_kv_heads=1,
        head_dim=4,
        vocab_size=50,
        norm_eps=1e-5,
        rope_theta=1e4,
        sliding_window=windows,
        tied_embeddings=False,
    )


SHAPE = Shape(slots=3, step_rows=(1, 2, 4), prefill_chunks=(16, 4), cache_len=100)


def test_lengths_surround_each_window():
    assert lengths(model(32, 32), SHAPE) == [1, 31, 32, 33, 67]
    assert lengths(model(8, 32), SHAPE) == [1, 7, 8, 9, 19, 31, 32, 33, 67]


def test_without_a_window_lengths_surround_the_chunks_and_fit_the_cache():
    assert lengths(model(None), SHAPE) == [1, 3, 4, 5, 11, 15, 16, 17, 35]
    assert max(lengths(model(None), Shape(slots=1, step_rows=(1,), prefill_chunks=(16,), cache_len=16))) == 16


def test_every_length_runs_in_every_chunk_and_some_one_by_one():
    alone = [case for case in make_cases(model(32), SHAPE) if len(case.sequences) == 1]
    by_length = {}
    for case in alone:
        by_length.setdefault(len(case.sequences[0]), set()).add(case.schedule)
    assert set(by_length) == {1, 31, 32, 33, 67}
    assert by_length[67] == {(16,) * 5, (4,) * 17, (4,) * 8 + (1,) * 35, (1,) * 67}


def test_steps_of_several_rows_get_sequences_of_different_lengths():
    """As many as there are rows, and no more of them than slots hold anything."""
    found = {
        len(case.sequences): [len(ids) for ids in case.sequences]
        for case in make_cases(model(32), SHAPE)
        if len(case.sequences) > 1
    }
    assert found == {2: [48, 24], 4: [48, 36, 24, 0]}
    assert all(case.schedule == (1,) * 48 for case in make_cases(model(32), SHAPE) if len(case.sequences) > 1)


def test_padding_is_on_the_left_of_the_first_chunk_at_negative_positions():
    case = Case("", (np.arange(10, 15),), (4, 4))
    assert case.padding == 3
    assert [(ids.tolist(), first.tolist()) for ids, first in case.calls()] == [
        ([[0, 0, 0, 10]], [-3]),
        ([[11, 12, 13, 14]], [1]),
    ]
    assert [end.tolist() for end in case.ends()] == [[0], [4]]


def test_sequences_end_together_each_at_its_own_positions():
    case = Case("", (np.array([5, 6, 7]), np.array([8]), np.array([], np.int64)), (1, 1, 1))
    assert [(ids[:, 0].tolist(), first.tolist()) for ids, first in case.calls()] == [
        ([5, 0, 0], [0, -2, -3]),
        ([6, 0, 0], [1, -1, -2]),
        ([7, 8, 0], [2, 0, -1]),
    ]
    assert [end.tolist() for end in case.ends()] == [[0, -2, -3], [1, -1, -2], [2, 0, -1]]


def test_rows_of_padding_are_not_compared():
    case = Case("", (np.array([7]), np.array([8, 9])), (4, 1, 1))
    assert [end.tolist() for end in case.ends()] == [[-2, -1], [-1, 0], [0, 1]]
    answers = [[np.array([[i], [10 + i]]) for i in range(3)]]
    assert [found[:, 0].tolist() for found, _ in pairs_with([case], answers, answers)] == [[11], [2, 12]]


def test_ways_compare_the_same_ids_in_other_chunks():
    ids, other = (np.array([1, 2]),), (np.array([1, 3]),)
    cases = [Case("", ids, (2,)), Case("", other, (2,)), Case("", ids, (1, 1))]
    answers = [[np.array([[1.0]])], [np.array([[5.0]])], [np.array([[9.0]]), np.array([[2.0]])]]
    assert [(a.item(), b.item()) for a, b in ways_agree(cases, answers)] == [(2.0, 1.0)]


@pytest.mark.parametrize(("error", "passed"), [(0.0, True), (0.9e-3, True), (1.1e-3, False), (np.nan, False)])
def test_a_difference_beyond_the_bound_or_no_number_fails(error, passed):
    expected = np.array([[1.0, -10.0, 3.0]])
    row = compare("3", "x", [(expected, expected), (expected + np.array([[0, 10 * error, 0]]), expected)], bound=1e-3)
    assert row.passed is passed


def test_top1_agreement_is_a_share_of_rows():
    a, b = np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([[0.0, 1.0], [0.0, 1.0]])
    row = compare("3", "x", [(a, b)], bound=10)
    assert row.top1_agreement == 0.5
    assert row.max_abs == 1.0


def test_a_trace_survives_the_disk(tmp_path):
    every = make_cases(model(8), SHAPE)
    cases = [*every[:2], every[-1]]  # the last of several rows, one of which is empty
    logits = [case.run(lambda ids, first: np.full((len(ids), 5), first[0] + ids.sum(), np.float32)) for case in cases]
    save_trace(tmp_path / "t.npz", cases, logits)
    read, answers = load_trace(tmp_path / "t.npz")

    def plain(cases):
        return [(case.label, [ids.tolist() for ids in case.sequences], case.schedule) for case in cases]

    assert plain(read) == plain(cases)
    assert all(
        np.array_equal(a, b)
        for one, other in zip(answers, logits, strict=True)
        for a, b in zip(one, other, strict=True)
    )
