"""Round-to-nearest: the plain minimum and maximum of each group, no data."""

from dataclasses import dataclass

import jax
from jaxtyping import Array, Float

from mobiquant_jax.baselines.grid import fake_quantize
from mobiquant_jax.baselines.kernels import Params, map_kernels
from mobiquant_jax.baselines.spec import QuantSpec
from mobiquant_jax.quant import unclipped_limits


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class RTNConfig:
    """Round-to-nearest has nothing to set."""

    @classmethod
    def recipe(cls, bits: int) -> "RTNConfig":
        """The published settings at a width."""
        return cls()


def round_to_nearest(weight: Float[Array, "in out"], group_size: int, bits: int) -> Float[Array, "in out"]:
    """The weight on the n-bit grid between each group's minimum and maximum."""
    return fake_quantize(weight, *unclipped_limits(weight, group_size), bits)


def quantize_layers(spec: QuantSpec, layers: Params) -> Params:
    """Rounds all blocks at once.

    Args:
        spec: width and group size.
        layers: the dense blocks' parameters, each leaf with a leading layer axis.
    """

    def every_layer(kernels: Float[Array, "L inputs outputs"]) -> Float[Array, "L inputs outputs"]:
        return jax.lax.map(lambda kernel: round_to_nearest(kernel, spec.group_size, spec.bits), kernels)

    return map_kernels(jax.jit(every_layer), layers, spec.config)
