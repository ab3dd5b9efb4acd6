"""The plot of the bench: how fast each contender decodes and prefills."""

from collections.abc import Sequence
from math import isnan, nan
from pathlib import Path

from matplotlib.figure import Figure

from build.bench.contenders import OURS
from build.bench.report import result_of
from build.bench.rounds import Outcome
from runtime.benchmarks.spread import Spread

OURS_COLOUR, RIVAL_COLOUR = "#d9480f", "#868e96"
MISSING = Spread(nan, nan, nan)


def draw_speeds(outcomes: Sequence[Outcome], prompt: int, path: Path) -> None:
    """Draw one panel of bars for prefill and one for each context of decode: medians, and a line between quartiles."""
    results = [result_of(outcome) for outcome in outcomes]
    contexts = sorted({context for result in results for context in result.decode_tok_s})
    titles = [f"prefill {prompt}", *(f"decode at {n}" for n in contexts)]
    figure = Figure(figsize=(3.2 * len(titles), 0.28 * len(results) + 1), layout="constrained")
    panels = figure.subplots(1, len(titles), sharey=True, squeeze=False)[0]
    names = [outcome.entry.label for outcome in outcomes]
    colours = [OURS_COLOUR if outcome.entry.what == OURS else RIVAL_COLOUR for outcome in outcomes]
    columns = [
        [r.prefill_tok_s for r in results],
        *([r.decode_tok_s.get(n, MISSING) for r in results] for n in contexts),
    ]
    for axes, title, spreads in zip(panels, titles, columns, strict=True):
        medians = [spread.median for spread in spreads]
        quartiles = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
        bars = axes.barh(names, medians, color=colours, xerr=quartiles, ecolor="#212529")
        axes.bar_label(bars, ["" if isnan(value) else f"{value:.0f}" for value in medians], padding=2, fontsize=7)
        axes.set(title=title, xlabel="tokens per second")
        axes.margins(x=0.15)
    panels[0].invert_yaxis()
    figure.savefig(path)
