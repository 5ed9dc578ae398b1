r"""Speed of the packed model on this device: kernels, decoding, prefill, switching bits, memory.

python experiments/benchmark.py --config=configs/llama3_8b.py --config.model.weights=random \
    --output=results/benchmark_h100.json

Weights are random, of the config's shapes. A kernel's time is that of a program that runs it once for each layer, so
that no two calls read the same weights, queued several times over; it includes the launches. With torch installed, its
bfloat16 and 4-bit products of the same shapes stand beside ours.
"""

import dataclasses
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from mobiquant_jax.config_flags import define_config, run, whole_numbers
from mobiquant_jax.experiment import load_architecture, load_elastic
from mobiquant_jax.files import save_json
from mobiquant_jax.models import LlamaConfig
from mobiquant_jax.models.kv_cache import KVCache
from mobiquant_jax.ops import sliced_matmul
from mobiquant_jax.provenance import provenance
from mobiquant_jax.serving import PackedModel, device_bytes
from mobiquant_jax.serving.packed import SITES
from mobiquant_jax.serving.random_weights import random_dense, random_packed

CONFIG = define_config()
OUTPUT = flags.DEFINE_string("output", None, "JSON file of all figures; a Markdown table goes beside it")
CONTEXT = flags.DEFINE_integer("context", 1024, "tokens in the cache when decoding is timed")
STEPS = flags.DEFINE_integer("steps", 32, "decoding steps a timing")
BATCHES = flags.DEFINE_list("batches", ["1", "4", "16"], "sequences decoded together")
PREFILL = flags.DEFINE_list("prefill", ["512", "2048"], "tokens of a prefill's products")
BITS = (2.0, 3.0, 4.0, 6.0, 8.0)
DEPTHS = (1, 2, 3, 4)
REPEATS = 5
TORCH_COPIES = 6  # of the weights, so that they do not stay in the cache


def main(_: list[str]) -> None:
    """Measures everything, printing as it goes, and writes the figures."""
    config = CONFIG.value
    if config.model.weights != "random":
        raise ValueError("the benchmark draws its weights: give --config.model.weights=random")
    architecture = load_architecture(config)
    elastic = load_elastic(config)
    batches, lengths = whole_numbers("batches", BATCHES.value), whole_numbers("prefill", PREFILL.value)
    figures: dict[str, Any] = {"read_bandwidth_TBps": read_bandwidth() / 1e12}
    show("read bandwidth", figures)
    model = random_packed(architecture, elastic, jax.random.key(0))
    figures["weights"] = describe_weights(model)
    show("weights", figures["weights"])
    figures["kernels"] = kernel_table(model, figures["read_bandwidth_TBps"] * 1e12)
    figures["decode"] = [row for batch in batches for row in decode_rows(model, batch, BITS)]
    figures["router_share"] = router_share(model)
    figures["switch"] = switching(model)
    figures["memory_packed_GB"] = peak_memory()
    mixed = {length: prefill_seconds(model, length) for length in lengths}
    del model
    dense = random_dense(architecture, jax.random.key(0))
    figures["prefill"] = [
        {"tokens": n, "mixed_ms": 1e3 * mixed[n], "bf16_ms": 1e3 * prefill_seconds(dense, n)} for n in lengths
    ]
    for row in figures["prefill"]:
        row["ratio"] = row["bf16_ms"] / row["mixed_ms"]
        show("prefill", row)
    figures["decode"] += [row for batch in batches for row in decode_rows(dense, batch, (16.0,))]
    figures["memory_peak_GB"] = peak_memory()
    del dense
    figures["torch"] = torch_products(architecture, elastic.group_size)
    show("torch", figures["torch"])
    if OUTPUT.value:
        save_json(OUTPUT.value, {**figures, "provenance": provenance()})
        Path(OUTPUT.value).with_suffix(".md").write_text(markdown(figures))


def show(title: str, values: Any) -> None:
    """Prints figures as they come."""
    print(title, json.dumps(values, default=float), file=sys.stderr, flush=True)


def seconds(call: Callable[[], Any], queued: int = 10) -> float:
    """Median time of a call among several queued behind each other, so that the host's part is hidden."""
    jax.block_until_ready(call())
    jax.block_until_ready(call())  # the second run records the device graph
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        results = [call() for _ in range(queued)]
        jax.block_until_ready(results)
        times.append((time.perf_counter() - start) / queued)
    return float(np.median(times))


def read_bandwidth() -> float:
    """Bytes a second of reading a large array."""
    words = jax.jit(lambda: jax.random.bits(jax.random.key(0), (2**30,), jnp.uint32))()
    return words.nbytes / seconds(partial(jax.jit(jnp.max), words))


def describe_weights(model: PackedModel) -> dict[str, float]:
    """Bytes on the device, and bits a weight of the packed linears."""
    shapes = model.config.linear_shapes().values()
    weights = model.config.num_hidden_layers * sum(rows * columns for rows, columns in shapes)
    packed = sum(device_bytes(site.weight) for site in model.variables.sites.values())
    return {
        "all_GB": device_bytes(model.variables) / 1e9,
        "linears_GB": packed / 1e9,
        "bits_per_weight": 8 * packed / weights,
        "routers_GB": sum(device_bytes(site.router) for site in model.variables.sites.values()) / 1e9,
    }


