"""Reports on quality: a table, what a smaller file costs, and which layers the error of a scheme comes from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table


@dataclass(frozen=True)
class Quality:
    """How well one variant predicts the text."""

    variant: str
    tokens: int
    perplexity: float  # exp of the mean negative log-likelihood per token
    divergence: float  # mean Kullback-Leibler divergence from the first variant, nats per token
    agreement: float  # share of positions with the same most likely token as the first variant
    weight_bytes: int


def table(results: Sequence[Quality]) -> Table:
    """Tabulate the results, one row per variant."""
    result = Table(title=f"quality on {results[0].tokens} tokens of English", title_justify="left")
    result.add_column("weights")
    for name in ("perplexity", "change", "KL divergence", "same top-1", "size"):
        result.add_column(name, justify="right")
    for row in results:
        change = "" if row is results[0] else f"{row.perplexity / results[0].perplexity - 1:+.2%}"
        compared = ("", "") if row is results[0] else (f"{row.divergence:.5f}", f"{row.agreement:.2%}")
        result.add_row(row.variant, f"{row.perplexity:.3f}", change, *compared, f"{row.weight_bytes / 1e6:,.1f} MB")
    return result


def draw_quality(results: Sequence[Quality], path: Path) -> None:
    """Plot perplexity over size, one point per variant; the first is the baseline, drawn as a line."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    above: dict[float, int] = {}  # labels so far at about this size
    for row in sorted(results, key=lambda r: r.perplexity):
        size = row.weight_bytes / 1e6
        line = above[round(size, -1)] = above.get(round(size, -1), -1) + 1
        axes.plot(size, row.perplexity, "o")
        axes.annotate(
            row.variant, (size, row.perplexity), textcoords="offset points", xytext=(6, 4 + 9 * line), fontsize=8
        )
    axes.axhline(results[0].perplexity, linewidth=0.8, linestyle="--", color="grey")
    axes.set(xlabel="weights, MB", ylabel="perplexity (lower is better)", title="What a smaller file costs")
    axes.margins(x=0.18, y=0.25)
    figure.savefig(path)


def draw_errors(errors: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """Plot the relative error of each layer's matrices, one panel per variant.

    A matrix that exists only once, such as the head, is a horizontal line.
    """
    figure = Figure(figsize=(3.6 * len(errors), 3.6), layout="constrained")
    panels = figure.subplots(1, len(errors), squeeze=False)[0]
    for axes, (variant, kinds) in zip(panels, errors.items(), strict=True):
        for kind, values in kinds.items():
            if len(values) == 1:
                axes.axhline(values[0], linestyle="--", linewidth=0.9, label=kind, color="black")
            else:
                axes.plot(range(len(values)), values, marker=".", linewidth=0.9, label=kind)
        axes.set(title=variant, xlabel="layer")
    panels[0].set_ylabel("|stored - exact| / |exact|")
    panels[0].legend(fontsize=7)
    figure.savefig(path)
