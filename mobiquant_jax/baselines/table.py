"""The table of perplexities for people: a line for each method and width, its seeds together."""

import math
from functools import partial
from typing import Any

from mobiquant_jax.baselines.results import Row
from mobiquant_jax.markdown import table_lines, where_from

_MODEL = ("bits", "method", "calibrated_bits")


def perplexity_table(content: dict[str, Any]) -> str:
    """Markdown of results: mean over seeds, the least and the greatest beside it, bits asked and bits used.

    Args:
        content: of a file of results; settings are left out, so each method and width should have one choice of them.
    """
    rows = content["rows"]
    texts = list(dict.fromkeys(row["text"] for row in rows))
    models: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        models.setdefault(tuple(row[name] for name in _MODEL), []).append(row)
    head = ["bits", "used", "method", *texts, "seeds", "settings tried", "seconds"]
    lines = []
    for (bits, method, calibrated), mine in sorted(models.items(), key=partial(_order, texts[:1])):
        name = method if calibrated in (None, bits) else f"{method}, made at {calibrated:g} bits"
        cells = [_cell([row["perplexity"] for row in mine if row["text"] == text]) for text in texts]
        seeds = {row["seed"] for row in mine} - {None}
        tried = next((row["settings_tried"] for row in mine if row["settings_tried"] is not None), None)
        seconds = [row["seconds"] for row in mine if row["seconds"]]  # a run that was resumed does not know
        took = f"{sum(seconds) / len(seconds):.0f}" if seconds else "-"
        known = [str(len(seeds) or "-"), "-" if tried is None else str(tried), took]
        asked = ["-", "-"] if bits is None else [f"{bits:g}", _used(mine)]
        lines.append([*asked, name, *cells, *known])
    origin = f"Perplexities, mean (least to greatest); {where_from(content['sessions'])}. The file has every command."
    return "\n".join([*table_lines(head, lines), "", origin])


def _order(texts: list[str], item: tuple[tuple[Any, ...], list[Row]]) -> tuple[Any, ...]:
    """By width, unquantized first; at one width by perplexity on these texts, what was made for another one last."""
    (bits, _, calibrated), rows = item
    found = [row["perplexity"] or math.inf for row in rows if row["text"] in texts]
    return (bits or 0, calibrated not in (None, bits), sum(found) / len(found) if found else math.inf)


def _used(rows: list[Row]) -> str:
    """Average bits, over texts and seeds, to two places."""
    low, high = (f"{end(row['measured_bits'] for row in rows):.2f}" for end in (min, max))
    return low if low == high else f"{low} to {high}"


def _cell(found: list[float | None]) -> str:
    numbers = [value for value in found if value is not None]
    if len(numbers) < len(found):
        return "not finite"
    if not numbers:
        return "not measured"
    mean = f"{sum(numbers) / len(numbers):.4g}"
    return mean if len(numbers) == 1 else f"{mean} ({min(numbers):.4g} to {max(numbers):.4g})"
