"""Routing policies: what decides each token's depth, given the router's scores.

A policy is a pytree of traced values that the model passes to every linear, so that changing the average bits, or
swapping the trained router for a baseline at equal bits, touches no module.
"""

from dataclasses import dataclass, field
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from mobiquant_jax.routing.budget import adjacent_mix, lookup, threshold_for_bits
from mobiquant_jax.routing.cutoff import cutoff
from mobiquant_jax.routing.gates import depth_masks, gate, prefix_masks


@dataclass(frozen=True, kw_only=True)
class RoutingInputs:
    """What a linear knows when it asks a policy.

    Attributes:
        x: the linear's input, ``[B, T, in]``.
        scores: router scores, ``[B, T, E-1]``.
        table: thresholds at each average of ``grid``, ``[grid]``; None before they are recorded.
        grid: average bits of the table's entries.
        slice_bits: bits of each slice.
        key: PRNG key of this linear in this call, for random policies.
    """

    x: Float[Array, "B T in"]
    scores: Float[Array, "B T E-1"]
    slice_bits: tuple[int, ...]
    table: Float[Array, " grid"] | None = None
    grid: tuple[float, ...] = ()
    key: Key[Array, ""] | None = None


class Policy(Protocol):
    """Decides how deep each token reads."""

    def masks(self, inputs: RoutingInputs) -> Float[Array, "B T E-1"]:
        """Masks of slices 2..E, prefixes of ones."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TableBudget:
    """The runtime's policy: the router's scores against the recorded threshold for ``bits``.

    Attributes:
        bits: target average bits of each sequence, ``[B]``.
    """

    bits: Float[Array, " B"]

    def masks(self, inputs: RoutingInputs) -> Float[Array, "B T E-1"]:
        """See `Policy`."""
        if inputs.table is None:
            raise ValueError("TableBudget needs recorded thresholds: calibrate the model first")
        threshold = lookup(inputs.table, inputs.grid, self.bits)[:, None, None]
        return prefix_masks((inputs.scores > threshold).astype(jnp.float32))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class BatchBudget:
    """For models whose thresholds are not recorded yet: the batch's own quantile meets the average exactly.

    Attributes:
        bits: target average bits over the batch.
    """

    bits: Float[Array, ""]

    def masks(self, inputs: RoutingInputs) -> Float[Array, "B T E-1"]:
        """See `Policy`."""
        threshold = threshold_for_bits(inputs.scores, self.bits, inputs.slice_bits)
        return prefix_masks((inputs.scores > threshold).astype(jnp.float32))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class FixedThreshold:
    """One threshold for every linear: the paper's training, and global allocation across layers.

    Attributes:
        threshold: tau.
        temperature: of the gates' surrogate gradient.
    """

    threshold: Float[Array, ""]
    temperature: float = field(default=1.0, metadata={"static": True})

    def masks(self, inputs: RoutingInputs) -> Float[Array, "B T E-1"]:
        """See `Policy`."""
        return prefix_masks(gate(inputs.scores, self.threshold, self.temperature))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class UniformDepth:
    """Every token of a sequence at one depth: a fixed-width model.

    Attributes:
        depth: 1..E of each sequence, ``[B]``.
    """

    depth: Int[Array, " B"]

    def masks(self, inputs: RoutingInputs) -> Float[Array, "B T E-1"]:
        """See `Policy`."""
        depth = jnp.broadcast_to(self.depth[:, None], inputs.x.shape[:2])
        return depth_masks(depth, len(inputs.slice_bits))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class RandomDepth:
    """Baseline: tokens draw one of two adjacent depths, on average ``bits``.

    Attributes:
        bits: target average bits of each sequence, ``[B]``.
    """

    bits: Float[Array, " B"]

    def masks(self, inputs: RoutingInputs) -> Float[Array, "B T E-1"]:
        """See `Policy`."""
        if inputs.key is None:
            raise ValueError("RandomDepth needs a PRNG key: pass rngs={'routing': key} to apply")
        depth, share = adjacent_mix(self.bits[:, None], inputs.slice_bits)
        deeper = jax.random.uniform(inputs.key, inputs.x.shape[:2]) < share
        return depth_masks(depth + deeper, len(inputs.slice_bits))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class NormBudget:
    """Baseline: the tokens of largest input norm take the deeper of two adjacent depths; at a tie, none of them.

    Attributes:
        bits: target average bits of each sequence, ``[B]``, met within each sequence.
    """

    bits: Float[Array, " B"]

    def masks(self, inputs: RoutingInputs) -> Float[Array, "B T E-1"]:
        """See `Policy`."""
        depth, share = adjacent_mix(self.bits[:, None], inputs.slice_bits)
        norm = jnp.sum(jnp.square(inputs.x.astype(jnp.float32)), axis=-1)  # [B, T]
        count = jnp.ceil(share[:, 0] * norm.shape[1] - 0.5)  # the nearest number of tokens
        border = jax.vmap(cutoff, in_axes=(0, None, 0))(norm, jnp.ones(norm.shape[1]), count)
        return depth_masks(depth + (norm > border[:, None]), len(inputs.slice_bits))
