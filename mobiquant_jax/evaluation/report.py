"""A perplexity curve as a table for the terminal, as JSON and as a picture."""

import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MultipleLocator, NullFormatter

from mobiquant_jax import distributed
from mobiquant_jax.evaluation.perplexity import PerplexityResult
from mobiquant_jax.files import save_json, whole_file
from mobiquant_jax.provenance import short_commit

STYLE: dict[Any, Any] = {"font.family": "sans-serif", "axes.spines.top": False, "axes.spines.right": False}
LOG_RATIO = 4.0  # a curve that spans more than this is drawn on a logarithmic axis
INK, ACCENT, MUTED = "#1f2933", "#1f6feb", "#7b8794"
COLORS = ("#d1495b", "#edae49", "#2a9d8f", "#9b5de5", "#8d6e63", "#00798c", "#6a4c93")  # of what stands beside it


def format_table(results: Sequence[PerplexityResult]) -> str:
    """Lays results out for the terminal; an unquantized result among them is what the others are compared with.

    Args:
      results: points of the curve, and the unquantized model's (``bits`` None) if it was measured.

    Returns:
      Lines of equal width: bits, measured bits, perplexity and, given a reference, its excess in percent.
    """
    reference = _reference(results) if len(results) > 1 else None
    rows = [["average bits", "measured", "perplexity"] + (["vs unquantized"] if reference else [])]
    for result in results:
        bits = "unquantized" if result.bits is None else f"{result.bits:g}"
        row = [bits, "-" if result.bits is None else f"{result.measured_bits:.2f}", f"{result.perplexity:.3f}"]
        if reference:
            excess = 100 * (result.perplexity / reference.perplexity - 1)
            row.append("" if result.bits is None else f"{excess:+.1f} %")
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def print_result(result: PerplexityResult) -> None:
    """Says on stderr what was just measured, as progress; process 0 does."""
    bits = "unquantized" if result.bits is None else f"{result.bits:g} bits"
    if distributed.is_main():
        print(f"  {bits}: perplexity {result.perplexity:.3f} in {result.seconds:.1f} s", file=sys.stderr, flush=True)


def curve_rows(results: Iterable[PerplexityResult]) -> list[dict[str, Any]]:
    """The curve as JSON-ready rows {bits, measured_bits, perplexity, tokens}.

    Args:
      results: points of the curve; ``bits`` of an unquantized model, and a perplexity that is not finite, become None.
    """
    return [
        {
            "bits": result.bits,
            "measured_bits": result.measured_bits,
            "perplexity": result.perplexity if math.isfinite(result.perplexity) else None,
            "tokens": result.tokens,
        }
        for result in results
    ]


def write_json(path: str | Path, results: Iterable[PerplexityResult]) -> None:
    """Writes `curve_rows` to a file, whole or not at all."""
    save_json(path, curve_rows(results))


def markdown_table(result: dict[str, Any]) -> str:
    """A calibration's ``result.json`` as Markdown: the curve, and what gave it.

    Args:
      result: its content: provenance, seconds (None of a resumed run), peak_gb, and the rows of the curve, one of them
        the unquantized model's.

    Returns:
      The table, an empty line and a sentence.

    Raises:
      ValueError: it is something else.
    """
    for name in ("provenance", "seconds", "peak_gb", "curve"):
        if name not in result:
            raise ValueError(f"no result of a calibration: it lacks '{name}'")
    rows = ["| average bits | measured | perplexity | against unquantized |", "|---|---|---|---|"]
    reference = next(point["perplexity"] for point in result["curve"] if point["bits"] is None)
    for point in result["curve"]:
        if point["bits"] is None:
            rows.append(f"| unquantized | - | {reference:.2f} | |")
        elif point["perplexity"] is None:
            rows.append(f"| {point['bits']:g} | {point['measured_bits']:.2f} | not finite | |")
        else:
            excess = 100 * (point["perplexity"] / reference - 1)
            numbers = f"{point['measured_bits']:.2f} | {point['perplexity']:.2f} | {excess:+.1f} %"
            rows.append(f"| {point['bits']:g} | {numbers} |")
    origin = result["provenance"]
    seconds = "resumed" if result["seconds"] is None else f"{result['seconds']:.0f} s"
    versions = ", ".join(f"{name} {origin['versions'][name]}" for name in ("jax", "flax"))
    source = (
        f"`{origin['command']}` at {short_commit(origin['commit'])}: {seconds}, {result['peak_gb']:.1f} GB of "
        f"host memory; {', '.join(origin['devices'])}, {origin['cores']} cores; Python {origin['python']}, {versions}."
    )
    return "\n".join([*rows, "", source])


def plot_curve(path: str | Path, results: Sequence[PerplexityResult], title: str) -> None:
    """Draws perplexity against measured average bits, with the unquantized model as a line.

    Args:
      path: the PNG to write.
      results: points of the curve, and the unquantized model's (``bits`` None) if it was measured.
      title: a line above the picture.

    Raises:
      ValueError: there is no point with bits and a finite perplexity.
    """
    points = sorted((r for r in results if r.bits is not None), key=lambda r: r.measured_bits)
    points = [point for point in points if math.isfinite(point.perplexity)]
    if not points:
        raise ValueError("no finite perplexity to draw")
    reference = _reference(results)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.4), dpi=160, layout="constrained")
        axes = figure.add_subplot()
        bits, values = [p.measured_bits for p in points], [p.perplexity for p in points]
        if reference:
            axes.axhline(reference.perplexity, color=MUTED, linewidth=1.2, linestyle=(0, (5, 4)))
            axes.annotate(
                f"unquantized {reference.perplexity:.2f}",
                (0.0, reference.perplexity),
                (6, -12),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                fontsize=9,
                color=MUTED,
            )
        axes.plot(bits, values, color=ACCENT, linewidth=2, marker="o", markersize=6, clip_on=False, zorder=3)
        for x, y in zip(bits, values, strict=True):
            axes.annotate(
                f"{y:.2f}" if y < 100 else f"{y:.0f}", (x, y), (3, 7), textcoords="offset points", fontsize=9, color=INK
            )
        if max(values) > LOG_RATIO * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.margins(x=0.04, y=0.15)
        axes.xaxis.set_major_locator(MultipleLocator(1))
        axes.set_xlabel("average bits per weight", color=INK)
        axes.set_ylabel("perplexity", color=INK)
        axes.tick_params(colors=INK)
        axes.set_title(title, loc="left", fontsize=11, color=INK)
        with whole_file(path) as unfinished:
            figure.savefig(unfinished)


def _reference(results: Iterable[PerplexityResult]) -> PerplexityResult | None:
    """The unquantized model's result, if it is there."""
    return next((result for result in results if result.bits is None), None)