def kernel_table(model: PackedModel, bandwidth: float) -> list[dict[str, Any]]:
    """Time of each fused product and of a layer's four at each depth, batch 1."""
    rows, layers = [], model.config.num_hidden_layers
    sites = model.variables.sites
    inputs = {name: random_inputs(site.weight.in_features, 1) for name, site in sites.items()}

    def products(weights: Any, inputs: Any, depth: Any, names: tuple[str, ...]) -> list[Any]:
        outputs = []
        for layer in range(layers):
            for name in names:
                x, weight = inputs[name], weights[name]
                outputs.append(sliced_matmul(x, weight, jnp.broadcast_to(depth, (1,)), layer=layer))
        return outputs

    run_products = jax.jit(products, static_argnums=3)
    for names in (*((name,) for name in sites), tuple(sites)):
        weights = {name: sites[name].weight for name in names}
        for depth in DEPTHS:
            at = jnp.int32(depth)
            took = seconds(partial(run_products, weights, inputs, at, names)) / layers
            read = sum(weight.bytes_read(depth) for weight in weights.values())
            row = {"product": "+".join(names), "depth": depth, "us": 1e6 * took, "MB": read / 1e6}
            row["percent_of_read_bandwidth"] = 100 * read / took / bandwidth
            show("kernel", row)
            rows.append(row)
    return rows


def random_inputs(features: int, tokens: int) -> jax.Array:
    """Normal activations."""
    return jax.random.normal(jax.random.key(1), (tokens, features), jnp.bfloat16)


