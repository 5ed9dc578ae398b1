"""The figures as Markdown tables."""

from collections.abc import Iterator
from typing import Any

from mobiquant_jax.benchmark.settings import DENSE_BITS
from mobiquant_jax.provenance import short_commit


def markdown(content: dict[str, Any]) -> str:
    """The tables of the sections that there are.

    Args:
        content: a table's content, see `Table`.
    """
    parts = [_origin(content)]
    for section, table in _TABLES.items():
        if content.get(section):
            parts.append("\n".join(table(content)))
    return "\n\n".join(parts) + "\n"


def summary(content: dict[str, Any]) -> str:
    """Speed beside bfloat16 and how fast the four products of a layer read, in two small tables.

    Args:
        content: a table's content, see `Table`.

    Raises:
        ValueError: a section is missing.
    """
    if missing := {"decode", "kernels", "sessions"} - content.keys():
        raise ValueError(f"no benchmark: it lacks {', '.join(sorted(missing))}")
    base = {row["batch"]: row["ms"] for row in content["decode"] if row["bits"] == DENSE_BITS}
    lines = ["| batch | average bits | ms a step | tokens/s | times bf16 |", "|---|---|---|---|---|"]
    for row in sorted(content["decode"], key=lambda row: (row["batch"], row["bits"])):
        bits = "bf16" if row["bits"] == DENSE_BITS else f"{row['bits']:g}"
        speedup = _number(base[row["batch"]] / row["ms"] if row["batch"] in base else None, ".2f")
        lines.append(f"| {row['batch']} | {bits} | {row['ms']:.2f} | {row['tokens_per_s']:.0f} | {speedup} |")
    lines += ["", "| slices | us for a layer's products, batch 1 | % of read bandwidth |", "|---|---|---|"]
    for row in content["kernels"]:
        if "+" in row["product"]:
            lines.append(f"| {row['depth']} | {row['us']:.1f} | {row['percent_of_read_bandwidth']:.0f} |")
    return "\n".join([*lines, "", _origin(content)])


def _origin(content: dict[str, Any]) -> str:
    lines = [
        f"`{session['command']}` at {short_commit(session['commit'])}: {', '.join(session['devices'])}; "
        f"jax {session['versions']['jax']}."
        for session in content["sessions"]
    ]
    return "\n\n".join(dict.fromkeys(lines))


def _weights(content: dict[str, Any]) -> Iterator[str]:
    row = content["weights"]
    yield (
        f"Packed: {row['all_GB']:.2f} GB on the device, {row['bits_per_weight']:.2f} bits a weight of the linears; "
        f"routers {row['routers_GB']:.3f} GB."
    )


def _kernels(content: dict[str, Any]) -> Iterator[str]:
    bandwidth = content["kernels"][-1]["read_bandwidth_TBps"]
    yield f"Plain reads reach {bandwidth:.2f} TB/s. Busy: without the gaps between kernels."
    yield ""
    yield "| product | depth | us | % of read bandwidth | busy us | % |"
    yield "|---|---|---|---|---|---|"
    for row in content["kernels"]:
        yield (
            f"| {row['product']} | {row['depth']} | {row['us']:.1f} | {row['percent_of_read_bandwidth']:.0f} | "
            f"{_number(row['busy_us'], '.1f')} | {_number(row['busy_percent'], '.0f')} |"
        )


def _decode(content: dict[str, Any]) -> Iterator[str]:
    base = {row["batch"]: row["ms"] for row in content["decode"] if row["bits"] == DENSE_BITS}
    yield "| batch | bits asked | bits used | ms a step | tokens/s | times bf16 | GB to read | GB in all | scratch MB |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for row in sorted(content["decode"], key=lambda row: (row["batch"], row["bits"])):
        speedup = base[row["batch"]] / row["ms"] if row["batch"] in base else None
        yield (
            f"| {row['batch']} | {row['bits']:g} | {row['measured_bits']:.2f} | {row['ms']:.2f} | "
            f"{row['tokens_per_s']:.0f} | {_number(speedup, '.2f')} | {row['needed_GB']:.2f} | "
            f"{row['memory_GB']:.2f} | {row['temp_MB']:.1f} |"
        )


def _router_share(content: dict[str, Any]) -> Iterator[str]:
    row = content["router_share"]
    yield (
        f"A step at 2 bits, batch 1, takes {row['ms']:.2f} ms; without routers, as separate programs, "
        f"{row['without_ms']:.2f} ms."
    )


def _switch(content: dict[str, Any]) -> Iterator[str]:
    row = content["switch"]
    yield (
        f"Single steps take {row['stay_ms']:.2f} ms where the bits stay and {row['change_ms']:.2f} ms where they "
        f"change each time; programs compiled: {row['programs']}."
    )


def _prefill(content: dict[str, Any]) -> Iterator[str]:
    yield "| tokens | packed, mixed depths, ms a layer | bf16, ms | ratio |"
    yield "|---|---|---|---|"
    for row in content["prefill"]:
        yield f"| {row['tokens']} | {row['mixed_ms']:.3f} | {row['bf16_ms']:.3f} | {row['ratio']:.2f} |"


def _torch(content: dict[str, Any]) -> Iterator[str]:
    ours = {row["product"]: row["us"] for row in content.get("kernels", []) if row["depth"] == 2}
    yield "| product, batch 1 | torch bf16 us | torch int4 us | ours at 4 bits us |"
    yield "|---|---|---|---|"
    for row in content["torch"]:
        us = _number(ours.get(row["product"]), ".1f")
        yield f"| {row['product']} | {row['bf16_us']:.1f} | {row['int4_us']:.1f} | {us} |"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


_TABLES = {
    "weights": _weights,
    "kernels": _kernels,
    "decode": _decode,
    "router_share": _router_share,
    "switch": _switch,
    "prefill": _prefill,
    "torch": _torch,
}
