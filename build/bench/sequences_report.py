"""The report of sequences side by side: tokens per second, ratios with their quartiles, and goals."""

from collections.abc import Mapping
from dataclasses import dataclass

from rich.table import Table

from build.bench.contenders import LLAMA, OURS
from build.bench.sequences import CONTEXTS, PAIRS, Case, Samples
from runtime.benchmarks.spread import Spread

SHORT = CONTEXTS[0]
AHEAD = 1.0  # the goal of each ratio to llama.cpp


@dataclass(frozen=True)
class SpeedUpGoal:
    """How many times the speed of one sequence so many are to have together, at the short context."""

    scheme: str
    sequences: int
    at_least: float


SPEED_UP_GOALS = (SpeedUpGoal("int8", 4, 2.6), SpeedUpGoal("fp32", 8, 5.0))


def speed_ups(samples: Samples) -> dict[Case, Spread]:
    """Tokens per second over those of one sequence, round by round."""
    return {
        case: Spread.of_ratios(tok_s, samples[case._replace(sequences=1)])
        for case, tok_s in samples.items()
        if case.sequences > 1 and case._replace(sequences=1) in samples
    }


def over_rival(samples: Samples) -> dict[Case, Spread]:
    """Our tokens per second over those of llama.cpp with weights of the same kind, round by round."""
    rivals = {f"{OURS} {scheme}": f"{LLAMA} {kind}" for scheme, kind in PAIRS.items()}
    pairs = {case: case._replace(label=rivals[case.label]) for case in samples if case.label in rivals}
    return {case: Spread.of_ratios(samples[case], samples[rival]) for case, rival in pairs.items() if rival in samples}


def sequences_tables(samples: Samples) -> list[Table]:
    """One table for the figures and one for each kind of ratio, and the goals."""
    medians = {case: f"{Spread.of(tok_s).median:,.1f}" for case, tok_s in samples.items()}
    tables = [_cells_table("sequences side by side: tokens per second in all, medians", medians)]
    for title, found in (
        ("times the speed of one sequence, median (quartiles)", speed_ups(samples)),
        (f"times the speed of {LLAMA}, median (quartiles)", over_rival(samples)),
    ):
        if found:
            tables.append(_cells_table(title, {case: f"{spread:.2f}" for case, spread in found.items()}))
    return [*tables, goals_table(samples)]


def _cells_table(title: str, cells: Mapping[Case, str]) -> Table:
    """One row for each contender at each context, one column for each number of sequences."""
    counts = sorted({case.sequences for case in cells})
    table = Table(title=title)
    for header in ("engine", "context", *map(str, counts)):
        table.add_column(header, justify="left" if header == "engine" else "right")
    for context in sorted({case.context for case in cells}):
        for label in dict.fromkeys(case.label for case in cells):
            table.add_row(label, str(context), *(cells.get(Case(label, context, n), "") for n in counts))
    return table


def goals_table(samples: Samples) -> Table:
    """Each speed-up that is aimed at, and for each pair of engines the case in which ours is least ahead."""
    table = Table(title="goals of sequences side by side")
    for header in ("ratio", "measured", "goal", ""):
        table.add_column(header, justify="right" if header in ("measured", "goal") else "left")
    ups, ahead = speed_ups(samples), over_rival(samples)
    for goal in SPEED_UP_GOALS:
        case = Case(f"{OURS} {goal.scheme}", SHORT, goal.sequences)
        if case in ups:
            _add_goal(
                table, f"{goal.sequences} sequences / one, {goal.scheme}, context {SHORT}", ups[case], goal.at_least
            )
    for scheme, kind in PAIRS.items():
        ours = {case: spread for case, spread in ahead.items() if case.label == f"{OURS} {scheme}"}
        if ours:
            case, least = min(ours.items(), key=lambda item: item[1].median)
            what = f"{scheme} / {LLAMA} {kind}, least ahead: {case.sequences} sequences, context {case.context}"
            _add_goal(table, what, least, AHEAD)
    return table


def _add_goal(table: Table, what: str, measured: Spread, at_least: float) -> None:
    verdict = "reached" if measured.median >= at_least else "missed"
    table.add_row(what, f"{measured:.2f}", f"{at_least:.2f}", verdict)
