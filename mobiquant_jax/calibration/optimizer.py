"""AdamW with a learning rate for each kind of parameter, and steps that a non-finite loss cannot spoil."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from mobiquant_jax.calibration.linears import Params

GROUPS = ("kernel", "clipping", "router")
FINAL_RATE = 0.05  # share of the peak rate that cosine decay ends at


def grouped_adamw(weight_lr: float, clipping_lr: float, router_lr: float, steps: int) -> optax.GradientTransformation:
    """AdamW without weight decay, cosine-decayed; a rate of 0 freezes its group. All other parameters are frozen.

    Args:
        weight_lr: peak rate of the kernels.
        clipping_lr: of the clipping logits.
        router_lr: of the routers.
        steps: length of the decay.
    """

    def adamw(rate: float) -> optax.GradientTransformation:
        if rate == 0:
            return optax.set_to_zero()
        return optax.adamw(optax.cosine_decay_schedule(rate, max(steps, 1), alpha=FINAL_RATE), weight_decay=0.0)

    rates = dict(zip(GROUPS, (weight_lr, clipping_lr, router_lr), strict=True))
    groups = {name: adamw(rate) for name, rate in rates.items()} | {"other": optax.set_to_zero()}
    return optax.partition(groups, _labels)


def guarded_update(
    optimizer: optax.GradientTransformation, loss: Float[Array, ""], grads: Params, params: Params, state: Any
) -> tuple[Params, Any, Bool[Array, ""]]:
    """One optimizer step, or none where the loss or the gradient's norm is not finite.

    The norm also catches a gradient whose square overflows: its second moment would never recover.

    Returns:
        The parameters, the optimizer's state, and whether the step was taken.
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(grads))
    updates, new_state = optimizer.update(grads, state, params)
    new = (optax.apply_updates(params, updates), new_state)
    params, state = jax.tree.map(partial(jnp.where, finite), new, (params, state))
    return params, state, finite


def _labels(params: Params) -> Any:
    """The group of each leaf: the name below its linear. The head has a kernel too, which is not sliced."""

    def label(path: tuple[Any, ...], _: Array) -> str:
        names = [getattr(entry, "key", None) for entry in path]
        if "lm_head" in names:
            return "other"
        return next((name for name in GROUPS if name in names), "other")

    return jax.tree_util.tree_map_with_path(label, params)
