"""Linears that share their input, in the checkpoint's own layout: what the TPU kernel and XLA read."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax

from mobiquant_jax.ops.sliced_matmul.layout import check_fusable
from mobiquant_jax.quant import SlicedWeight


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class StackedWeight:
    """The counterpart of `TiledWeight` for backends that need no repacking: a call multiplies linear by linear.

    Attributes:
        linears: each with a leading layer axis.
    """

    linears: tuple[SlicedWeight, ...]

    @property
    def in_features(self) -> int:
        """Length of the input axis."""
        return self.linears[0].in_features

    @property
    def segments(self) -> tuple[int, ...]:
        """Outputs of each linear."""
        return tuple(weight.scale.shape[-1] for weight in self.linears)

    @property
    def layers(self) -> int:
        """Number of stacked layers."""
        return self.linears[0].scale.shape[0]


def stack_weight(weights: Sequence[SlicedWeight]) -> StackedWeight:
    """Puts linears of one input side by side; nothing is copied.

    Args:
        weights: kernels with a leading layer axis.

    Raises:
        ValueError: shapes or slices that cannot be fused.
    """
    check_fusable(weights)
    return StackedWeight(linears=tuple(weights))
