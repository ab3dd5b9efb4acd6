"""Goals: the best rival at the same number of bits, ratios round by round, shares of limits, and what was disturbed."""

import pytest

from build.bench import goals
from build.bench.contenders import LLAMA, OURS, SCHEMES, TRANSFORMERS
from build.bench.goals import Ratio, best_rival, goals_table, ratios
from build.bench.report import decode_speeds
from runtime.benchmarks.spread import Spread
from tests.helpers.bench_runs import contender, measured, outcome


def decoding(entry, *speeds, **more):
    return outcome(entry, *(measured(10 * speed, {64: speed, 4096: speed / 2}) for speed in speeds), **more)


INT8 = decoding(contender(OURS, "int8_dynamic"), 30.0, 40.0, 60.0)
FP32 = decoding(contender(OURS, "fp32"), 24.0, 24.0, 26.0)
LARGE = decoding(contender(OURS, "fp32", model="1.1B"), 5.0, 5.0, 5.0)
RIVALS = [
    decoding(contender(TRANSFORMERS, "fp32"), 10.0, 10.0, 90.0),
    decoding(contender(LLAMA, "F32"), 20.0, 20.0, 20.0, disturbed=True),
    decoding(contender(LLAMA, "Q8_0"), 20.0, 20.0, 20.0),
    decoding(contender(LLAMA, "F32", model="1.1B"), 4.0, 4.0, 4.0),
]
ALL = [INT8, FP32, LARGE, *RIVALS]


def by_what(outcomes):
    """Ratios by what is compared; of those over a rival and over a limit, the one over the rival."""
    return {ratio.what: ratio for ratio in reversed(ratios(outcomes, (64, 4096)))}


def test_the_best_rival_is_the_fastest_by_its_median_at_the_same_bits_and_with_the_same_model():
    def best(ours):
        return best_rival(ours, ALL, lambda found: decode_speeds(found, 64))

    assert best(FP32).entry.label == "llama.cpp F32"
    assert best(INT8).entry.label == "llama.cpp Q8_0"
    assert best(LARGE).entry.label == "llama.cpp F32, 1.1B"
    assert best_rival(decoding(contender(OURS, "fp16"), 1.0), ALL, lambda _: [1.0]) is None


def test_ratios_are_medians_of_those_of_each_round():
    found = by_what(ALL)
    assert found["decode, ours int8_dynamic"].measured == Spread.of([1.5, 2.0, 3.0])
    assert found["decode, ours int8_dynamic"].beside == "llama.cpp Q8_0"
    assert found["decode, ours fp32"].measured == Spread.of([1.2, 1.2, 1.3])
    assert found["prefill, ours fp32, 1.1B"].measured.median == 1.25


def test_shares_are_of_the_limits_beside_each_run():
    shares = {(r.what, r.beside): r for r in ratios([FP32], (64,))}
    assert set(shares) == {("decode, ours fp32", "read bandwidth"), ("prefill, ours fp32", "float32 peak")}
    assert shares["decode, ours fp32", "read bandwidth"].measured.median == 0.5  # 10 of 20 GB/s
    # 240 tokens of 1e9 operations, of 100 GFLOP/s
    assert shares["prefill, ours fp32", "float32 peak"].measured.median == pytest.approx(2.4)


def test_a_long_context_is_compared_with_a_short_one():
    ours = decoding(contender(OURS, goals.LONG_SCHEME), 30.0, 40.0)
    assert by_what([ours])[f"decode at 4096, ours {goals.LONG_SCHEME}"].measured.median == 0.5
    assert not [ratio for ratio in ratios([ours], (64,)) if "at 64" in ratio.beside]


@pytest.mark.parametrize(
    ("at_least", "disturbed", "expected"),
    [(1.5, False, "reached"), (1.6, False, "missed"), (None, False, ""), (1.5, True, "reached, disturbed")],
)
def test_verdicts(at_least, disturbed, expected):
    assert Ratio("a", "b", Spread(1.0, 1.5, 2.0), at_least, disturbed).verdict == expected


def test_a_ratio_with_a_disturbed_rival_is_marked():
    found = by_what(ALL)
    assert found["decode, ours fp32"].disturbed
    assert not found["decode, ours int8_dynamic"].disturbed


def test_the_table_has_a_row_for_each_ratio_and_one_for_memory():
    ours = outcome(contender(OURS, "int8"), measured(100.0, {64: 30.0}, held_mb=260.0))
    cells = [list(column.cells) for column in goals_table([ours], []).columns]
    assert cells == [["peak memory, MB"], ["weights and caches"], ["40"], ["<= 150"], ["reached"]]
    found = [Ratio("decode, ours int8", "llama.cpp Q8_0", Spread(1.25, 1.5, 2.0), None, False)]
    first = [column[0] for column in (list(column.cells) for column in goals_table([ours], found).columns)]
    assert first == ["decode, ours int8", "llama.cpp Q8_0", "1.50 (1.25-2.00)", "", ""]


def test_goals_are_of_schemes_that_are_compiled():
    named = {*goals.DECODE_GOALS, *goals.PREFILL_GOALS, *goals.READ_GOALS, *goals.PEAK_GOALS, goals.LONG_SCHEME}
    assert named <= set(SCHEMES)
