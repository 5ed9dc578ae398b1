"""What tokens lose: how much, where, and whether they are the same tokens at every width."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.colors import LogNorm, Normalize
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter

from mobiquant_jax.analysis.figures.canvas import ACCENT, COLORS, INK, MUTED, QUIET, color_bar, figure, map_linears
from mobiquant_jax.analysis.linears import Labels
from mobiquant_jax.analysis.retention import NONE, RANDOM
from mobiquant_jax.analysis.rows import Row
from mobiquant_jax.analysis.token_errors import LEVELS, WORST_SHARE, TokenErrors

PERCENT = FuncFormatter(lambda value, _: f"{100 * value:g} %")
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")
SHOWN = (0.005, 0.995)  # quantiles of the errors that set a panel's limits; what lies beyond is drawn at its edge


def plot_error_curves(path: str | Path, errors: TokenErrors, labels: Labels) -> None:
    """Relative error over the tokens, from the least to the most hurt; one panel a kind of linear.

    Args:
        path: the PNG.
        errors: of the tokens.
        labels: of the arrays' axes.
    """
    columns = 4
    rows = -(-len(labels.linears) // columns)
    with figure(path, 2.1 * rows + 0.4, rows, columns, sharex=True, sharey=True) as axes:
        for index, (name, panel) in enumerate(zip(labels.linears, axes.flat, strict=False)):
            for depth, width in enumerate(labels.low_bits):
                curves = errors.quantiles[:, :, index, depth]  # [levels, L]
                panel.fill_between(LEVELS, curves.min(1), curves.max(1), color=COLORS[depth], alpha=0.18, linewidth=0)
                panel.plot(LEVELS, np.median(curves, axis=1), color=COLORS[depth], label=f"{width} bits")
            panel.set_yscale("log")
            panel.set_title(name, loc="left", fontsize=10)
            panel.yaxis.set_major_formatter(PERCENT)
            panel.yaxis.set_minor_formatter(NullFormatter())
            panel.xaxis.set_major_formatter(PercentFormatter(1.0))
            panel.set_xticks([0, 0.5, 1.0])
            panel.grid(axis="y", color=QUIET, linewidth=0.6)
        for panel in axes.flat[len(labels.linears) :]:
            panel.axis("off")
        for panel in axes[-1]:
            panel.set_xlabel("tokens, best to worst", fontsize=8)
        axes.flat[-1].legend(*axes.flat[0].get_legend_handles_labels(), frameon=False, loc="center", fontsize=10)
        for panel in axes[:, 0]:
            panel.set_ylabel("error / output")


def plot_error_maps(path: str | Path, errors: TokenErrors, labels: Labels) -> None:
    """Mean relative error of every linear, one map a width on one scale."""
    percent = 100 * np.asarray(errors.mean)
    norm = LogNorm(vmin=float(percent.min()), vmax=float(percent.max()))
    with figure(path, 1.75 * len(labels.low_bits) + 0.4, len(labels.low_bits), sharex=True) as axes:
        for depth, width in enumerate(labels.low_bits):
            image = map_linears(axes[depth, 0], percent[..., depth], labels.linears, norm, ".1f")
            axes[depth, 0].set_title(f"{width} bits", loc="left", fontsize=10)
        axes[-1, 0].set_xlabel("layer")
        color_bar(axes, image, "mean error, % of the output").ax.yaxis.set_major_formatter(PLAIN)


def plot_overlap(path: str | Path, errors: TokenErrors, labels: Labels) -> None:
    """How many of the worst tokens two widths share: on average, and by layer."""
    bits = labels.low_bits
    names = [f"{width} bits" for width in bits]
    with figure(path, 3.1, 1, 3, width_ratios=(1, 1, 1.6)) as axes:
        for panel, values, title in (
            (axes[0, 0], errors.overlap, "by absolute error"),
            (axes[0, 1], errors.relative_overlap, "by relative error"),
        ):
            mean = values.mean(axis=(0, 1))
            panel.imshow(mean, norm=Normalize(0, 1), cmap="YlGnBu")
            panel.set_xticks(range(len(bits)), names)
            panel.set_yticks(range(len(bits)), names)
            panel.tick_params(length=0)
            panel.set_title(title, loc="left", fontsize=10)
            for spine in panel.spines.values():
                spine.set_visible(False)
            for (row, column), value in np.ndenumerate(mean):
                ink = "white" if value > 0.6 else INK
                panel.text(column, row, f"{100 * value:.0f} %", ha="center", va="center", fontsize=10, color=ink)
        panel = axes[0, 2]
        pairs = [(i, j) for i in range(len(bits)) for j in range(i + 1, len(bits))]
        for color, (i, j) in zip(COLORS, pairs, strict=False):
            values = errors.overlap[:, :, i, j].mean(axis=1)
            panel.plot(values, color=color, marker="o", markersize=3, label=f"{bits[i]} and {bits[j]} bits")
        panel.axhline(WORST_SHARE, color=MUTED, linewidth=1, linestyle=(0, (5, 4)))
        panel.annotate("chance", (0, WORST_SHARE), (2, 3), textcoords="offset points", fontsize=8, color=MUTED)
        panel.set(ylim=(0, 1), xlabel="layer")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.yaxis.set_major_formatter(PercentFormatter(1.0))
        panel.set_title("by layer, absolute error", loc="left", fontsize=10)
        if pairs:
            panel.legend(frameon=False, fontsize=8, loc="upper right", ncols=1 if len(pairs) < 4 else 2)


def plot_migration(path: str | Path, squared: Float[np.ndarray, "T E"], labels: Labels, title: str) -> None:
    """Error of each token of a window in one linear, one panel a width; the worst at the first width stay marked.

    Args:
        path: the PNG.
        squared: squared errors; those at full depth are not drawn.
        labels: of the arrays' axes.
        title: which linear.
    """
    bits, count = labels.low_bits, round(WORST_SHARE * len(squared))
    worst = [set(np.argsort(-squared[:, depth])[:count].tolist()) for depth in range(len(bits))]
    with figure(path, 1.55 * len(bits) + 0.5, len(bits), sharex=True) as axes:
        for depth, width in enumerate(bits):
            panel = axes[depth, 0]
            error = np.sqrt(squared[:, depth] / np.median(squared[:, depth]))
            low, high = np.quantile(error, SHOWN)  # an attention sink would leave no room for the others
            error = np.clip(error, low / 1.1, high * 1.1)
            first, here = sorted(worst[0]), sorted(worst[depth] - worst[0])
            panel.vlines(range(len(error)), 1, error, color=QUIET, linewidth=0.6)
            panel.plot(error, ".", color=MUTED, markersize=2)
            panel.plot(first, error[first], "o", color=COLORS[0], markersize=4, label=f"worst tenth at {bits[0]} bits")
            if depth:
                panel.plot(
                    here, error[here], "o", color=ACCENT, markersize=4, label=f"worst tenth at {width} bits only"
                )
            panel.set_ylabel("error / median")
            stay = "" if not depth else f": {len(worst[0] & worst[depth])} of {count} stay"
            panel.set_title(f"{width} bits{stay}", loc="left", fontsize=10)
            panel.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 0.98), ncols=2, borderpad=0)
        axes[-1, 0].set_xlabel(f"token of the first window   ({title})")
        axes[-1, 0].margins(x=0.01)


def plot_retention(path: str | Path, rows: Sequence[Row]) -> None:
    """Perplexity with a tenth of the tokens at full depth, one panel a low width."""
    widths = sorted({row.asked for row in rows})
    with figure(path, 2.6, 1, len(widths)) as axes:
        for panel, asked in zip(axes.flat, widths, strict=True):
            mine = [row for row in rows if row.asked == asked][::-1]
            reference = next(row.perplexity for row in mine if row.name == NONE)
            panel.axvline(reference, color=MUTED, linewidth=1, linestyle=(0, (5, 4)))
            for index, row in enumerate(mine):
                color = {NONE: MUTED, RANDOM: COLORS[1]}.get(row.name, ACCENT)
                panel.plot([reference, row.perplexity], [index, index], color=color, linewidth=2, alpha=0.4)
                panel.plot(row.perplexity, index, "o", color=color, markersize=7)
                value = f"{row.perplexity:.3f}" if row.perplexity < 100 else f"{row.perplexity:.0f}"
                panel.annotate(
                    value, (row.perplexity, index), (0, 7), textcoords="offset points", ha="center", fontsize=8
                )
            panel.set_yticks(range(len(mine)), [row.name for row in mine])
            panel.set_ylim(-0.5, len(mine))
            panel.margins(x=0.12)
            panel.set_title(f"all other tokens at {asked:g} bits", loc="left", fontsize=10)
            panel.set_xlabel("perplexity")
            panel.tick_params(axis="y", length=0)
