"""The elastic matmul over tokens sorted by depth: about one dense matmul's work, whatever the mixture.

Sorted tokens form at most E runs. Each run is padded to whole tiles, so that a tile has one depth and needs one matmul;
the padding adds at most E - 1 tiles.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mobiquant_jax.quant import SlicedWeight

TILE = 128  # tokens; large enough for an efficient matmul, small enough that padding stays cheap


def sliced_matmul(x: Float[Array, "N in"], weight: SlicedWeight, depth: Int[Array, " N"]) -> Float[Array, "N out"]:
    """``y[n] = x[n] @ W_{depth[n]}``, accumulated in float32; see ``reference``."""
    tokens, slices = x.shape[0], len(weight.planes)
    tiles = -(-tokens // TILE) + slices - 1
    slot, tile_depth = _tile_slots(depth - 1, slices, tiles)
    padded = jnp.zeros((tiles * TILE, x.shape[1]), x.dtype).at[slot].set(x)

    kernels = [weight.dequantize(k).astype(x.dtype) for k in range(1, slices + 1)]
    branches = [partial(_matmul, kernel=kernel) for kernel in kernels]
    unused = partial(jnp.zeros, (TILE, weight.scale.shape[-1]), jnp.float32)
    outputs = jax.lax.map(
        lambda tile: jax.lax.switch(tile[1], [*branches, lambda _: unused()], tile[0]),
        (padded.reshape(tiles, TILE, -1), tile_depth),
    )
    return outputs.reshape(tiles * TILE, -1)[slot]


def _matmul(rows: Float[Array, "tile in"], kernel: Float[Array, "in out"]) -> Float[Array, "tile out"]:
    return jnp.matmul(rows, kernel, preferred_element_type=jnp.float32)


def _tile_slots(index: Int[Array, " N"], slices: int, tiles: int) -> tuple[Int[Array, " N"], Int[Array, " tiles"]]:
    """Where each token goes in the tiled order, and which depth index each tile has (``slices`` where unused)."""
    counts = jnp.bincount(index, length=slices)
    ends = jnp.cumsum(-(-counts // TILE))  # in tiles
    starts = (ends - -(-counts // TILE)) * TILE
    within = jnp.cumsum(jax.nn.one_hot(index, slices, dtype=jnp.int32), axis=0) - 1  # rank among equals, stable
    slot = starts[index] + jnp.take_along_axis(within, index[:, None], axis=1)[:, 0]
    return slot, jnp.searchsorted(ends, jnp.arange(tiles), side="right", method="compare_all")
