"""What the project aims at: ratios within one run, to the best rival or to the machine's limits.

A rival is compared with at the same number of bits. llama.cpp multiplies 8 and 4 bits with activations that it rounds
to 8, and 16 bits with activations that it rounds to 16: so the goals at 8 and 4 bits are those of our dynamic schemes,
and a prefill's at 16 bits is that of `bf16_dot`. `int8` and `int4`, whose activations stay floats, are shown beside
rivals without a goal.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from rich.table import Table

from build.bench.contenders import OURS
from build.bench.report import decode_speeds, peak_shares, prefill_speeds, read_shares, result_of
from build.bench.rounds import Outcome
from runtime.benchmarks.spread import Spread

DECODE_GOALS: Mapping[str, float | None] = {  # our decode over the best rival's, by our scheme
    "fp32": 1.2,
    "bf16": 1.25,
    "bf16_dot": 1.25,
    "fp16": 1.25,
    "int8": None,
    "int8_dynamic": 1.7,
    "source": 1.6,
    "source_dynamic": None,
    "int4": None,
    "int4_dynamic": 1.6,
}
PREFILL_GOALS: Mapping[str, float | None] = {
    **DECODE_GOALS,
    "fp32": 1.3,
    "bf16": None,
    "bf16_dot": 1.5,
    "fp16": None,
    "int8_dynamic": 2.0,
    "source": 2.0,
    "int4_dynamic": 2.0,
}
READ_GOALS: Mapping[str, float | None] = {  # shares of the read bandwidth
    "fp32": 0.95,
    "bf16": 0.93,
    "bf16_dot": 0.93,
    "fp16": 0.93,
    "int8": 0.92,
    "int8_dynamic": 0.92,
    "int4_dynamic": 0.90,
}
PEAK_GOALS: Mapping[str, float | None] = {"fp32": 0.80, "bf16_dot": 0.75, "int8_dynamic": 0.75, "int4_dynamic": 0.75}
LONG_SCHEME, LONG_GOAL = "int8_dynamic-int8_cache", 0.75
MEMORY_GOAL_MB = 150.0  # of a running process, besides its weights and caches


@dataclass(frozen=True)
class Ratio:
    """A measured ratio, and what is aimed at, if anything is."""

    what: str
    beside: str
    measured: Spread
    at_least: float | None
    disturbed: bool  # one of the runs was

    @property
    def verdict(self) -> str:
        """Whether the goal is reached, and whether the measurement was disturbed."""
        found = [] if self.at_least is None else ["reached" if self.measured.median >= self.at_least else "missed"]
        return ", ".join([*found, *["disturbed"] * self.disturbed])


def ratios(outcomes: Sequence[Outcome], contexts: Sequence[int]) -> list[Ratio]:
    """Every ratio whose contenders ran; `contexts` are those of decode, of which the first is compared."""
    short = min(contexts)

    def decode(outcome: Outcome) -> list[float]:
        return decode_speeds(outcome, short)

    return [
        *_over_rivals(outcomes, "decode", decode, DECODE_GOALS),
        *_over_rivals(outcomes, "prefill", prefill_speeds, PREFILL_GOALS),
        *_shares(outcomes, "decode", read_shares, READ_GOALS, lambda _: "read bandwidth"),
        *_shares(outcomes, "prefill", peak_shares, PEAK_GOALS, _peak_name),
        *_long_contexts(outcomes, short, max(contexts)),
    ]


def best_rival(ours: Outcome, outcomes: Sequence[Outcome], speeds: Callable[[Outcome], list[float]]) -> Outcome | None:
    """The fastest rival with the same model at the same bits; None if none ran."""
    rivals = [o for o in outcomes if o.entry.what != OURS and o.entry.model == ours.entry.model]
    rivals = [o for o in rivals if o.entry.bits == ours.entry.bits]
    return max(rivals, key=lambda rival: median(speeds(rival)), default=None)


def _over_rivals(
    outcomes: Sequence[Outcome],
    figure: str,
    speeds: Callable[[Outcome], list[float]],
    goals: Mapping[str, float | None],
) -> list[Ratio]:
    found = []
    for ours in _ours(outcomes, goals):
        rival = best_rival(ours, outcomes, speeds)
        if rival is not None:
            measured = Spread.of_ratios(speeds(ours), speeds(rival))
            beside = f"{rival.entry.what} {rival.entry.scheme}"
            disturbed = bool(ours.disturbed or rival.disturbed)
            found.append(Ratio(f"{figure}, {ours.entry.label}", beside, measured, goals[ours.entry.scheme], disturbed))
    return found


def _shares(
    outcomes: Sequence[Outcome],
    figure: str,
    shares: Callable[[Outcome], list[float]],
    goals: Mapping[str, float | None],
    limit: Callable[[Outcome], str],
) -> list[Ratio]:
    return [
        Ratio(
            f"{figure}, {ours.entry.label}",
            limit(ours),
            Spread.of(shares(ours)),
            goals[ours.entry.scheme],
            bool(ours.disturbed),
        )
        for ours in _ours(outcomes, goals)
        if shares(ours)
    ]


def _peak_name(outcome: Outcome) -> str:
    return "" if outcome.entry.peak is None else f"{outcome.entry.peak.name} peak"


def _long_contexts(outcomes: Sequence[Outcome], short: int, long: int) -> list[Ratio]:
    return [
        Ratio(
            f"decode at {long}, {ours.entry.label}",
            f"at {short}",
            Spread.of_ratios(decode_speeds(ours, long), decode_speeds(ours, short)),
            LONG_GOAL,
            bool(ours.disturbed),
        )
        for ours in _ours(outcomes, {LONG_SCHEME: LONG_GOAL})
        if long > short
    ]


def _ours(outcomes: Sequence[Outcome], goals: Mapping[str, float | None]) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome.entry.what == OURS and outcome.entry.scheme in goals]


def goals_table(outcomes: Sequence[Outcome], found: Sequence[Ratio]) -> Table:
    """Tabulate each ratio beside its goal, and the most memory that any of ours holds besides weights and caches."""
    table = Table(title="ratios within this run, median (quartiles) of those of each round")
    for name in ("ours", "over", "ratio", "goal", ""):
        table.add_column(name, justify="right" if name in ("ratio", "goal") else "left")
    for ratio in found:
        goal = "" if ratio.at_least is None else f"{ratio.at_least:.2f}"
        table.add_row(ratio.what, ratio.beside, f"{ratio.measured:.2f}", goal, ratio.verdict)
    results = [result_of(outcome) for outcome in outcomes]
    over = [result.over_mb for result in results if result.over_mb is not None]
    if over:
        verdict = "reached" if max(over) <= MEMORY_GOAL_MB else "missed"
        goal = f"<= {MEMORY_GOAL_MB:.0f}"
        table.add_row("peak memory, MB", "weights and caches", f"{max(over):.0f}", goal, verdict)
    return table