def decode_rows(model: PackedModel, batch: int, targets: tuple[float, ...]) -> list[dict[str, Any]]:
    """Tokens a second with a full cache; one program for all bits."""

    def decode(variables: Any, cache: KVCache, tokens: Any, bits: Any) -> tuple[Any, ...]:
        def step(_: Any, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            cache, tokens, used = carry
            logits, token_bits, cache = model.decode(variables, tokens, cache, bits)
            return cache, jnp.argmax(logits, axis=-1).astype(jnp.int32), used + jnp.mean(token_bits)

        return jax.lax.fori_loop(0, STEPS.value, step, (cache, tokens, jnp.zeros(())))

    program: Any = jax.jit(decode, donate_argnums=1)
    rows = []
    for target in targets:
        bits, tokens, times = jnp.full(batch, target), jnp.full((batch, 1), 5, jnp.int32), []
        for _ in range(REPEATS):
            empty = KVCache.create(model.config, batch, CONTEXT.value + STEPS.value, jnp.bfloat16)
            cache = jax.block_until_ready(dataclasses.replace(empty, length=jnp.full(batch, CONTEXT.value)))
            start = time.perf_counter()
            _, _, used = jax.block_until_ready(program(model.variables, cache, tokens, bits))
            times.append(time.perf_counter() - start)
        step_seconds = float(np.median(times[1:])) / STEPS.value
        row = {"batch": batch, "bits": target, "measured_bits": float(used) / STEPS.value, "ms": 1e3 * step_seconds}
        row["tokens_per_s"] = batch / step_seconds
        show("decode", row)
        rows.append(row)
    assert program._cache_size() == 1, "changing the bits compiled again"
    return rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FixedDepth:
    """In place of a router: one depth for all, at no cost."""

    linears: int = dataclasses.field(metadata={"static": True})

    def depths(self, x: Any, bits: Any, layer: Any) -> Any:
        """See `SiteRouter`."""
        return jnp.ones((self.linears, *x.shape[:2]), jnp.int32)


def router_share(model: PackedModel) -> dict[str, float]:
    """The routers' part of a decoding step at 2 bits: the step with them and without."""
    (routed,) = decode_rows(model, 1, (2.0,))
    sites = {
        name: dataclasses.replace(site, router=FixedDepth(len(site.weight.segments)))
        for name, site in model.variables.sites.items()
    }
    unrouted_model = dataclasses.replace(model, variables=dataclasses.replace(model.variables, sites=sites))
    (unrouted,) = decode_rows(unrouted_model, 1, (2.0,))
    share = {"ms": routed["ms"], "without_ms": unrouted["ms"], "share": 1 - unrouted["ms"] / routed["ms"]}
    show("routers", share)
    return share


def switching(model: PackedModel) -> dict[str, float]:
    """Time of single steps whose bits stay, and of steps whose bits change each time, at the same average."""
    step: Any = jax.jit(model.decode)
    cache = KVCache.create(model.config, 1, 8, jnp.bfloat16)
    tokens = jnp.ones((1, 1), jnp.int32)

    def milliseconds(sequence: list[float]) -> float:
        times = []
        for bits in sequence:
            start = time.perf_counter()
            jax.block_until_ready(step(model.variables, tokens, cache, np.float32(bits))[0])
            times.append(1e3 * (time.perf_counter() - start))
        return float(np.median(times))

    milliseconds([2.0, 8.0, 2.0])
    stay = [milliseconds([bits] * 20) for bits in (2.0, 8.0)]
    change = [milliseconds([first, second]) for first, second in ((2.0, 8.0), (8.0, 2.0)) for _ in range(10)]
    result = {"stay_ms": float(np.mean(stay)), "change_ms": float(np.mean(change))}
    result["programs"] = step._cache_size()
    show("switch", result)
    return result


def prefill_seconds(model: PackedModel, tokens: int) -> float:
    """Time of a layer's four products over many tokens, depths drawn evenly from 1 to 4 where there are depths."""
    layers = min(4, model.config.num_hidden_layers)
    sites = model.variables.sites
    shapes = {
        name: (site.weight.in_features if hasattr(site, "weight") else site.kernels[0].shape[0])
        for name, site in sites.items()
    }
    inputs = {name: random_inputs(features, tokens) for name, features in shapes.items()}
    depths = {
        name: jax.random.randint(jax.random.key(2), (len(site.weight.segments), tokens), 1, 5)
        for name, site in sites.items()
        if hasattr(site, "weight")
    }

    def products(sites: Any, inputs: Any, depths: Any) -> list[Any]:
        outputs = []
        for layer in range(layers):
            for name, site in sites.items():
                if name in depths:
                    y = sliced_matmul(inputs[name], site.weight, depths[name], layer=layer, dtype=jnp.bfloat16)
                else:
                    y = jnp.matmul(inputs[name], site.kernels[layer])
                outputs.append(y)
        return outputs

    program = jax.jit(products)
    return seconds(lambda: program(sites, inputs, depths)) / layers


def torch_products(config: LlamaConfig, group_size: int) -> list[dict[str, Any]]:
    """Microseconds of the fused products in bfloat16 and with torch's 4-bit group kernel, batch 1; empty without torch.

    Each is timed as one CUDA graph over several copies of the weights.
    """
    if importlib.util.find_spec("torch") is None:
        return []
    import torch

    if not torch.cuda.is_available():
        return []
    shapes, rows = config.linear_shapes(), []
    for name, paths in SITES.items():
        inputs, outputs = shapes[paths[0]][0], sum(shapes[path][1] for path in paths)
        x = torch.randn(1, inputs, dtype=torch.bfloat16, device="cuda")
        dense = [torch.randn(outputs, inputs, dtype=torch.bfloat16, device="cuda") for _ in range(TORCH_COPIES)]
        calls = [partial(torch.nn.functional.linear, x, kernel) for kernel in dense]
        row: dict[str, Any] = {"product": name, "bf16_us": graph_microseconds(torch, calls)}
        del dense
        packed = []
        for _ in range(TORCH_COPIES):
            codes = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, device="cuda")
            affine = torch.rand(inputs // group_size, outputs, 2, dtype=torch.bfloat16, device="cuda")
            packed.append((torch._convert_weight_to_int4pack(codes, 8), affine))
        calls = [partial(torch._weight_int4pack_mm, x, codes, group_size, affine) for codes, affine in packed]
        row["int4_us"] = graph_microseconds(torch, calls)
        rows.append(row)
    return rows


def graph_microseconds(torch: Any, calls: list[Any]) -> float:
    """Device time of a call, in one CUDA graph of all of them."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(12):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / len(kept))
    return sorted(times)[len(times) // 2]


def peak_memory() -> float:
    """Most bytes in use on the device so far, in GB; 0 where the backend does not say."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", 0) / 1e9


def markdown(figures: dict[str, Any]) -> str:
    """The tables."""
    facts = provenance()
    lines = [
        f"`{facts['command']}`",
        "",
        f"{', '.join(facts['devices'])}; jax {facts['versions']['jax']}; "
        f"plain reads reach {figures['read_bandwidth_TBps']:.2f} TB/s.",
        "",
        "| product | depth | us | % of read bandwidth |",
        "|---|---|---|---|",
    ]
    for row in figures["kernels"]:
        cells = f"{row['depth']} | {row['us']:.1f} | {row['percent_of_read_bandwidth']:.0f}"
        lines.append(f"| {row['product']} | {cells} |")
    base = {row["batch"]: row["ms"] for row in figures["decode"] if row["bits"] == 16.0}
    lines += ["", "| batch | bits asked | bits used | ms a step | tokens/s | times bf16 |", "|---|---|---|---|---|---|"]
    for row in figures["decode"]:
        lines.append(
            f"| {row['batch']} | {row['bits']:g} | {row['measured_bits']:.2f} | {row['ms']:.2f} | "
            f"{row['tokens_per_s']:.0f} | {base[row['batch']] / row['ms']:.2f} |"
        )
    lines += ["", "| tokens | packed, mixed depths, ms | bf16, ms | ratio |", "|---|---|---|---|"]
    for row in figures["prefill"]:
        lines.append(f"| {row['tokens']} | {row['mixed_ms']:.2f} | {row['bf16_ms']:.2f} | {row['ratio']:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run(main)
