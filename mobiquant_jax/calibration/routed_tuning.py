"""Tuning weights and routers together, every token at the depths that the routers choose.

Weights that were tuned at uniform widths make up for one another's errors at those widths, not where one token reads
2 bits of a linear and the next one 4; and routers that were fitted to weights know what a slice gains alone, not what
it gains beside what all other linears read. Here both learn from the same loss, at a budget B drawn each step:

    L = log mean_t KL_t + lambda (B_used - B)^2

with gates ``1[S_e > tau(B)]`` that are straight-through, so that the gradient of a score is what its slice would change
of the model's own divergence. Each budget keeps the threshold that the first routers met it at, and the penalty (that
of arXiv 2602.20191, which has it in the blocks' training) keeps the routers there. At the start slices lie in tiers
(`tiers`), so that a budget mixes two neighbouring widths, and they are moved into tiers again at the end.

Slices beyond ``calibration.fine_above`` are not read: they are made once the coarser ones are final.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from mobiquant_jax.calibration.end_to_end import EndToEndTrainer
from mobiquant_jax.calibration.linears import RoutedLinear
from mobiquant_jax.calibration.objective import budget_penalty
from mobiquant_jax.calibration.optimizer import grouped_adamw
from mobiquant_jax.calibration.samples import spread_budgets
from mobiquant_jax.models.elastic import average_bits
from mobiquant_jax.routing import FixedThreshold


@dataclass(frozen=True, kw_only=True)
class RoutedTrainer(EndToEndTrainer):
    """Tunes weights, clipping and routers of all blocks at once.

    Attributes:
        pairs: average bits to train at, none above ``calibration.fine_above``, and tau at each of them.
    """

    STREAM = 4_000_000

    pairs: Float[np.ndarray, "budgets 2"]

    @property
    def linear(self) -> Callable[..., nn.Module]:
        """See `Distiller`."""
        depth = self.calibration.coarse_depth(self.elastic.slice_bits)
        return partial(RoutedLinear, elastic=self.elastic, depth=depth)

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """See `Distiller`."""
        cal = self.calibration
        rates = (cal.routed_weight_lr, cal.routed_clipping_lr, cal.routed_router_lr)
        return optax.chain(optax.clip_by_global_norm(1.0), grouped_adamw(*rates, steps=cal.routed_epochs * self.steps))

    def draw_steps(self, rng: np.random.Generator) -> Float[np.ndarray, "steps 2"]:
        """See `Distiller`: a budget and its threshold."""
        which = spread_budgets(tuple(range(len(self.pairs))), self.steps, rng)
        return self.pairs[which.astype(np.int32)].astype(np.float32)

    def control(self, drawn: Float[Array, " 2"]) -> FixedThreshold:
        """See `Distiller`."""
        return FixedThreshold(threshold=drawn[1], temperature=self.calibration.temperature)

    def penalty(self, stats: Any, drawn: Float[Array, " 2"]) -> Float[Array, ""]:
        """See `Distiller`."""
        used = jnp.mean(average_bits(self.config, stats["layers"]))
        return budget_penalty(used, drawn[0], self.calibration.routed_penalty)
