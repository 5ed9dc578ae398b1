"""Tuning a slice alone, at the depths that the routers choose, and its routers with it.

As in `slice_tuning` all coarser bits are final, and as in `routed_tuning` gates are straight-through. Budgets are those
that mix the width that is final with the one that the slice completes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mobiquant_jax.calibration.linears import Params, multiply_slices, route
from mobiquant_jax.calibration.optimizer import FINAL_RATE
from mobiquant_jax.calibration.routed_tuning import RoutedDistiller
from mobiquant_jax.calibration.slice_tuning import SliceTuner, grid_parameters, linears_of
from mobiquant_jax.models.elastic import ElasticConfig
from mobiquant_jax.quant import read_position, widths
from mobiquant_jax.routing import Policy


class RoutedPositionLinear(nn.Module):
    """A linear whose weights are positions on a fixed grid, each token at its own depth, gates straight-through.

    Attributes:
        features: number of outputs.
        elastic: slicing and routing.
        depth: the most slices that a token reads.
        final_width: reads of up to so many bits have no gradient.
        dtype: type of the multiplication and of the result.
    """

    features: int
    elastic: ElasticConfig
    depth: int
    final_width: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B T in"], control: Policy) -> Float[Array, "B T out"]:
        """Routes and multiplies; sows the bits of each token into ``stats``."""
        position, scale, zero = grid_parameters(self, x.shape[-1])
        slice_bits = self.elastic.slice_bits[: self.depth]
        masks = route(self, x, control, slice_bits)
        final = [width for width in widths(slice_bits) if width <= self.final_width]
        fixed = jax.lax.stop_gradient(position)
        reads = [
            read_position(fixed if width in final else position, scale, zero, width) for width in widths(slice_bits)
        ]
        return multiply_slices(x, masks, jnp.stack(reads), self.dtype)


@dataclass(frozen=True, kw_only=True)
class RoutedSliceTuner(RoutedDistiller, SliceTuner):
    """Tunes the bits of every code below those that are final, and the routers."""

    STREAM = 5_000_000

    @property
    def linear(self) -> Callable[..., nn.Module]:
        """See `Distiller`."""
        depth = self.calibration.coarse_depth(self.elastic.slice_bits)
        return partial(RoutedPositionLinear, elastic=self.elastic, depth=depth, final_width=self.final_width)

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """See `Distiller`."""
        steps = max(self.epochs * self.steps, 1)
        rates = {"position": self.rate, "router": self.calibration.routed_router_lr}
        adams = {
            name: optax.adam(optax.cosine_decay_schedule(rate, steps, alpha=FINAL_RATE)) for name, rate in rates.items()
        }
        groups = optax.partition(adams | {"other": optax.set_to_zero()}, _labels)
        return optax.chain(optax.clip_by_global_norm(1.0), groups)

    def _positions(self, layers: Params, weights: Params) -> Params:
        params = super()._positions(layers, weights)
        for part, name in linears_of(params):
            params[part][name] |= {"router": layers["params"][part][name]["router"]}
        return params

    def pack(self, layers: Params, tuned: Params) -> Params:
        """The packed blocks with what was tuned."""
        params = {part: dict(leaves) for part, leaves in layers["params"].items()}
        for part, name in linears_of(tuned):
            params[part][name] = {"router": tuned[part][name]["router"]}
        return super().pack(layers, tuned) | {"params": params}


def _labels(params: Params) -> Any:
    def label(path: tuple[Any, ...], _: Array) -> str:
        names = [getattr(entry, "key", None) for entry in path]
        return next((name for name in ("position", "router") if name in names), "other")

    return jax.tree_util.tree_map_with_path(label, params)
