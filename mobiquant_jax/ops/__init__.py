"""Array operations with a reference and faster backends."""

from mobiquant_jax.ops.sliced_matmul.api import sliced_matmul
from mobiquant_jax.ops.sliced_matmul.layout import TiledWeight, tile_weight, untile_weight

__all__ = ["TiledWeight", "sliced_matmul", "tile_weight", "untile_weight"]
