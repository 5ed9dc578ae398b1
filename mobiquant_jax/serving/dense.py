"""The same decoding loop over dense kernels: what the packed model's speed is measured against."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mobiquant_jax.models.layers import project
from mobiquant_jax.serving.packed import Carry, PackedModel


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class DenseSite:
    """Fused dense kernels; the interface of `Site`.

    Attributes:
        kernels: ``[in, out]`` of each layer, apart: XLA would copy a slice of a stack.
        segments: outputs of each fused linear.
    """

    kernels: tuple[Float[Array, "D out"], ...]
    segments: tuple[int, ...] = field(metadata={"static": True})

    def __call__(
        self, x: Float[Array, "B T D"], thresholds: Any, layer: int, dtype: DTypeLike
    ) -> tuple[list[Float[Array, "B T out"]], Float[Array, "B T"]]:
        """Multiplies; nothing is routed, so thresholds are not read. See `Site`."""
        kernel = self.kernels[layer]
        ends = [sum(self.segments[: i + 1]) for i in range(len(self.segments) - 1)]
        read = jnp.full(x.shape[:2], float(kernel.size * kernel.dtype.itemsize * 8), jnp.float32)
        return jnp.split(project(x.astype(dtype), kernel).astype(dtype), ends, axis=-1), read


class DenseModel(PackedModel):
    """`PackedModel` whose sites are `DenseSite`, with its layers unrolled."""

    def _repeat(self, layer: Any, start: Carry) -> Carry:
        for index in range(self.config.num_hidden_layers):
            start = layer(index, start)
        return start
