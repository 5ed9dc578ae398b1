"""Array operations with a reference and faster backends."""

from mobiquant_jax.ops.sliced_matmul.api import sliced_matmul

__all__ = ["sliced_matmul"]
