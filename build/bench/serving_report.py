"""The report of a server under load: tables, goals, and a plot of throughput and latencies."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isnan
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from build.bench.serving_load import CoTenant, LevelSpeed
from runtime.benchmarks.spread import Spread

OF_THE_ENGINE = 0.95  # the share of the engine's own speed that is aimed at
GOAL_CLIENTS = 4
FIRST_BYTE_S = 0.05


@dataclass
class Rounds:
    """What was measured, round by round.

    levels: by server and number of clients. engine: tokens per second of the engine alone, by number of sequences.
    stall_budget_s: what a prompt's chunk may hold up the others.
    """

    stall_budget_s: float
    levels: dict[str, dict[int, list[LevelSpeed]]] = field(default_factory=dict)
    engine: dict[int, list[float]] = field(default_factory=dict)
    co_tenants: list[CoTenant] = field(default_factory=list)
    locust: str = ""

    def add(self, server: str, level: LevelSpeed) -> None:
        """Add one round of a server with a number of clients."""
        self.levels.setdefault(server, {}).setdefault(level.clients, []).append(level)


def percentile_ms(rounds: Sequence[LevelSpeed], name: str, share: float) -> float:
    """Milliseconds that this share of all requests, or gaps, of these rounds stayed below."""
    return float(np.quantile([value for each in rounds for value in getattr(each, name)], share)) * 1e3


def levels_table(rounds: Rounds) -> Table:
    """A row for each server and number of clients; speeds are medians over the rounds."""
    table = Table(title="the server under load")
    headers = ("server", "clients", "tok/s in all", "while decoding", "TTFT p50 ms", "p99", "gap p50 ms", "p99")
    for header in headers:
        table.add_column(header, justify="left" if header == "server" else "right")
    for server, levels in rounds.levels.items():
        for clients, found in levels.items():
            speeds = [Spread.of([getattr(each, name) for each in found]) for name in ("tok_s", "decode_tok_s")]
            times = [percentile_ms(found, name, share) for name in ("ttft_s", "gaps_s") for share in (0.5, 0.99)]
            table.add_row(
                server,
                str(clients),
                *("" if isnan(s.median) else f"{s:.1f}" for s in speeds),
                *(f"{t:.1f}" for t in times),
            )
    return table


def engine_ratios(rounds: Rounds, server: str) -> Mapping[int, Spread]:
    """The server's speed while decoding over the engine's own with as many sequences, round by round."""
    return {
        clients: Spread.of([each.decode_tok_s / own for each, own in zip(found, rounds.engine[clients], strict=True)])
        for clients, found in rounds.levels[server].items()
        if clients in rounds.engine
    }


def goals_table(rounds: Rounds, server: str) -> Table:
    """Each goal beside what was measured."""
    table = Table(title="goals of the server")
    for header in ("what", "measured", "goal", ""):
        table.add_column(header, justify="right" if header in ("measured", "goal") else "left")
    for clients, ratio in engine_ratios(rounds, server).items():
        _add(
            table,
            f"speed while decoding / the engine's own, {clients} at once",
            f"{ratio:.2f}",
            f"{OF_THE_ENGINE:.2f}" if clients == GOAL_CLIENTS else "",
            reached=ratio.median >= OF_THE_ENGINE,
        )
    for clients, found in rounds.levels[server].items():
        first = percentile_ms(found, "first_byte_s", 0.99)
        _add(
            table,
            f"first byte of a stream, p99, {clients} clients, ms",
            f"{first:.1f}",
            f"{FIRST_BYTE_S * 1e3:.0f}",
            reached=first <= FIRST_BYTE_S * 1e3,
        )
    for each in rounds.co_tenants:
        goal = rounds.stall_budget_s + each.usual_s
        _add(
            table,
            f"a stream's worst gap while a prompt of {each.prompt} tokens runs, ms",
            f"{each.worst_s * 1e3:.0f}",
            f"{goal * 1e3:.0f}",
            reached=each.worst_s <= goal,
        )
    return table


def _add(table: Table, what: str, measured: str, goal: str, *, reached: bool) -> None:
    table.add_row(what, measured, goal, ("reached" if reached else "missed") if goal else "")


def draw_load(rounds: Rounds, path: Path) -> None:
    """Draw throughput, time to the first token and gaps against the number of clients."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    speed, first, gaps = figure.subplots(1, 3)
    for server, levels in rounds.levels.items():
        clients = list(levels)
        speed.plot(
            clients, [np.median([each.tok_s for each in found]) for found in levels.values()], "o-", label=server
        )
        for axes, name in ((first, "ttft_s"), (gaps, "gaps_s")):
            for share, style in ((0.5, "o-"), (0.99, "o--")):
                values = [percentile_ms(found, name, share) for found in levels.values()]
                axes.plot(clients, values, style, label=f"{server}, p{share * 100:.0f}")
    if rounds.engine:
        own = [np.median(found) for found in rounds.engine.values()]
        speed.plot(list(rounds.engine), own, "k:", label="the engine alone, while decoding")
    speed.set(title="tokens per second in all", xlabel="clients")
    first.set(title="time to the first token, ms", xlabel="clients")
    gaps.set(title="between two tokens, ms", xlabel="clients")
    for axes in (speed, first, gaps):
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=7)
    figure.savefig(path)
