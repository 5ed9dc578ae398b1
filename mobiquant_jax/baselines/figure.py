"""The table of perplexities as a picture: fixed-width models as points, checkpoints of all widths as lines."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MultipleLocator, NullFormatter

from mobiquant_jax.baselines.results import Row
from mobiquant_jax.evaluation.report import ACCENT, COLORS, INK, MUTED, STYLE
from mobiquant_jax.files import whole_file

HIGHEST = 10.0  # times the best: what lies above is broken, and would flatten all else
MARKERS = "sD^vPX*"


def plot_perplexities(path: str | Path, rows: Sequence[Row]) -> None:
    """Draws the first text's perplexities against the bits used: means over seeds, bars from the least to the greatest.

    Models made for another width than they are read at are left out, and so are seeds without a finite perplexity.

    Args:
        path: the PNG to write.
        rows: of a table of results.

    Raises:
        ValueError: there is no finite perplexity.
    """
    text = rows[0]["text"] if rows else None
    rows = [row for row in rows if row["text"] == text and row["perplexity"] is not None]
    if not rows:
        raise ValueError("no finite perplexity to draw")
    highest = HIGHEST * min(row["perplexity"] for row in rows)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.6), dpi=160, layout="constrained")
        axes = figure.add_subplot()
        for value in (row["perplexity"] for row in rows if row["bits"] is None):
            axes.axhline(value, color=MUTED, linewidth=1.2, linestyle=(0, (5, 4)), label=f"unquantized {value:.2f}")
        styles = cycle(zip(COLORS, MARKERS, strict=True))
        for (method, elastic), widths in _by_method(rows).items():
            points = [point for point in sorted(map(_point, widths.values())) if point[1] <= highest]
            if points:
                used, means, below, above = zip(*points, strict=True)
                color, marker = (ACCENT, "o") if method == "elastic" else next(styles)
                line = "-" if elastic else "none"
                style: dict[str, Any] = dict(color=color, marker=marker, linestyle=line, capsize=2, label=method)
                axes.errorbar(used, means, yerr=(below, above), **style)
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_major_locator(MultipleLocator(1))
        axes.set_xlabel("average bits per weight", color=INK)
        axes.set_ylabel(f"perplexity, {text}", color=INK)
        axes.tick_params(colors=INK)
        axes.legend(frameon=False, labelcolor=INK)
        axes.set_title(f"perplexities up to {HIGHEST:g} times the best", loc="left", fontsize=11, color=INK)
        with whole_file(path) as unfinished:
            figure.savefig(unfinished, format="png")


def _by_method(rows: Sequence[Row]) -> dict[tuple[str, bool], dict[float, list[Row]]]:
    """Rows by method, and whether one model has all widths, and by width; those of all widths first."""
    found: dict[tuple[str, bool], dict[float, list[Row]]] = {}
    for elastic in (True, False):
        for row in rows:
            bits, made = row["bits"], row["calibrated_bits"]
            if bits is not None and (made is None if elastic else made == bits):
                found.setdefault((row["method"], elastic), {}).setdefault(bits, []).append(row)
    return found


def _point(rows: Sequence[Row]) -> tuple[float, float, float, float]:
    """Mean bits, mean perplexity, and how far the least and the greatest are from it."""
    values = [row["perplexity"] for row in rows]
    mean = sum(values) / len(values)
    return sum(row["measured_bits"] for row in rows) / len(rows), mean, mean - min(values), max(values) - mean
