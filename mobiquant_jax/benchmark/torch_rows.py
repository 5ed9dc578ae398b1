"""The same products in torch, where it is installed with CUDA: bfloat16 and its 4-bit group kernel, batch 1."""

import importlib.util
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from mobiquant_jax.benchmark.table import Row
from mobiquant_jax.models import LlamaConfig
from mobiquant_jax.serving.site import SITES

_COPIES = 6  # of the weights, so that they do not stay in the cache
_REPLAYS = 12


def torch_keys() -> tuple[Row, ...]:
    """A row a fused product; none without torch and CUDA."""
    if importlib.util.find_spec("torch") is None:
        return ()
    import torch

    return tuple({"product": name} for name in SITES) if torch.cuda.is_available() else ()


def torch_rows(config: LlamaConfig, group_size: int, keys: Sequence[Row]) -> Iterator[Row]:
    """Yields ``bf16_us`` and ``int4_us``, each timed as one CUDA graph over several copies of the weights."""
    import torch

    shapes = config.linear_shapes()
    for name in (key["product"] for key in keys):
        paths = SITES[name]
        inputs, outputs = shapes[paths[0]][0], sum(shapes[path][1] for path in paths)
        x = torch.randn(1, inputs, dtype=torch.bfloat16, device="cuda")
        dense = [torch.randn(outputs, inputs, dtype=torch.bfloat16, device="cuda") for _ in range(_COPIES)]
        calls: list[Any] = [partial(torch.nn.functional.linear, x, kernel) for kernel in dense]
        row: Row = {"product": name, "bf16_us": _graph_microseconds(torch, calls)}
        del dense
        packed = []
        for _ in range(_COPIES):
            codes = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, device="cuda")
            affine = torch.rand(inputs // group_size, outputs, 2, dtype=torch.bfloat16, device="cuda")
            packed.append((torch._convert_weight_to_int4pack(codes, 8), affine))
        calls = [partial(torch._weight_int4pack_mm, x, codes, group_size, affine) for codes, affine in packed]
        yield row | {"int4_us": _graph_microseconds(torch, calls)}


def _graph_microseconds(torch: Any, calls: list[Any]) -> float:
    """Median time of a call, in one CUDA graph of all of them."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(_REPLAYS):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / len(kept))
    return sorted(times)[len(times) // 2]
