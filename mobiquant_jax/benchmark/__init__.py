"""Speed of the packed model: kernels, decoding, prefill, switching bits, routers, memory; and torch's beside them."""

from mobiquant_jax.benchmark.plan import PARTS, Group, identity, plan
from mobiquant_jax.benchmark.report import markdown, summary
from mobiquant_jax.benchmark.run import Clock, Models, OutOfTime, measure, missing_rows
from mobiquant_jax.benchmark.settings import BenchmarkSettings
from mobiquant_jax.benchmark.table import Table, open_table, read_table

__all__ = [
    "PARTS",
    "BenchmarkSettings",
    "Clock",
    "Group",
    "Models",
    "OutOfTime",
    "Table",
    "identity",
    "markdown",
    "measure",
    "missing_rows",
    "open_table",
    "plan",
    "read_table",
    "summary",
]
