"""End-to-end tuning: all blocks together against the unquantized model's own predictions.

Block-wise training matches activations; what counts is the distribution over the next token. With teacher p (the
unquantized model) and student q (the same weights through the nested quantizer, at a budget drawn each step):

    L = mean_t sum_v p_tv (log p_tv - log q_tv)
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mobiquant_jax.calibration.config import CalibrationConfig
from mobiquant_jax.calibration.linears import Params, RoutedLinear
from mobiquant_jax.calibration.optimizer import grouped_adamw, guarded_update
from mobiquant_jax.models import Llama, LlamaConfig
from mobiquant_jax.models.elastic import ElasticConfig
from mobiquant_jax.routing import BatchBudget


def distillation_loss(student: Float[Array, "B T V"], teacher: Float[Array, "B T V"]) -> Float[Array, ""]:
    """Kullback-Leibler divergence of the student's distribution from the teacher's, in nats a token."""
    log_p, log_q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
    return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))


@dataclass(frozen=True, kw_only=True)
class EndToEndTrainer:
    """Tunes weights, clipping and routers of all blocks at once.

    Attributes:
        config: architecture.
        elastic: slicing and routing.
        calibration: the recipe.
        windows: calibration tokens, ``[W, T]``.
        dtype: type of the student's and teacher's matmuls.
    """

    config: LlamaConfig
    elastic: ElasticConfig
    calibration: CalibrationConfig
    windows: Int[np.ndarray, "W T"]
    dtype: DTypeLike = jnp.float32

    def init(self, params: Params) -> Any:
        """The optimizer's state for trainable parameters (blocks stacked under ``layers``)."""
        return self._optimizer.init(params)

    def epoch(self, params: Params, state: Any, dense: Params, index: int) -> tuple[Params, Any, float, bool]:
        """One pass over the windows, each at a budget of its own.

        Args:
            params: trainable parameters; donated.
            state: the optimizer's; donated.
            dense: the unquantized model's parameters.
            index: number of the epoch; with the seed it determines order and budgets.

        Returns:
            The new parameters and state, the epoch's mean divergence, and whether every step was finite.
        """
        rng = np.random.default_rng([self.calibration.seed, 1_000_000 + index])
        steps = len(self.windows) // self.calibration.end_batch_size
        order = rng.permutation(len(self.windows))[: steps * self.calibration.end_batch_size]
        budgets = np.resize(np.asarray(self.calibration.budgets, np.float32), steps)
        plan = (self.windows[order].reshape(steps, self.calibration.end_batch_size, -1), rng.permutation(budgets))
        params, state, losses, healthy = self._epoch_fn(params, state, dense, plan)
        return params, state, float(jnp.mean(losses)), bool(healthy)

    @property
    def _steps(self) -> int:
        return self.calibration.end_epochs * (len(self.windows) // self.calibration.end_batch_size)

    @cached_property
    def _optimizer(self) -> optax.GradientTransformation:
        cal = self.calibration
        return optax.chain(
            optax.clip_by_global_norm(1.0),
            grouped_adamw(cal.end_weight_lr, cal.end_clipping_lr, cal.end_router_lr, self._steps),
        )

    @cached_property
    def _epoch_fn(self) -> Callable[..., Any]:
        linear = partial(RoutedLinear, elastic=self.elastic)
        student = Llama(self.config, linear=linear, dtype=self.dtype, remat=True)
        teacher = Llama(self.config, dtype=self.dtype)
        optimizer, cal = self._optimizer, self.calibration

        def loss_fn(params: Params, target: Array, tokens: Array, bits: Array) -> tuple[Array, Array]:
            policy = BatchBudget(bits=bits, temperature=cal.temperature)
            logits = student.apply({"params": params}, tokens, policy)
            assert isinstance(logits, jax.Array), "no collection is mutable"
            divergence = distillation_loss(logits, target)
            return jnp.log(divergence + 1e-6) if cal.end_log_loss else divergence, divergence

        def step(carry: Any, inputs: Any, dense: Params) -> Any:
            params, state, healthy = carry
            tokens, bits = inputs
            target = teacher.apply({"params": dense}, tokens)
            (loss, divergence), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, target, tokens, bits)
            params, state, finite = guarded_update(optimizer, loss, grads, params, state)
            return (params, state, healthy & finite), divergence

        def epoch(params: Params, state: Any, dense: Params, plan: Any) -> Any:
            carry = (params, state, jnp.array(True))
            (params, state, healthy), losses = jax.lax.scan(partial(step, dense=dense), carry, plan)
            return params, state, losses, healthy

        return jax.jit(epoch, donate_argnums=(0, 1))
