"""The router against its rivals, where bits go, and whether scores follow errors."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.colors import Normalize
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from mobiquant_jax.analysis.comparison import RIVALS, ROUTER
from mobiquant_jax.analysis.figures.canvas import ACCENT, COLORS, MUTED, QUIET, color_bar, figure, map_linears
from mobiquant_jax.analysis.linears import Labels
from mobiquant_jax.analysis.rows import Row, excess
from mobiquant_jax.analysis.token_errors import TokenErrors

POLICY_COLORS = {ROUTER: ACCENT} | dict(
    zip(RIVALS, ("#9aa5b1", "#edae49", "#d1495b", "#b5651d", "#7bc8a4", "#1b7f5c"), strict=True)
)


def plot_policies(path: str | Path, rows: Sequence[Row], full: Row) -> None:
    """Perplexity of the router and its rivals against bits, and their distance from random depths."""
    asked = sorted({row.asked for row in rows})
    by_name = {name: {row.asked: row for row in rows if row.name == name} for name in POLICY_COLORS}
    with figure(path, 3.7, 1, 2, width_ratios=(1, 1.25)) as axes:
        curve, bars = axes[0]
        for name, mine in by_name.items():
            style = {ROUTER: "-", "random": ":"}.get(name, "--")
            points = sorted((row.bits, row.perplexity) for row in mine.values())
            curve.plot(
                *zip(*points, strict=True), style, color=POLICY_COLORS[name], marker="o", markersize=4, label=name
            )
        curve.axhline(full.perplexity, color=MUTED, linewidth=1, linestyle=(0, (5, 4)))
        curve.annotate(
            "full depth",
            (0.02, full.perplexity),
            (0, 3),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            fontsize=8,
            color=MUTED,
        )
        curve.set_yscale("log")
        curve.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8)))
        curve.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        curve.yaxis.set_minor_formatter(NullFormatter())
        curve.set(xlabel="average bits per weight", ylabel="perplexity")
        curve.set_title("perplexity", loc="left", fontsize=10)
        rivals = [name for name in by_name if name != "random"]
        for index, name in enumerate(rivals):
            pairs = [excess(by_name[name][bits], by_name["random"][bits]) for bits in asked]
            place = np.arange(len(asked)) + 0.8 * ((index + 0.5) / len(rivals) - 0.5)
            errors = [error if np.isfinite(error) else 0.0 for _, error in pairs]
            bars.bar(
                place,
                [ratio for ratio, _ in pairs],
                0.8 / len(rivals),
                yerr=errors,
                color=POLICY_COLORS[name],
                label=name,
                error_kw={"elinewidth": 0.8, "ecolor": MUTED},
            )
        bars.axhline(0, color=MUTED, linewidth=0.8)
        bars.set_xticks(range(len(asked)), [f"{bits:g} bits" for bits in asked])
        bars.yaxis.set_major_formatter(PercentFormatter(1.0))
        bars.grid(axis="y", color=QUIET, linewidth=0.6)
        bars.set_axisbelow(True)
        bars.set_title("against random depths at the same bits (lower is better)", loc="left", fontsize=10)
        handles, labels = curve.get_legend_handles_labels()
        curve.figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)


def plot_bits(
    path: str | Path,
    router: Mapping[float, Float[np.ndarray, "L N"]],
    static: Mapping[float, Float[np.ndarray, "L N"]],
    labels: Labels,
) -> None:
    """Average bits of every linear under the router, beside the best static ones; one row for each average.

    Args:
        path: the PNG.
        router: average bits, by the average asked for.
        static: bits of the best static allocation, by the average asked for.
        labels: of the arrays' axes.
    """
    norm = Normalize(labels.bits[0], labels.bits[-1])
    with figure(path, 1.7 * len(router) + 0.4, len(router), 2, sharex=True, sharey=True) as axes:
        for row, asked in enumerate(router):
            image = map_linears(axes[row, 0], router[asked], labels.linears, norm, ".1f")
            map_linears(axes[row, 1], static[asked], labels.linears, norm, ".0f")
            axes[row, 0].set_title(f"router at {asked:g} bits", loc="left", fontsize=10)
            axes[row, 1].set_title(f"best static at {asked:g} bits", loc="left", fontsize=10)
        for panel in axes[-1]:
            panel.set_xlabel("layer")
        color_bar(axes, image, "average bits")


def plot_correlation(path: str | Path, errors: TokenErrors, labels: Labels) -> None:
    """Rank correlation of router scores, and of input norms, with the error that a slice removes.

    Args:
        path: the PNG.
        errors: of the tokens.
        labels: of the arrays' axes.
    """
    kinds = (("router score", errors.router_correlation, ACCENT), ("input norm", errors.norm_correlation, COLORS[1]))
    with figure(path, 3.0, 1, len(labels.low_bits), sharey=True) as axes:
        for depth, (panel, width) in enumerate(zip(axes.flat, labels.low_bits, strict=True)):
            for offset, (label, values, color) in zip((-0.18, 0.18), kinds, strict=True):
                layers = values[..., depth]  # [L, N]
                jitter = np.linspace(-0.1, 0.1, len(layers))[:, None]
                place = np.arange(len(labels.linears)) + offset
                panel.plot((place + jitter).ravel(), layers.ravel(), ".", color=color, alpha=0.45, markersize=5)
                panel.plot(
                    place, layers.mean(axis=0), "_", color=color, markersize=11, markeredgewidth=2.2, label=label
                )
            panel.axhline(0, color=MUTED, linewidth=0.8)
            panel.set_xticks(range(len(labels.linears)), labels.linears)
            panel.set_title(f"slice {depth + 2}, above {width} bits", loc="left", fontsize=10)
            panel.grid(axis="y", color=QUIET, linewidth=0.6)
        axes[0, 0].set_ylabel("Spearman's rank correlation")
        axes[0, 0].set_ylim(-1, 1)
        axes[0, 0].legend(frameon=False, fontsize=8, loc="lower left", ncols=2)
