"""The plot of the bench: how fast each contender decodes and prefills."""

from collections.abc import Sequence
from math import isnan, nan
from pathlib import Path

from matplotlib.figure import Figure

from build.bench.contenders import OURS
from build.bench.report import Result

OURS_COLOUR, RIVAL_COLOUR = "#d9480f", "#868e96"


def draw_speeds(results: Sequence[Result], prompt: int, path: Path) -> None:
    """Draw one panel of bars for prefill and one for each context of decode."""
    contexts = list(results[0].decode_tok_s)
    titles = [f"prefill {prompt}", *(f"decode at {n}" for n in contexts)]
    figure = Figure(figsize=(3.2 * len(titles), 0.28 * len(results) + 1), layout="constrained")
    panels = figure.subplots(1, len(titles), sharey=True, squeeze=False)[0]
    names = [f"{r.what} {r.scheme}" for r in results]
    colours = [OURS_COLOUR if r.what == OURS else RIVAL_COLOUR for r in results]
    columns = [[r.prefill_tok_s for r in results], *([r.decode_tok_s.get(n, nan) for r in results] for n in contexts)]
    for axes, title, values in zip(panels, titles, columns, strict=True):
        bars = axes.barh(names, values, color=colours)
        axes.bar_label(bars, ["" if isnan(value) else f"{value:.0f}" for value in values], padding=2, fontsize=7)
        axes.set(title=title, xlabel="tokens per second")
        axes.margins(x=0.15)
    panels[0].invert_yaxis()
    figure.savefig(path)
