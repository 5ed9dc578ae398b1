"""The loss of static depths: how far the model's predictions are from those at full depth.

It is the increase of the loss on the full model's own predictions: never negative, and of far less noise than the loss
on as little text.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mobiquant_jax.analysis.depth_table import forward_at
from mobiquant_jax.analysis.linears import elastic_config
from mobiquant_jax.models.elastic import ElasticModel, Variables


def kullback_leibler(log_p: Float[Array, "B T V"], logits: Float[Array, "B T V"]) -> Float[Array, ""]:
    """Divergence of the logits' distribution from a reference, in nats a token."""
    return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - jax.nn.log_softmax(logits)), axis=-1))


def full_depth_log_probabilities(
    model: ElasticModel, variables: Variables, tokens: Int[Array, "B T"]
) -> Float[Array, "B T V"]:
    """Log-probabilities of the model at full depth. Pure."""
    shape = (model.config.num_hidden_layers, len(model.config.linear_shapes()))
    full = jnp.full(shape, len(elastic_config(model).slice_bits))
    return jax.nn.log_softmax(forward_at(model, variables, tokens, full))


def divergence_step(model: ElasticModel) -> Callable[..., Float[Array, " tables"]]:
    """Builds the jitted ``(variables, tokens [B, T], tables [tables, L, N]) -> divergence of each table``."""

    @jax.jit
    def step(variables: Variables, tokens: Array, tables: Array) -> Array:
        with jax.default_matmul_precision("float32"):
            log_p = full_depth_log_probabilities(model, variables, tokens)
            return jax.lax.map(
                lambda table: kullback_leibler(log_p, forward_at(model, variables, tokens, table)), tables
            )

    return step
