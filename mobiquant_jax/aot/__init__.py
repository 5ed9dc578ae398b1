"""Compiling the large programs for TPUs that are not there, to learn what they need of each chip."""

from mobiquant_jax.aot.chips import CHIPS, GIB, Chip, tpu_mesh
from mobiquant_jax.aot.compile import DoesNotFit, Footprint, compile_for
from mobiquant_jax.aot.programs import Program, serving_programs, training_programs
from mobiquant_jax.aot.table import KEY, render_table

__all__ = [
    "CHIPS",
    "GIB",
    "KEY",
    "Chip",
    "DoesNotFit",
    "Footprint",
    "Program",
    "compile_for",
    "render_table",
    "serving_programs",
    "tpu_mesh",
    "training_programs",
]
