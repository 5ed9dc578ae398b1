"""The same decoding loop over dense kernels: what the packed model's speed is measured against."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mobiquant_jax.models.layers import project
from mobiquant_jax.serving.packed import Carry, PackedModel
from mobiquant_jax.serving.site import SiteOutput
from mobiquant_jax.serving.source import Source, read_source


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

    def thresholds_at(self, bits: Any) -> None:
        """None: nothing is routed. See `Site`."""

    def __call__(self, source: Source, thresholds: None, layer: int, dtype: DTypeLike) -> SiteOutput:
        """Multiplies. See `Site`."""
        kernel = self.kernels[layer]
        x, residual = read_source(source, jnp.int32(layer), dtype)
        read = jnp.full(x.shape[:2], float(kernel.size * kernel.dtype.itemsize * 8), jnp.float32)
        return SiteOutput(project(x, kernel).astype(dtype)[None], residual, read)


class DenseModel(PackedModel):
    """`PackedModel` whose sites are `DenseSite`, with its layers unrolled."""

    def _over_layers(self, layer: Any, start: Carry) -> Carry:
        for index in range(self.config.num_hidden_layers):
            start = layer(index, start)
        return start
