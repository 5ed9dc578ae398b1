"""The comparison of policies as a Markdown table."""

from typing import Any

from mobiquant_jax.markdown import table_lines
from mobiquant_jax.provenance import short_commit


def policies_table(numbers: dict[str, Any]) -> str:
    """Perplexity of every policy at equal average bits, with where it came from.

    Args:
        numbers: a report's ``numbers.json``.

    Raises:
        ValueError: it holds no policies.
    """
    if missing := {"policies", "provenance", "windows", "window_length"} - numbers.keys():
        raise ValueError(f"no analysis: it lacks {', '.join(sorted(missing))}")
    rows = {(row["asked_bits"], row["name"]): row["perplexity"] for row in numbers["policies"]}
    names = list(dict.fromkeys(row["name"] for row in numbers["policies"]))
    cells = [
        [f"{bits:g}", *(f"{rows[bits, name]:.2f}" if (bits, name) in rows else "-" for name in names)]
        for bits in dict.fromkeys(row["asked_bits"] for row in numbers["policies"])
    ]
    lines = table_lines(["average bits", *names], cells)
    origin = numbers["provenance"]
    lines += ["", f"`{origin['command']}` at {short_commit(origin['commit'])}: {numbers['windows']} windows of"]
    lines[-1] += f" {numbers['window_length']} tokens; {', '.join(origin['devices'])}; jax {origin['versions']['jax']}."
    return "\n".join(lines)
