"""Where a checkpoint loses and what its router is worth: token errors, bits, and rivals at equal bits."""

from mobiquant_jax.analysis.study import Findings, Study

__all__ = ["Findings", "Study"]
