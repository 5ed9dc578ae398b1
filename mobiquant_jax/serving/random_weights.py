"""Models of real shapes with random weights, made on the device: for measuring speed where no weights are at hand."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from mobiquant_jax.models.config import LlamaConfig
from mobiquant_jax.models.elastic import ElasticConfig
from mobiquant_jax.ops import TiledWeight
from mobiquant_jax.ops.sliced_matmul.layout import (
    BLOCK_INPUTS,
    TILE_OUTPUTS,
    check_served_slices,
    check_tileable_group,
)
from mobiquant_jax.routing import FusedRouter, Router, score, threshold_for_bits
from mobiquant_jax.serving.dense import DenseModel, DenseSite
from mobiquant_jax.serving.packed import PackedModel, ServingArrays
from mobiquant_jax.serving.site import SITES, Site

_THRESHOLD_TOKENS = 1024


def random_packed(
    config: LlamaConfig, elastic: ElasticConfig, key: Key[Array, ""], dtype: DTypeLike = jnp.bfloat16
) -> PackedModel:
    """A packed model with random codes and routers; thresholds are recorded on normal inputs, so depths mix.

    Args:
        config: architecture; inputs in multiples of 128 and outputs in multiples of 16.
        elastic: slicing and routing.
        key: randomness.
        dtype: of the activations.

    Raises:
        ValueError: shapes, slices or a group size without a serving layout.
    """
    check_packable(config, elastic)
    keys = dict(zip(SITES, jax.random.split(key, len(SITES)), strict=True))
    made = {name: _packed_site(config, elastic, paths, keys[name], dtype) for name, paths in SITES.items()}
    sites = {name: site for name, (site, _) in made.items()}
    thresholds = jnp.concatenate([tables for _, tables in made.values()], axis=1)
    variables = _around(config, key, sites, thresholds, elastic.budget_grid, dtype)
    return PackedModel(config=config, variables=variables, dtype=dtype)


def check_packable(config: LlamaConfig, elastic: ElasticConfig) -> None:
    """Raises ValueError unless weights of these shapes can be drawn in the serving layout."""
    check_served_slices(elastic.slice_bits)
    check_tileable_group(elastic.group_size)
    for path, (inputs, outputs) in config.linear_shapes().items():
        if inputs % BLOCK_INPUTS or outputs % TILE_OUTPUTS or inputs % elastic.group_size:
            raise ValueError(
                f"{path} [{inputs}, {outputs}] cannot be drawn in the serving layout: it takes inputs in multiples of "
                f"{BLOCK_INPUTS} and of the group size {elastic.group_size}, outputs in multiples of {TILE_OUTPUTS}"
            )


def random_dense(config: LlamaConfig, key: Key[Array, ""], dtype: DTypeLike = jnp.bfloat16) -> DenseModel:
    """The dense model of the same shapes."""
    shapes, layers = config.linear_shapes(), config.num_hidden_layers
    sites = {}
    for name, paths in SITES.items():
        segments = tuple(shapes[path][1] for path in paths)
        shape = (shapes[paths[0]][0], sum(segments))
        draw = jax.jit(lambda key, shape=shape: jax.random.normal(key, shape, dtype) / math.sqrt(shape[0]))
        kernels = tuple(draw(layer_key) for layer_key in jax.random.split(key, layers))
        sites[name] = DenseSite(kernels=kernels, segments=segments)
    grid = (2.0, 8.0)
    no_thresholds = jnp.zeros((layers, 0, len(grid)))
    return DenseModel(config=config, variables=_around(config, key, sites, no_thresholds, grid, dtype), dtype=dtype)


def _around(
    config: LlamaConfig,
    key: Key[Array, ""],
    sites: dict,
    thresholds: Float[Array, "L linears grid"],
    grid: tuple[float, ...],
    dtype: DTypeLike,
) -> ServingArrays:
    vocabulary, hidden, layers = config.vocab_size, config.hidden_size, config.num_hidden_layers
    normal = jax.jit(jax.random.normal, static_argnums=(1, 2))
    return ServingArrays(
        embedding=normal(key, (vocabulary, hidden), dtype),
        head=None if config.tie_word_embeddings else normal(key, (hidden, vocabulary), dtype),
        final_norm=jnp.ones(hidden),
        attention_norm=jnp.ones((layers, hidden)),
        mlp_norm=jnp.ones((layers, hidden)),
        sites=sites,
        thresholds=thresholds,
        grid=grid,
    )


def _packed_site(
    config: LlamaConfig, elastic: ElasticConfig, paths: tuple[str, ...], key: Key[Array, ""], dtype: DTypeLike
) -> tuple[Site, Float[Array, "L S grid"]]:
    """A site and its linears' thresholds."""
    shapes, layers, slices = config.linear_shapes(), config.num_hidden_layers, len(elastic.slice_bits)
    inputs, segments = shapes[paths[0]][0], tuple(shapes[path][1] for path in paths)
    codes_key, scale_key, router_key, input_key = jax.random.split(key, 4)
    tiles, blocks = sum(segments) // TILE_OUTPUTS, inputs // BLOCK_INPUTS
    groups = inputs // min(elastic.group_size, BLOCK_INPUTS)
    words = jax.jit(jax.random.bits, static_argnums=(1, 2))
    # Codes are even over 0..255 and the zero point is in their middle: weights of variance 1 / inputs.
    step = math.sqrt(12 / inputs) / 4
    scale = jax.random.uniform(scale_key, (layers, tiles, groups, 8, 2), jnp.float32, 0.8 * step, 1.2 * step)
    packed = jax.lax.bitcast_convert_type(scale.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32)
    weight = TiledWeight(
        planes=tuple(
            words(plane_key, (layers, tiles, blocks, 32, 4), jnp.uint32)
            for plane_key in jax.random.split(codes_key, slices)
        ),
        affine=packed | jnp.uint32((32768 + 128) << 16),
        in_features=inputs,
        group_size=elastic.group_size,
        segments=segments,
    )
    sample = jax.random.normal(input_key, (_THRESHOLD_TOKENS, inputs))
    routers, tables = _routers(elastic, jax.random.split(router_key, (layers, len(paths))), sample)
    router = FusedRouter(
        hidden=jnp.moveaxis(routers.hidden, 1, 2).reshape(layers, inputs, -1).astype(dtype),
        magnitude=routers.magnitude,
        hidden_bias=routers.hidden_bias,
        output=routers.output,
        output_bias=routers.output_bias,
    )
    return Site(weight=weight, router=router), tables


@partial(jax.jit, static_argnums=0)
def _routers(
    elastic: ElasticConfig, keys: Key[Array, "L n"], sample: Float[Array, "N in"]
) -> tuple[Router, Float[Array, "L n budgets"]]:
    """A router for each key, and its thresholds on a sample of inputs."""
    grid = jnp.asarray(elastic.budget_grid)

    def one(key: Key[Array, ""]) -> tuple[Router, Array]:
        made = Router.create(key, sample.shape[1], elastic.router_hidden_size, len(elastic.slice_bits))
        scores = score(made, sample)
        table = jax.vmap(lambda bits: threshold_for_bits(scores, bits, elastic.slice_bits))(grid)
        return made, jnp.clip(table, -1e9, 1e9)

    return jax.vmap(jax.vmap(one))(keys)
