"""Findings as JSON: every number that the report shows, and where it came from."""

import math
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from mobiquant_jax.analysis.linears import Labels
from mobiquant_jax.analysis.rows import Row, excess
from mobiquant_jax.analysis.study import Findings
from mobiquant_jax.analysis.token_errors import LEVELS, WORST_SHARE

DIGITS = 6  # significant ones of each number in an array


def findings_json(findings: Findings, labels: Labels) -> dict[str, Any]:
    """The findings, JSON-ready; arrays are nested lists over layers, linears and depths."""
    random = {row.asked: row for row in findings.policies if row.name == "random"}
    return {
        "axes": {
            "linears": list(labels.linears),
            "bits": list(labels.bits),
            "quantile_levels": list(LEVELS),
            "worst_share": WORST_SHARE,
        },
        "full_depth": row_json(findings.full),
        "policies": [row_json(row, random[row.asked]) for row in findings.policies],
        "retention": rows_json(findings.retention),
        "router_bits": {f"{bits:g}": _nested(use.linear_bits) for bits, use in findings.router.items()},
        "static": {
            f"{bits:g}": {"depths": allocation.table.tolist(), "divergence": _finite(allocation.divergence)}
            for bits, allocation in findings.static.items()
        },
        "token_errors": jax.tree.map(_nested, vars(findings.errors)),
    }


def rows_json(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Rows without a comparison."""
    return [row_json(row) for row in rows]


def row_json(row: Row, random: Row | None = None) -> dict[str, Any]:
    """A row, and by how much it exceeds random depths where that is given; what is not finite becomes None."""
    content: dict[str, Any] = {
        "name": row.name,
        "asked_bits": row.asked,
        "measured_bits": row.bits,
        "perplexity": _finite(row.perplexity),
        "window_nll": [_finite(nll) for nll in row.window_nll],
    }
    if random is not None:
        ratio, error = excess(row, random)
        content |= {"excess_over_random": _finite(ratio), "standard_error": _finite(error)}
    return content


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _nested(values: np.ndarray) -> list[Any]:
    return np.vectorize(lambda value: float(f"{value:.{DIGITS}g}"), otypes=[float])(values).tolist()
