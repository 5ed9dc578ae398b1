"""Array operations with a reference and faster backends."""

from mobiquant_jax.ops.sliced_matmul.api import Implementation, serving_weight, sliced_matmul
from mobiquant_jax.ops.sliced_matmul.layout import TiledWeight, tile_weight, untile_weight
from mobiquant_jax.ops.sliced_matmul.stacked import StackedWeight, stack_weight

__all__ = [
    "Implementation",
    "StackedWeight",
    "TiledWeight",
    "serving_weight",
    "sliced_matmul",
    "stack_weight",
    "tile_weight",
    "untile_weight",
]
