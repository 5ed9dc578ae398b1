"""What a conversion took: time and memory, against the bound that it is held to; as a record and as a table."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mobiquant_jax.io.names import tensor_specs
from mobiquant_jax.models.config import LlamaConfig
from mobiquant_jax.provenance import origins

FIXED_BYTES = 10**9


def memory_bound(largest: int) -> int:
    """Bytes that a conversion may hold at most, whatever the model's size: twice the largest tensor and 1 GB.

    Args:
        largest: bytes of the largest tensor as it is written.
    """
    return 2 * largest + FIXED_BYTES


def measured(config: LlamaConfig, itemsize: int, seconds: float, peak: int) -> dict[str, Any]:
    """The figures of a conversion to a Hugging Face folder.

    Args:
        config: the model.
        itemsize: bytes of an element as written.
        seconds: all of the conversion.
        peak: most bytes of host memory that the process held.
    """
    sizes = [itemsize * int(np.prod(spec.shape)) for spec in tensor_specs(config, "hf").values()]
    return {
        "layers": config.num_hidden_layers,
        "tensors": len(sizes),
        "bytes": sum(sizes),
        "largest_tensor": max(sizes),
        "seconds": round(seconds, 1),
        "peak_host_bytes": peak,
        "bound": memory_bound(max(sizes)),
    }


def conversions_table(records: Sequence[dict[str, Any]]) -> str:
    """Records of ``results/conversion.json`` as Markdown: a row a conversion, and a line on where they came from.

    Args:
        records: what `measured` gives, with ``source`` (what was read), ``dtype`` and ``provenance``.
    """
    lines = [
        "| from | to | layers | GB written | largest tensor, GB | peak host memory, GB | may be | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        names = ("bytes", "largest_tensor", "peak_host_bytes", "bound")
        gigabytes = " | ".join(f"{record[name] / 1e9:.2f}" for name in names)
        lines.append(
            f"| {record['source']} | {record['dtype']} | {record['layers']} | {gigabytes} | {record['seconds']:.0f} |"
        )
    return "\n".join([*lines, "", *origins("experiments/convert.py", records)])
