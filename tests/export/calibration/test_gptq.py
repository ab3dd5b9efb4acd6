"""GPTQ against the problem that it solves, written in another way in float64."""

import numpy as np
import pytest
import torch

from export.calibration.gptq import DAMPING, Solver
from export.weights.scale_search import search

SIZE = 32


def correlated(tokens=512, k=64, seed=0):
    """Inputs whose columns depend on each other, some of them large."""
    generator = np.random.default_rng(seed)
    mixed = generator.standard_normal((tokens, k // 4)) @ generator.standard_normal((k // 4, k))
    return ((mixed + generator.standard_normal((tokens, k))) * np.exp(generator.standard_normal(k))).astype(np.float32)


def matrix(n=12, k=64, seed=1):
    return np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)


def second_moment(inputs):
    return torch.from_numpy(inputs.T @ inputs / len(inputs))


def restored(numbers, scales):
    scale, zero = (np.repeat(part.astype(np.float64), SIZE, 1) for part in (scales.scale, scales.zero))
    return (numbers - zero) * scale


def in_turn(rows, moment, scales):
    """Round a column at a time; after each, the others take the values that make up best for all errors so far.

    For errors e of the rounded columns Q, the columns R that minimise the quadratic form change by -H_RR^-1 H_RQ e.
    """
    moment = moment.astype(np.float64) + DAMPING * np.trace(moment) / len(moment) * np.eye(len(moment))
    order = np.argsort(-np.diag(moment), kind="stable")
    scale, zero = (np.repeat(part.astype(np.float64), SIZE, 1) for part in (scales.scale, scales.zero))
    rounded, current = np.zeros(rows.shape), rows.astype(np.float64)
    numbers = np.zeros(rows.shape, np.uint8)
    for i, column in enumerate(order):
        numbers[:, column] = np.clip(np.rint(current[:, column] / scale[:, column]) + zero[:, column], 0, 15)
        rounded[:, column] = (numbers[:, column] - zero[:, column]) * scale[:, column]
        done, rest = order[: i + 1], order[i + 1 :]
        error = rounded[:, done] - rows[:, done]
        current[:, rest] = rows[:, rest] - error @ moment[np.ix_(done, rest)] @ np.linalg.inv(
            moment[np.ix_(rest, rest)]
        )
    return numbers


@pytest.mark.parametrize("zero_points", [False, True])
def test_it_solves_the_problem_that_it_states(zero_points):
    """The same numbers, but where float32 and float64 end up on different sides of a half."""
    rows, moment = matrix(), second_moment(correlated())
    scales = search(rows, SIZE, moment.diagonal().numpy(), zero_points=zero_points)
    expected = in_turn(rows, moment.numpy(), scales)
    found = Solver.of(moment).rounded(rows, scales)
    assert np.mean(found != expected) < 0.01
    nearest = scales.rounded(rows)
    assert np.mean(nearest != expected) > 0.1  # the reference is no rounding to nearest


def test_more_columns_than_are_solved_together():
    rows, moment = matrix(k=320), second_moment(correlated(k=320, tokens=1024))
    scales = search(rows, SIZE, None, zero_points=False)
    assert np.mean(Solver.of(moment).rounded(rows, scales) != in_turn(rows, moment.numpy(), scales)) < 0.02


@pytest.mark.parametrize("zero_points", [False, True])
def test_the_outputs_are_nearer_on_other_inputs_too(zero_points):
    inputs = correlated(tokens=1024)
    rows, seen, unseen = matrix(64), inputs[:512], inputs[512:]
    scales = search(rows, SIZE, np.square(seen).mean(0), zero_points=zero_points)
    found = restored(Solver.of(second_moment(seen)).rounded(rows, scales), scales)
    nearest = restored(scales.rounded(rows), scales)
    for tokens in (seen, unseen):
        solved, plain = (np.linalg.norm(tokens @ (weights - rows).T) for weights in (found, nearest))
        assert solved < 0.8 * plain


def test_rows_can_be_rounded_a_few_at_a_time():
    rows, solver = matrix(), Solver.of(second_moment(correlated()))
    whole = solver.rounded(rows, search(rows, SIZE, None, zero_points=False))
    parts = [solver.rounded(part, search(part, SIZE, None, zero_points=False)) for part in (rows[:5], rows[5:])]
    assert np.mean(whole != np.concatenate(parts)) < 0.01  # sums may be added up in another order


def test_damping_rises_until_the_moment_is_positive_definite():
    """By tens: with an eigenvalue of -0.05 times the mean of the diagonal, one percent is too little."""
    values = np.ones(16)
    values[0] = -0.05
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((16, 16)))[0]
    moment = torch.from_numpy((basis * values @ basis.T).astype(np.float32))
    assert Solver.of(moment).damping == pytest.approx(0.1)
    assert Solver.of(torch.eye(4)).damping == DAMPING


def test_columns_that_were_never_used_are_rounded_to_nearest():
    inputs, rows = correlated(), matrix()
    inputs[:, 3:7] = 0
    scales = search(rows, SIZE, None, zero_points=False)
    found = Solver.of(second_moment(inputs)).rounded(rows, scales)
    assert np.array_equal(found[:, 3:7], scales.rounded(rows)[:, 3:7])
