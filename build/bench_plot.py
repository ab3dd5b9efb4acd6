"""The plot of the bench: who decodes and prefills how fast."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from matplotlib.figure import Figure

COLOURS = {"ours": "#d9480f"}
RIVAL = "#868e96"


class Row(Protocol):
    """What is drawn of one contender."""

    @property
    def what(self) -> str:
        """Who."""

    @property
    def scheme(self) -> str:
        """What it stores."""

    @property
    def prefill_tok_s(self) -> float:
        """Tokens per second of the prompt."""

    @property
    def decode_tok_s(self) -> Mapping[int, float]:
        """Tokens per second behind each context."""


def draw_speeds(results: Sequence[Row], prompt: int, path: Path) -> None:
    """One panel of bars for prefill and one for each context of decode."""
    contexts = list(results[0].decode_tok_s)
    titles = [f"prefill {prompt}", *(f"decode at {n}" for n in contexts)]
    figure = Figure(figsize=(3.2 * len(titles), 0.28 * len(results) + 1), layout="constrained")
    panels = figure.subplots(1, len(titles), sharey=True, squeeze=False)[0]
    names = [f"{r.what} {r.scheme}" for r in results]
    colours = [COLOURS.get(r.what, RIVAL) for r in results]
    columns = [[r.prefill_tok_s for r in results], *([r.decode_tok_s.get(n, 0.0) for r in results] for n in contexts)]
    for axes, title, values in zip(panels, titles, columns, strict=True):
        bars = axes.barh(names, values, color=colours)
        axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=7)
        axes.set(title=title, xlabel="tokens per second")
        axes.margins(x=0.15)
    panels[0].invert_yaxis()
    figure.savefig(path)
