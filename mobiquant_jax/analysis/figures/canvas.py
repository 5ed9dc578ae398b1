"""What all figures share: their size, their colours, and maps of a value over layers and linears."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from mobiquant_jax.evaluation.report import ACCENT, COLORS, INK, MUTED, STYLE
from mobiquant_jax.evaluation.token_bits import COLORMAP, LUMINANCE
from mobiquant_jax.files import whole_file

DPI = 160
WIDTH = 9.0  # inches
MOST_WRITTEN = 12  # layers of a map with room for numbers
QUIET = "#d0d7de"

__all__ = ["ACCENT", "COLORS", "INK", "MUTED", "QUIET", "color_bar", "figure", "map_linears"]


@contextmanager
def figure(path: str | Path, height: float, rows: int = 1, columns: int = 1, **options: Any) -> Iterator[np.ndarray]:
    """A figure that is written when the block ends.

    Args:
        path: the PNG.
        height: inches.
        rows: of axes.
        columns: of axes.
        **options: of ``Figure.subplots``.

    Yields:
        The axes, ``[rows, columns]``.
    """
    with matplotlib.rc_context(STYLE | {"axes.edgecolor": MUTED, "text.color": INK, "axes.labelcolor": INK}):
        drawn = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
        axes = drawn.subplots(rows, columns, squeeze=False, **options)
        for one in axes.flat:
            one.tick_params(colors=INK, labelsize=8)
        yield axes
        with whole_file(path) as unfinished:
            drawn.savefig(unfinished)


def map_linears(
    axes: Axes, values: Float[np.ndarray, "L N"], linears: Sequence[str], norm: Normalize, text: str
) -> AxesImage:
    """Colours a grid of layers and linears; few enough cells get their value, formatted by ``text``, written in."""
    image = axes.imshow(values.T, norm=norm, cmap=COLORMAP, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(linears)), linears)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if len(values) <= MOST_WRITTEN:
        for (layer, linear), value in np.ndenumerate(values):
            ink = "white" if np.dot(image.cmap(norm(value))[:3], LUMINANCE) < 0.5 else INK
            axes.text(layer, linear, format(value, text), ha="center", va="center", fontsize=7, color=ink)
    return image


def color_bar(axes: np.ndarray, image: AxesImage, label: str) -> Colorbar:
    """The scale of the maps, at the right of all axes."""
    bar = axes.flat[0].figure.colorbar(image, ax=axes, fraction=0.025, pad=0.015)
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    return bar
