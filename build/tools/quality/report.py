"""Reports on quality: tables, what a smaller file costs, and which layers the error of a scheme comes from."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

from build.tools.quality.figures import PERCENTILES, Estimate, Quality

COLORS = tuple(f"C{i}" for i in range(10))  # matplotlib's own cycle


def by_text(results: Sequence[Quality]) -> dict[str, list[Quality]]:
    """The results of each text."""
    texts: dict[str, list[Quality]] = {}
    for row in results:
        texts.setdefault(row.text, []).append(row)
    return texts


def tables(results: Sequence[Quality]) -> list[Table]:
    """The results of one text, one row per variant, the baseline first: what is predicted, and how it differs."""
    title = f"{results[0].text}, {results[0].tokens:,} tokens scored"
    columns = ("PPL", "ln(PPL/base)", "bits/byte", "mean Δp, %", "RMS Δp, %", "size")
    predicted = _table(title, columns)
    percentiles = (*(f"{name} %" for name in PERCENTILES), "maximum")
    differs = _table(
        f"{results[0].text}, KL divergence from {results[0].variant} and same top-1",
        ("mean", *percentiles, "same top-1, %"),
    )
    for row in results:
        is_baseline = row is results[0]
        differences = (_signed(row.log_ratio, 5), _signed(row.delta_p, 2), _plain(row.delta_p_rms, 2))
        log_ratio, delta_p, delta_p_rms = ("", "", "") if is_baseline else differences
        perplexity = f"{row.perplexity.value:.3f} ± {row.perplexity.error:.2f}"
        size = f"{row.weight_bytes / 1e6:,.1f} MB"
        predicted.add_row(row.variant, perplexity, log_ratio, f"{row.bits_per_byte:.4f}", delta_p, delta_p_rms, size)
        if not is_baseline:
            divergences = [row.divergence_percentiles[name] for name in PERCENTILES]
            cells = (f"{value:.5f}" for value in (*divergences, row.divergence_maximum))
            differs.add_row(row.variant, _plain(row.divergence, 5), *cells, _plain(row.same_top, 2))
    return [predicted, differs]


def _table(title: str, columns: Sequence[str]) -> Table:
    result = Table(title=title, title_justify="left")
    result.add_column("weights")
    for name in columns:
        result.add_column(name, justify="right")
    return result


def _plain(estimate: Estimate, digits: int) -> str:
    return f"{estimate.value:.{digits}f} ± {estimate.error:.{digits}f}"


def _signed(estimate: Estimate, digits: int) -> str:
    return f"{estimate.value:+.{digits}f} ± {estimate.error:.{digits}f}"


def draw_quality(results: Sequence[Quality], path: Path) -> None:
    """Plot the mean KL divergence over size, one panel per text, one colour per variant other than the baseline."""
    texts = by_text(results)
    figure = Figure(figsize=(5.5 * len(texts) + 2.5, 4), layout="constrained")
    panels = figure.subplots(1, len(texts), squeeze=False)[0]
    for axes, (text, rows) in zip(panels, texts.items(), strict=True):
        for i, row in enumerate(rows[1:]):
            marker = {"fmt": "os^D"[i // len(COLORS) % 4], "color": COLORS[i % len(COLORS)], "capsize": 2}
            size = row.weight_bytes / 1e6
            axes.errorbar(size, row.divergence.value, row.divergence.error, label=row.variant, **marker)
        axes.set(xlabel="weights, MB", ylabel="mean KL divergence, nats", title=text, yscale="log")
        axes.grid(linewidth=0.3)
    figure.suptitle("What a smaller file costs")
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right upper", fontsize=8)
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
