"""All layers of a decode step on Hopper GPUs, for up to 16 sequences of one new token each.

The gaps between XLA's few hundred small programs take longer than the reading at two bits.
``cuda/decode_layers.cu`` launches nine kernels a layer, each before the one before it has ended: routing with the norm
or gate that makes its input (``route.cuh``), the product (``decode.cuh``), attention (``attention.cuh``).
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mobiquant_jax.ops import compiler, decode_attention
from mobiquant_jax.ops.sliced_matmul import gpu
from mobiquant_jax.ops.sliced_matmul.layout import TILE_OUTPUTS, TILED_LAYOUT_VERSION, TiledWeight
from mobiquant_jax.routing import FusedRouter

SOURCE = Path(compiler.__file__).parent / "cuda" / "decode_layers.cu"
_WIDTHS = (8, 16, 32, 64)  # hidden units of a router
_ENDS = ("qkv_ends", "o_ends", "gate_up_ends", "down_ends")


class RoutedLinears(NamedTuple):
    """Linears of one input, all layers.

    Attributes:
        weight: kernels.
        router: routers.
    """

    weight: TiledWeight
    router: FusedRouter


class DecodedLayers(NamedTuple):
    """What `decode_layers` returns.

    Attributes:
        x: the residual stream after the last block.
        key: the cache with the new tokens.
        value: likewise.
        depths: slices each token read of q, k, v, o, gate, up and down.
    """

    x: Float[Array, "B D"]
    key: Float[Array, "L B S Hkv hd"]
    value: Float[Array, "L B S Hkv hd"]
    depths: Int[Array, "L 7 B"]


def decode_layers(
    x: Float[Array, "B D"],
    rotation: Float[Array, "2 B half"],
    positions: Int[Array, " B"],
    norms: tuple[Float[Array, "L D"], Float[Array, "L D"]],
    eps: float,
    key: Float[Array, "L B S Hkv hd"],
    value: Float[Array, "L B S Hkv hd"],
    sites: Sequence[RoutedLinears],
    thresholds: Float[Array, "L 7 B"],
    expected: Int[Array, ""],
) -> DecodedLayers:
    """Runs one new token of each sequence through every block.

    Args:
        x: embedded tokens, bfloat16.
        rotation: cosine and sine of the rotary angles at the tokens' positions.
        positions: absolute position of each token.
        norms: gains before attention and before the MLP.
        eps: of both.
        key: the cache, bfloat16, written in place.
        value: likewise.
        sites: q, k and v; o; gate and up; down.
        thresholds: of the routers of q, k, v, o, gate, up and down, for each sequence.
        expected: how many slices a product will probably read, to be fetched while its routers still run. Only a hint:
            any number gives the same result.

    Raises:
        NotImplementedError: see `check_supported`.
    """
    if x.shape[0] != key.shape[1]:
        raise ValueError(f"tokens {x.shape} and a cache {key.shape} of other batches")
    routed = key.shape[0], sum(len(site.weight.segments) for site in sites), x.shape[0]
    if thresholds.shape != routed:
        raise ValueError(f"thresholds {thresholds.shape} of other layers, linears or tokens than {routed}")
    turned = 2, x.shape[0], key.shape[-1] // 2
    if rotation.shape != turned:
        raise ValueError(f"rotation {rotation.shape} of other tokens or heads than {turned}")
    check_supported(x.shape[0], key, sites)
    batch, hidden = x.shape
    widest = max(site.weight.in_features for site in sites)
    heads = sites[1].weight.in_features
    bf16 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    qkv, o, gate_up, down = (_product_shape(site.weight, batch) for site in sites)
    depths = jax.ShapeDtypeStruct(routed, jnp.int32)
    caches = bf16(key.shape), bf16(value.shape)
    scratch = bf16((batch, hidden)), bf16((batch, widest)), bf16((batch, heads)), qkv, o, gate_up
    call = jax.ffi.ffi_call(
        _register(gpu.groups_per_block(sites[0].weight)),
        (*caches, bf16((batch, hidden)), down, depths, *scratch),
        input_output_aliases={5: 0, 6: 1},
    )
    with jax.named_scope("decode_layers"):
        key, value, residual, update, read, *_ = call(
            *(x, rotation, positions.astype(jnp.int32), *norms, key, value, thresholds, expected.astype(jnp.int32)),
            *(array for site in sites for array in _arrays(site)),
            eps=np.float32(eps),
            version=np.int64(TILED_LAYOUT_VERSION),
            **{name: _ends(site) for name, site in zip(_ENDS, sites, strict=True)},
        )
        last = jnp.sum(update, axis=0).astype(x.dtype)
    return DecodedLayers(residual + last, key, value, read)


def check_supported(batch: int, key: Float[Array, "L B S Hkv hd"], sites: Sequence[RoutedLinears]) -> None:
    """Raises NotImplementedError, saying why, where the kernels cannot run."""
    decode_attention.check_shapes(sum(sites[0].weight.segments), key)
    if batch > gpu.DECODE_TOKENS:
        raise NotImplementedError(f"the CUDA decode step takes {gpu.DECODE_TOKENS} sequences, not {batch}")
    for site in sites:
        gpu.check_device(site.weight)
        width, inputs = site.router.magnitude.shape[-1], site.weight.in_features
        if site.router.hidden.dtype != jnp.bfloat16:
            raise NotImplementedError(f"the CUDA decode step multiplies bfloat16, not {site.router.hidden.dtype}")
        if width not in _WIDTHS or inputs % 8:
            raise NotImplementedError(f"the CUDA decode step has no router of {width} units on {inputs} inputs")
        if any(outputs % TILE_OUTPUTS for outputs in site.weight.segments):
            raise NotImplementedError(f"the CUDA decode step takes no linears of {site.weight.segments} outputs")
        if gpu.groups_per_block(site.weight) != gpu.groups_per_block(sites[0].weight):
            raise NotImplementedError("the CUDA decode step takes one group size")
    _register(gpu.groups_per_block(sites[0].weight))


def _product_shape(weight: TiledWeight, batch: int) -> jax.ShapeDtypeStruct:
    """Of a product in parts, still to be summed over the first axis."""
    tiles, blocks = weight.planes[0].shape[1:3]
    return jax.ShapeDtypeStruct((gpu.decode_splits(batch, tiles, blocks), batch, tiles * TILE_OUTPUTS), jnp.float32)


def _arrays(site: RoutedLinears) -> tuple[Array, ...]:
    router = site.router
    routing = (router.hidden, router.magnitude, router.hidden_bias, router.output, router.output_bias)
    return (*routing, site.weight.affine, *site.weight.planes)


def _ends(site: RoutedLinears) -> np.ndarray:
    return np.cumsum(np.array(site.weight.segment_tiles, np.int64))


@functools.cache
def _register(groups: int) -> str:
    target = f"mobiquant_decode_layers_{groups}"
    library = compiler.compile_library(SOURCE, (f"MOBIQUANT_GROUPS={groups}",))
    compiler.register(library, {target: "DecodeLayers"})
    return target
