"""The compiled passes over one batch of windows; what they return stays on the device."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mobiquant_jax.analysis.depth_table import forward_at, table_bits
from mobiquant_jax.analysis.linears import elastic_config, linear_shares, stack_sown
from mobiquant_jax.analysis.probe import Probe, probe
from mobiquant_jax.evaluation import summed_nll
from mobiquant_jax.models.elastic import ElasticModel, Variables
from mobiquant_jax.routing import Policy, UniformDepth


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Score:
    """A pass over a batch.

    Attributes:
        nll: summed negative log-likelihood of its predictions, in nats.
        bits: average bits that it used.
    """

    nll: Float[Array, ""]
    bits: Float[Array, ""]


@dataclass(frozen=True, kw_only=True, eq=False)
class Steps:
    """The passes of an analysis, each compiled once for a kind of policy or table.

    Attributes:
        model: an elastic model.
    """

    model: ElasticModel

    @cached_property
    def routed(self) -> Callable[..., tuple[Score, Float[Array, "L N B T"]]]:
        """Jitted ``(variables, tokens, policy, key) -> (score, bits of each token in each linear)``."""

        def step(variables: Variables, tokens: Int[Array, "B T"], policy: Policy, key: Array) -> Any:
            with jax.default_matmul_precision("float32"):
                logits, state = self.model.module.apply(
                    variables, tokens, policy, mutable=["stats"], rngs={"routing": key}
                )
            bits = stack_sown(self.model.config, state["stats"], "bits")
            shares = jnp.asarray(linear_shares(self.model.config), jnp.float32)
            return Score(nll=jnp.sum(summed_nll(logits, tokens)), bits=jnp.mean(bits, axis=(0, 2, 3)) @ shares), bits

        return jax.jit(step)

    @cached_property
    def tabled(self) -> Callable[..., Score]:
        """Jitted ``(variables, tokens, table [L, N, *tokens]) -> score``."""

        def step(variables: Variables, tokens: Int[Array, "B T"], table: Int[Array, "L N *tokens"]) -> Score:
            with jax.default_matmul_precision("float32"):
                logits = forward_at(self.model, variables, tokens, table)
            return Score(nll=jnp.sum(summed_nll(logits, tokens)), bits=table_bits(self.model, table))

        return jax.jit(step)

    @cached_property
    def probed(self) -> Callable[..., tuple[Score, Probe]]:
        """Jitted ``(variables, tokens) -> (score, measurements)`` of the model at full depth."""
        slices = len(elastic_config(self.model).slice_bits)

        def step(variables: Variables, tokens: Int[Array, "B T"]) -> tuple[Score, Probe]:
            with jax.default_matmul_precision("float32"):
                full = UniformDepth(depth=jnp.full(tokens.shape[0], slices))
                logits, measured = probe(self.model, variables, tokens, full)
            return Score(nll=jnp.sum(summed_nll(logits, tokens)), bits=jnp.mean(measured.bits)), measured

        return jax.jit(step)
