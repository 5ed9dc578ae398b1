"""Where a checkpoint loses and what its router is worth: token errors, bits, and rivals at equal bits."""

from mobiquant_jax.analysis.linears import Labels
from mobiquant_jax.analysis.markdown import policies_table
from mobiquant_jax.analysis.output import new_folder
from mobiquant_jax.analysis.report import page_bits, write_report
from mobiquant_jax.analysis.study import Findings, Study

__all__ = ["Findings", "Labels", "Study", "new_folder", "page_bits", "policies_table", "write_report"]
