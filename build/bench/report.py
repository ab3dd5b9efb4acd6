"""The report of the bench: medians, ratios beside the project's goals, a table and JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from build.bench.contenders import GENAI, LARGE_LABEL, LLAMA, ONNXRUNTIME, OURS, TRANSFORMERS
from build.tools.llama_files import AS_IT_IS

PROMPT = 512
CONTEXTS = (64, 1024, 4096)
SHORT, LONG = CONTEXTS[0], CONTEXTS[-1]
MACHINE = "machine"


@dataclass(frozen=True)
class Result:
    """Medians over the rounds.

    Tokens per second of prefill and, by context, of decode; GB/s that decode reads at the short context.
    """

    what: str
    scheme: str
    prefill_tok_s: float
    ttft_s: float
    decode_tok_s: dict[int, float]
    gb_s: float
    peak_rss_mb: float
    held_mb: float | None = None  # weights and caches, only for ours
    compile_s: float | None = None


@dataclass(frozen=True)
class MachineLimits:
    """The machine's limits while the rounds ran: the best figures that were measured between them."""

    read_gb_s: float
    float32_gflop_s: float


@dataclass(frozen=True)
class Goal:
    """A ratio that the project aims at: our figure over a rival's, over another of ours, or over the machine limit."""

    what: str
    ours: tuple[str, str]  # scheme, figure
    other: tuple[str, str, str]  # contender, scheme, figure
    at_least: float


GOALS = (
    Goal("decode fp32 / onnxruntime fp32, same graph", ("fp32", "decode"), (ONNXRUNTIME, "fp32", "decode"), 1.6),
    Goal("decode fp32 / transformers fp32", ("fp32", "decode"), (TRANSFORMERS, "fp32", "decode"), 1.6),
    Goal("decode fp32 / llama.cpp F32", ("fp32", "decode"), (LLAMA, "F32", "decode"), 1.15),
    Goal("decode fp32 / ORT GenAI fp32", ("fp32", "decode"), (GENAI, "fp32", "decode"), 1.6),
    Goal("decode fp16 / llama.cpp F16", ("fp16", "decode"), (LLAMA, "F16", "decode"), 1.2),
    Goal("decode int8 / llama.cpp Q8_0", ("int8", "decode"), (LLAMA, "Q8_0", "decode"), 1.7),
    Goal("decode source / llama.cpp, the same file", ("source", "decode"), (LLAMA, AS_IT_IS, "decode"), 1.3),
    Goal("prefill source / llama.cpp, the same file", ("source", "prefill"), (LLAMA, AS_IT_IS, "prefill"), 1.5),
    Goal("decode source / int8", ("source", "decode"), (OURS, "int8", "decode"), 1.25),
    Goal("decode int4_dynamic / llama.cpp Q4_0", ("int4_dynamic", "decode"), (LLAMA, "Q4_0", "decode"), 1.8),
    Goal("decode int4_dynamic / ORT GenAI int4", ("int4_dynamic", "decode"), (GENAI, "int4", "decode"), 2.5),
    Goal("decode fp32, share of read bandwidth", ("fp32", "read"), (MACHINE, "", "read"), 0.95),
    Goal("decode int8, share of read bandwidth", ("int8", "read"), (MACHINE, "", "read"), 0.92),
    Goal(f"decode {LARGE_LABEL}, share of read bandwidth", (LARGE_LABEL, "read"), (MACHINE, "", "read"), 0.95),
    Goal("prefill fp32 / llama.cpp F32", ("fp32", "prefill"), (LLAMA, "F32", "prefill"), 1.3),
    Goal("prefill bf16 / llama.cpp F16", ("bf16", "prefill"), (LLAMA, "F16", "prefill"), 2.5),
    Goal("prefill int8_dynamic / llama.cpp Q8_0", ("int8_dynamic", "prefill"), (LLAMA, "Q8_0", "prefill"), 3.0),
    Goal(f"decode int8 at {LONG} / at {SHORT}", ("int8", "long decode"), (OURS, "int8", "decode"), 0.7),
)
MEMORY_GOAL_MB = 150.0  # of a running process, besides its weights and caches


