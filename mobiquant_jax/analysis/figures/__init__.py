"""The figures of a report, each a function of a path and of what it shows."""

from mobiquant_jax.analysis.figures.errors import (
    plot_error_curves,
    plot_error_maps,
    plot_migration,
    plot_overlap,
    plot_retention,
)
from mobiquant_jax.analysis.figures.routing import plot_bits, plot_correlation, plot_policies

__all__ = [
    "plot_bits",
    "plot_correlation",
    "plot_error_curves",
    "plot_error_maps",
    "plot_migration",
    "plot_overlap",
    "plot_policies",
    "plot_retention",
]
