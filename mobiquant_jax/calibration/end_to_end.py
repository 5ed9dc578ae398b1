"""End-to-end tuning: weights and clipping of all blocks, at every width or, where finer slices follow, the coarse ones.

All tokens of a step read one width. See `distillation` for the loss, `routed_tuning` and `slice_tuning` for what may
follow.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import flax.linen as nn
import jax
import numpy as np
import optax
from jaxtyping import Int

from mobiquant_jax.calibration import shapes
from mobiquant_jax.calibration.distillation import Distiller
from mobiquant_jax.calibration.linears import NestedLinear, Params
from mobiquant_jax.calibration.optimizer import grouped_adamw
from mobiquant_jax.calibration.samples import draw_widths, spread_budgets


@dataclass(frozen=True, kw_only=True)
class EndToEndTrainer(Distiller):
    """Tunes weights and clipping of all blocks at once; its parameters are those that blocks are trained with."""

    STREAM = 1_000_000

    @property
    def linear(self) -> Callable[..., nn.Module]:
        """See `Distiller`."""
        return partial(NestedLinear, elastic=self.elastic)

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """See `Distiller`."""
        cal = self.calibration
        adamw = grouped_adamw(cal.end_weight_lr, cal.end_clipping_lr, 0.0, cal.end_epochs * self.steps)
        return optax.chain(optax.clip_by_global_norm(1.0), adamw)

    @cached_property
    def abstract_params(self) -> Params:
        """See `Distiller`."""
        return shapes.trained_layers(self.config, self.elastic)

    def draw_steps(self, rng: np.random.Generator) -> Int[np.ndarray, " steps"]:
        """See `Distiller`: at the budgets that no later stage trains."""
        budgets = spread_budgets(self.calibration.tuned_budgets, self.steps, rng)
        return draw_widths(budgets, self.elastic.slice_bits, rng)

    @cached_property
    def pack(self) -> Callable[[Params], Params]:
        """Jitted: stacked trainable parameters to the elastic blocks' variables."""
        packed = self.placement.shardings(shapes.packed_layers(self.config, self.elastic))
        return jax.jit(shapes.stacked_packing(self.config, self.elastic), out_shardings=packed)