def ratios(results: Sequence[Result], limits: MachineLimits) -> list[tuple[Goal, float]]:
    """Every goal whose contenders ran, with the measured ratio."""
    figures: dict[tuple[str, str, str], float] = {(MACHINE, "", "read"): limits.read_gb_s}
    for r in results:
        figures[r.what, r.scheme, "prefill"] = r.prefill_tok_s
        figures[r.what, r.scheme, "decode"] = r.decode_tok_s[SHORT]
        figures[r.what, r.scheme, "read"] = r.gb_s
        if LONG in r.decode_tok_s:
            figures[r.what, r.scheme, "long decode"] = r.decode_tok_s[LONG]
    return [
        (goal, figures[OURS, *goal.ours] / figures[goal.other])
        for goal in GOALS
        if (OURS, *goal.ours) in figures and goal.other in figures
    ]


def results_table(results: Sequence[Result], limits: MachineLimits, flops: float) -> Table:
    """Tabulate the results, one row per contender.

    Decode is also given as a share of the read bandwidth, and prefill as a share of the float32 peak (`flops`:
    operations per token).
    """
    table = Table(title="medians: tokens per second; time to the first token of a prompt; memory")
    contexts = list(results[0].decode_tok_s)
    headers = [
        f"prefill {PROMPT}",
        "of peak",
        "TTFT ms",
        *(f"decode {n}" for n in contexts),
        "GB/s",
        "of read",
        "peak MB",
        "over MB",
        "compile s",
    ]
    for name in ("what", "weights", *headers):
        table.add_column(name, justify="left" if name in ("what", "weights") else "right")
    for r in results:
        share = "" if r.scheme == LARGE_LABEL else f"{r.prefill_tok_s * flops / 1e9 / limits.float32_gflop_s:.0%}"
        decode = [f"{r.decode_tok_s[n]:,.1f}" if n in r.decode_tok_s else "" for n in contexts]
        over = "" if r.held_mb is None else f"{r.peak_rss_mb - r.held_mb:,.0f}"
        rest = (
            f"{r.gb_s:.1f}",
            f"{r.gb_s / limits.read_gb_s:.0%}",
            f"{r.peak_rss_mb:,.0f}",
            over,
            "" if r.compile_s is None else f"{r.compile_s:.0f}",
        )
        table.add_row(r.what, r.scheme, f"{r.prefill_tok_s:,.0f}", share, f"{r.ttft_s * 1e3:,.0f}", *decode, *rest)
    return table


def goals_table(results: Sequence[Result], measured: Sequence[tuple[Goal, float]]) -> Table:
    """Tabulate each ratio beside its goal, and the most memory that any of ours holds besides weights and caches."""
    table = Table(title="ratios within this run")
    for name in ("ratio", "measured", "goal", ""):
        table.add_column(name, justify="right" if name in ("measured", "goal") else "left")
    for goal, value in measured:
        table.add_row(goal.what, f"{value:.2f}", f"{goal.at_least:.2f}", _verdict(reached=value >= goal.at_least))
    over = [r.peak_rss_mb - r.held_mb for r in results if r.held_mb is not None]
    if over:
        table.add_row(
            "peak memory over weights and caches, MB",
            f"{max(over):.0f}",
            f"<= {MEMORY_GOAL_MB:.0f}",
            _verdict(reached=max(over) <= MEMORY_GOAL_MB),
        )
    return table


def _verdict(*, reached: bool) -> str:
    return "reached" if reached else "missed"


def write_json(
    path: Path,
    machine: str,
    results: Sequence[Result],
    limits: MachineLimits,
    measured: Sequence[tuple[Goal, float]],
    how: Mapping[str, int],
) -> None:
    """Write all figures for programs to read."""
    goals = [{"what": goal.what, "measured": value, "at_least": goal.at_least} for goal, value in measured]
    record = {
        "machine": machine,
        "limits": asdict(limits),
        **how,
        "results": [asdict(r) for r in results],
        "ratios": goals,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
