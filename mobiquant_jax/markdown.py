"""Markdown tables of what was measured, put between the markers of a text."""

import re
from typing import Any

from mobiquant_jax.aot import render_table


def fill(text: str, results: dict[str, Any]) -> str:
    """The text with each of its tables made anew.

    Args:
        text: Markdown with markers.
        results: the content of each file that a marker names.
    """

    def section(match: re.Match[str]) -> str:
        name = match.group(1)
        table = aot_table(results[name]) if name.endswith("aot.json") else curve_table(results[name])
        return f"<!-- {name} -->\n{table}\n<!-- end -->"

    return re.sub(r"<!-- (results/\S+) -->\n.*?<!-- end -->", section, text, flags=re.DOTALL)


def curve_table(result: dict[str, Any]) -> str:
    """The curve of a calibration run, with the command, versions and hardware that gave it."""
    rows = ["| average bits | measured | perplexity | against unquantized |", "|---|---|---|---|"]
    reference = next(point["perplexity"] for point in result["curve"] if point["bits"] is None)
    for point in result["curve"]:
        if point["bits"] is None:
            rows.append(f"| unquantized | - | {reference:.2f} | |")
            continue
        excess = 100 * (point["perplexity"] / reference - 1)
        cells = f"{point['bits']:g}", f"{point['measured_bits']:.2f}", f"{point['perplexity']:.2f}", f"{excess:+.1f} %"
        rows.append(f"| {' | '.join(cells)} |")
    origin = result["provenance"]
    versions = ", ".join(f"{name} {origin['versions'][name]}" for name in ("jax", "flax"))
    hardware = ", ".join(origin["devices"]) + f", {origin['cores']} cores"
    source = (
        f"`{origin['command']}` at {origin['commit'][:7]}: {result['seconds']:.0f} s, {result['peak_gb']:.1f} GB of "
        f"host memory; {hardware}; Python {origin['python']}, {versions}."
    )
    return "\n".join([*rows, "", source])


def aot_table(result: Any) -> str:
    """What a TPU program needs, compiled ahead of time."""
    return render_table(result)
