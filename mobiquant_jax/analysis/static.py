"""The best static depth of every linear at an average of bits: what a router that ignores tokens could reach.

The loss of an allocation is taken to be the sum of what each linear alone adds, measured one by one at each depth:

    loss(k_1, ..., k_n) ~ sum_l increase_l(k_l)         sum_l size_l bits(k_l) <= B sum_l size_l

which a knapsack minimizes exactly. What a linear adds depends on the depths of all others, so it is measured around two
bases; the allocations of each, of both together, and a uniform depth are tried, and the best one is kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain, combinations
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mobiquant_jax.analysis.depth_table import TabledLinear, forward_at
from mobiquant_jax.analysis.knapsack import knapsack
from mobiquant_jax.analysis.linears import elastic_config, linear_sizes, nest
from mobiquant_jax.models import Block
from mobiquant_jax.models.elastic import ElasticModel, Variables
from mobiquant_jax.quant import widths

Increases = Float[np.ndarray, "L N E"]
"""What each linear adds to the loss at each depth, in nats a token."""


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """A static allocation.

    Attributes:
        table: depth of each linear.
        divergence: its loss on the search's windows, in nats a token.
        increases: what it was found with.
    """

    table: Int[np.ndarray, "L N"]
    divergence: float
    increases: Increases


@dataclass(frozen=True, kw_only=True)
class StaticSearch:
    """Finds static allocations of a model on a few windows.

    The loss is the Kullback-Leibler divergence from the model at full depth: the increase of the loss on the full
    model's own predictions, never negative and of far less noise than the loss on as little text.

    Attributes:
        model: an elastic model.
        tokens: calibration windows.
    """

    model: ElasticModel
    tokens: Int[Array, "B T"]

    def increases(self, base: int, on_layer: Callable[[int], None] = lambda layer: None) -> Increases:
        """Measures what each linear adds at each depth while all others stay at one depth.

        Args:
            base: the depth of all others.
            on_layer: called with the number of each layer as it is done.
        """
        depths = len(elastic_config(self.model).slice_bits)
        layers, linears = self.model.config.num_hidden_layers, len(self.model.config.linear_shapes())
        changes = [(linear, depth) for linear in range(linears) for depth in range(1, depths + 1) if depth != base]
        tables = np.full((len(changes), linears), base)  # [V, N]
        for row, (linear, depth) in zip(tables, changes, strict=True):
            row[linear] = depth
        increases = np.zeros((layers, linears, depths))
        before = self.divergence(np.full((layers, linears), base))
        stream = self._embed(self.model.variables, self.tokens)
        for layer in range(layers):
            losses, stream = self._layer(self.model.variables, self._target, stream, layer, base, jnp.asarray(tables))
            for (linear, depth), loss in zip(changes, np.asarray(losses), strict=True):
                increases[layer, linear, depth - 1] = loss - before
            on_layer(layer)
        return increases

    def allocate(self, measured: Sequence[Increases], bits: float) -> Allocation:
        """The best allocation within an average of bits, among those of any sum of what was measured and uniform depth.

        Args:
            measured: increases around several bases.
            bits: the budget.
        """
        config, bits_at = self.model.config, widths(elastic_config(self.model).slice_bits)
        sizes = np.tile(linear_sizes(config), config.num_hidden_layers)
        found = []
        for some in chain.from_iterable(combinations(measured, n + 1) for n in range(len(measured))):
            total = np.sum(some, axis=0)  # [L, N, E]
            table = knapsack(total.reshape(len(sizes), -1), sizes, bits_at, bits).reshape(total.shape[:-1])
            found.append(Allocation(table=table, divergence=self.divergence(table), increases=total))
        best = min(found, key=lambda allocation: allocation.divergence)
        # Where a uniform depth fits, the sum's neglect of what linears do together may cost more than it finds.
        uniform = np.full_like(best.table, np.searchsorted(bits_at, bits, side="right"))
        divergence = self.divergence(uniform)
        return best if best.divergence < divergence else replace(best, table=uniform, divergence=divergence)

    def divergence(self, table: Int[np.ndarray, "L N"]) -> float:
        """The loss of an allocation, in nats a token."""
        return float(self._divergence(self.model.variables, self._target, self.tokens, jnp.asarray(table)))

    @cached_property
    def _target(self) -> Float[Array, "B T V"]:
        """Log-probabilities of the model at full depth."""
        shape = (self.model.config.num_hidden_layers, len(self.model.config.linear_shapes()))
        table = jnp.full(shape, len(elastic_config(self.model).slice_bits))

        @jax.jit
        def log_probabilities(variables: Variables, tokens: Array) -> Array:
            with jax.default_matmul_precision("float32"):
                return jax.nn.log_softmax(forward_at(self.model, variables, tokens, table))

        return log_probabilities(self.model.variables, self.tokens)

    @cached_property
    def _divergence(self) -> Callable[..., Array]:
        @jax.jit
        def divergence(variables: Variables, target: Array, tokens: Array, table: Array) -> Array:
            with jax.default_matmul_precision("float32"):
                return _kullback_leibler(target, forward_at(self.model, variables, tokens, table))

        return divergence

    @cached_property
    def _embed(self) -> Callable[..., Array]:
        return jax.jit(partial(self.model.module.apply, method="embed"))

    @cached_property
    def _layer(self) -> Callable[..., tuple[Array, Array]]:
        """Jitted: the losses of variants of one layer, and the stream that enters the next one.

        What comes before the layer is the same for all variants and not repeated; what comes after it runs on all of
        them as one batch.
        """

        @jax.jit
        def layer(
            variables: Variables, target: Array, stream: Array, index: Array, base: Array, tables: Array
        ) -> tuple[Array, Array]:
            def unchanged(index: Any, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
                return self._block(variables, x, index, jnp.full(tables.shape[1], base))

            def loss(x: Float[Array, "B T D"]) -> Float[Array, ""]:
                logits: Any = self.model.module.apply(variables, x, method="unembed")
                return _kullback_leibler(target, logits)

            with jax.default_matmul_precision("float32"):
                tried = jax.lax.map(lambda depths: self._block(variables, stream, index, depths), tables)
                ends = jax.lax.fori_loop(
                    index + 1,
                    self.model.config.num_hidden_layers,
                    unchanged,
                    tried.reshape(-1, *stream.shape[1:]),
                )
                return jax.lax.map(loss, ends.reshape(tried.shape)), unchanged(index, stream)

        return layer

    def _block(
        self, variables: Variables, x: Float[Array, "B T D"], index: Any, depths: Int[Array, " N"]
    ) -> Float[Array, "B T D"]:
        """One layer at the depths of its linears."""
        block = Block(
            self.model.config,
            linear=partial(TabledLinear, elastic=elastic_config(self.model)),
            dtype=self.model.dtype,
        )
        layer = {
            name: jax.tree.map(
                lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), variables[name]["layers"]
            )
            for name in ("params", "slices")
        }
        positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
        return block.apply({**layer, "routing": nest(self.model.config, "depth", depths)}, x, positions)[0]


def base_depths(slices: int) -> list[int]:
    """The uniform depths around which increases are measured: all slices, and two, between what low budgets mix.

    Around one slice a model may be broken beyond what one linear can mend: an allocation of SmolLM2-135M at 2.5 bits
    found there had a perplexity of 597, one found around two slices 95.
    """
    return [slices, max(1, min(2, slices - 1))]


def _kullback_leibler(log_p: Float[Array, "B T V"], logits: Float[Array, "B T V"]) -> Float[Array, ""]:
    """Divergence of the logits' distribution from a reference, in nats a token."""
    return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - jax.nn.log_softmax(logits)), axis=-1))
