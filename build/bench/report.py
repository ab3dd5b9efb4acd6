"""The report of the bench: each contender's figures with their spread, as tables and JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from build.bench.rounds import Outcome, Run
from runtime.benchmarks.spread import Spread

SPREAD = "median (quartiles)"


@dataclass(frozen=True)
class Result:
    """Figures over the rounds: tokens per second of prefill and, by context, of decode; GB/s that decode reads.

    `of_read` and `of_peak` are shares of the limits that were measured beside each run.
    """

    prefill_tok_s: Spread
    ttft_s: Spread
    decode_tok_s: Mapping[int, Spread]
    gb_s: Spread  # at the first context
    of_read: Spread
    of_peak: Spread | None  # None if nothing says which arithmetic is used
    peak_rss_mb: float
    held_mb: float | None  # weights and caches, only for ours

    @property
    def over_mb(self) -> float | None:
        """Memory of ours besides weights and caches."""
        return None if self.held_mb is None else self.peak_rss_mb - self.held_mb


def prefill_speeds(outcome: Outcome) -> list[float]:
    """Tokens per second of the prompt, round by round."""
    return [run.measured.speeds.prefill[0].tok_s for run in outcome.runs]


def decode_speeds(outcome: Outcome, context: int) -> list[float]:
    """Tokens per second behind so many tokens, round by round; empty if that was not measured."""
    return [d.tok_s for run in outcome.runs for d in run.measured.speeds.decode if d.context == context]


def read_shares(outcome: Outcome) -> list[float]:
    """The share of the read bandwidth that decode reaches at the first context, round by round."""
    return [run.measured.speeds.decode[0].gb_s / run.limits.read.best for run in outcome.runs]


def peak_shares(outcome: Outcome) -> list[float]:
    """The share of the peak of its arithmetic that a prefill reaches, round by round; empty if that is not known."""
    peak, operations = outcome.entry.peak, outcome.entry.operations
    if peak is None:
        return []

    def possible(run: Run) -> float:
        return run.limits.peaks[peak.level][peak.name].best / peak.times

    speeds = prefill_speeds(outcome)
    return [speed * operations / 1e9 / possible(run) for speed, run in zip(speeds, outcome.runs, strict=True)]


def result_of(outcome: Outcome) -> Result:
    """The figures of one contender."""
    measured = [run.measured for run in outcome.runs]
    contexts = [d.context for d in measured[0].speeds.decode]
    of_peak = peak_shares(outcome)
    return Result(
        prefill_tok_s=Spread.of(prefill_speeds(outcome)),
        ttft_s=Spread.of([one.speeds.prefill[0].ttft_s for one in measured]),
        decode_tok_s={context: Spread.of(decode_speeds(outcome, context)) for context in contexts},
        gb_s=Spread.of([one.speeds.decode[0].gb_s for one in measured]),
        of_read=Spread.of(read_shares(outcome)),
        of_peak=Spread.of(of_peak) if of_peak else None,
        peak_rss_mb=max(one.peak_rss_mb for one in measured),
        held_mb=measured[0].held_mb,
    )


def decode_table(outcomes: Sequence[Outcome]) -> Table:
    """Decode: tokens per second behind each context, and the share of the read bandwidth at the first one."""
    results = [result_of(outcome) for outcome in outcomes]
    contexts = sorted({context for result in results for context in result.decode_tok_s})
    table = _table(
        f"decode: tokens per second, {SPREAD}",
        *(f"at {context}" for context in contexts),
        "GB/s",
        "of read",
        "disturbed",
    )
    for outcome, result in zip(outcomes, results, strict=True):
        table.add_row(
            outcome.entry.label,
            *(f"{result.decode_tok_s[n]:.1f}" if n in result.decode_tok_s else "" for n in contexts),
            f"{result.gb_s.median:.1f}",
            f"{result.of_read.median:.2f}",
            _disturbed(outcome),
        )
    return table


def prefill_table(outcomes: Sequence[Outcome], prompt: int) -> Table:
    """Prefill: tokens per second, time to the first token, and the share of the peak of its arithmetic."""
    table = _table(f"prefill of {prompt} tokens: {SPREAD}", "tok/s", "TTFT ms", "of peak", "peak", "disturbed")
    for outcome in outcomes:
        result, peak = result_of(outcome), outcome.entry.peak
        table.add_row(
            outcome.entry.label,
            f"{result.prefill_tok_s:,.0f}",
            f"{result.ttft_s.median * 1e3:,.0f}",
            "" if result.of_peak is None else f"{result.of_peak:.2f}",
            "" if peak is None else peak.name,
            _disturbed(outcome),
        )
    return table


def memory_table(outcomes: Sequence[Outcome]) -> Table:
    """The most memory of each process and, of ours, how much of it is neither weights nor caches; time to compile."""
    table = _table("memory, and seconds to compile", "peak MB", "over weights and caches, MB", "compile s")
    for outcome in outcomes:
        result, compile_s = result_of(outcome), outcome.entry.compile_s
        table.add_row(
            outcome.entry.label,
            f"{result.peak_rss_mb:,.0f}",
            "" if result.over_mb is None else f"{result.over_mb:,.0f}",
            "" if compile_s is None else f"{compile_s:.0f}",
        )
    return table


def limits_table(outcomes: Sequence[Outcome]) -> Table:
    """The limits beside all runs: how far they moved says how far figures of this bench can be trusted."""
    runs = [run for outcome in outcomes for run in outcome.runs]
    found = [run.limits for run in runs]
    table = Table(title="the machine's limits beside the runs")
    for name in ("limit", "median (quartiles)", "least", "most"):
        table.add_column(name, justify="left" if name == "limit" else "right")
    rows = {"reading, GB/s": [limits.read.best for limits in found]}
    for level, names in found[0].peaks.items():
        for name in names:
            rows[f"{name} on {level}, GFLOP/s"] = [limits.peaks[level][name].best for limits in found]
    for name, values in rows.items():
        digits = 1 if "GB/s" in name else 0
        ends = (f"{end(values):,.{digits}f}" for end in (min, max))
        table.add_row(name, f"{Spread.of(values):,.{digits}f}", *ends)
    return table


def _table(title: str, *headers: str) -> Table:
    """A table with a row for each contender."""
    table = Table(title=title)
    table.add_column("contender")
    for header in headers:
        table.add_column(header, justify="left" if header == "peak" else "right")
    return table


def _disturbed(outcome: Outcome) -> str:
    return f"{outcome.disturbed} of {len(outcome.runs)}" if outcome.disturbed else ""


def markdown(table: Table) -> str:
    """A table as Markdown, under its title."""
    headers = [str(column.header) for column in table.columns]
    rules = ["---:" if column.justify == "right" else "---" for column in table.columns]
    rows = zip(*(map(str, column.cells) for column in table.columns), strict=True)
    lines = [f"| {' | '.join(cells)} |" for cells in (headers, *rows)]
    return "\n".join([f"{table.title}:\n", lines[0], f"|{'|'.join(rules)}|", *lines[1:]])


def write_json(
    path: Path, machine: str, outcomes: Sequence[Outcome], goals: Sequence[object], how: Mapping[str, object]
) -> None:
    """Write all figures, of every run, for programs to read; `goals` are records of what is aimed at."""
    record = {
        "machine": machine,
        **how,
        "results": [
            {
                **{key: getattr(outcome.entry, key) for key in ("what", "scheme", "model", "level", "compile_s")},
                **asdict(result_of(outcome)),
                "disturbed": outcome.disturbed,
                "runs": [asdict(run) for run in outcome.runs],
            }
            for outcome in outcomes
        ],
        "goals": goals,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
