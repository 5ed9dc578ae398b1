"""The table of what programs need of each chip."""

from collections.abc import Sequence
from typing import Any

from mobiquant_jax.aot.chips import GIB
from mobiquant_jax.provenance import short_commit

KEY = ("model", "topology", "mesh", "program")
"""Fields that tell one record of ``results/aot.json`` from another."""


def render_table(records: Sequence[dict[str, Any]]) -> str:
    """The records of ``results/aot.json`` as Markdown: a row a program, and a line on where they came from."""
    lines = [
        "| model | topology | data x fsdp x model | program | GiB a chip (has) | TFLOP a chip | GB moved a chip |",
        "|---|---|---|---|---|---|---|",
    ]
    heads = [f"| {r['model']} | {r['topology']} | {' x '.join(map(str, r['mesh']))}" for r in records]
    # Programs of one mesh stand together, whenever they were compiled.
    for head, record in sorted(zip(heads, records, strict=True), key=lambda pair: heads.index(pair[0])):
        name = f"{record['program']}, batch {record['batch']}"
        memory = f"{record['memory'] / GIB:.1f} ({record['chip_memory'] / GIB:.0f})"
        if record["seconds"] is None:
            lines.append(f"{head} | {name} | {memory}: does not fit | | |")
            continue
        flops, moved = record["flops"] / 1e12, record["bytes_accessed"] / 1e9
        lines.append(f"{head} | {name} | {memory} | {flops:.3g} | {moved:.3g} |")
    return "\n".join([*lines, "", *_origins(records)])


def _origins(records: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each commit and set of versions that records came from."""
    origins = dict.fromkeys(
        f"`experiments/aot_check.py` at {short_commit(record['provenance']['commit'])}: "
        f"{record['tokens']} tokens a sequence; jax {record['provenance']['versions']['jax']}, "
        f"libtpu {record['provenance']['libtpu']}."
        for record in records
    )
    return list(origins)
