"""Bytes: of the weights, of a program, and what a decoding step must read."""

from typing import Any

from jax.stages import Compiled

from mobiquant_jax.models.kv_cache import KVCache
from mobiquant_jax.provenance import peak_device_bytes
from mobiquant_jax.serving import PackedModel, device_bytes


def describe_weights(model: PackedModel) -> dict[str, float]:
    """Bytes on the device, bits a weight of the packed linears, and the size of one plane of one layer's linears."""
    shapes, layers = model.config.linear_shapes().values(), model.config.num_hidden_layers
    sites = model.variables.sites.values()
    packed = sum(device_bytes(site.weight) for site in sites)
    return {
        "all_GB": device_bytes(model.variables) / 1e9,
        "linears_GB": packed / 1e9,
        "bits_per_weight": 8 * packed / (layers * sum(rows * columns for rows, columns in shapes)),
        "routers_GB": device_bytes(([site.router for site in sites], model.variables.thresholds)) / 1e9,
        "plane_MB": sum(site.weight.planes[0].nbytes for site in sites) / layers / 1e6,
    }


def program_memory(program: Compiled) -> dict[str, float]:
    """What XLA says of a program: all its memory, and what of it is scratch, where a copied weight would show."""
    memory: Any = program.memory_analysis()
    inputs = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "memory_GB": (inputs + memory.temp_size_in_bytes) / 1e9,
        "temp_MB": memory.temp_size_in_bytes / 1e6,
    }


def bytes_needed(model: PackedModel, cache: KVCache, bits: float) -> float:
    """Bytes that a decoding step must read: the slices at so many bits, and everything else once.

    Args:
        model: packed or dense.
        cache: keys and values.
        bits: average bits of the weights read; a dense model's do not vary.
    """
    return _head(model) + _around(model, cache) + sum(_kernels(site, bits) for site in model.variables.sites.values())


def peak_memory() -> float | None:
    """Most bytes in use on the device so far, in GB; None where the backend does not say."""
    peak = peak_device_bytes()
    return None if peak is None else peak / 1e9


def _head(model: PackedModel) -> int:
    arrays = model.variables
    return device_bytes((arrays.embedding if arrays.head is None else arrays.head, arrays.final_norm))


def _around(model: PackedModel, cache: KVCache) -> int:
    """Of all layers, what is no kernel."""
    arrays = model.variables
    routers = [getattr(site, "router", None) for site in arrays.sites.values()]
    return device_bytes((arrays.attention_norm, arrays.mlp_norm, routers, arrays.thresholds, cache.k, cache.v))


def _kernels(site: Any, bits: float) -> float:
    if hasattr(site, "kernels"):
        return device_bytes(site.kernels)
    return device_bytes(site.weight.planes) * bits / 8 + device_bytes(site.weight.affine)
