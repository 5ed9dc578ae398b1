"""What each linear alone adds to the loss at each depth."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mobiquant_jax.analysis.depth_table import TabledLinear
from mobiquant_jax.analysis.divergence import full_depth_log_probabilities, kullback_leibler
from mobiquant_jax.analysis.linears import elastic_config, nest
from mobiquant_jax.models import Block
from mobiquant_jax.models.elastic import ElasticModel, Variables

Increases = Float[np.ndarray, "L N E"]
"""What each linear adds to the loss at each depth, in nats a token."""


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """Measures linears one by one, on a few windows.

    Attributes:
        model: an elastic model.
        tokens: the windows, a batch.
    """

    model: ElasticModel
    tokens: Int[Array, "B T"]

    def around(self, base: int, on_layer: Callable[[int], None] = lambda layer: None) -> Increases:
        """What each linear adds at each depth while all others stay at one depth.

        Args:
            base: the depth of all others, and of the linear where it adds nothing.
            on_layer: called with the number of each layer as it is done.
        """
        depths = len(elastic_config(self.model).slice_bits)
        layers, linears = self.model.config.num_hidden_layers, len(self.model.config.linear_shapes())
        changes = [(linear, depth) for linear in range(linears) for depth in range(1, depths + 1) if depth != base]
        variants = np.full((1 + len(changes), linears), base)  # [V, N], the first one unchanged
        for row, (linear, depth) in zip(variants[1:], changes, strict=True):
            row[linear] = depth
        increases = np.zeros((layers, linears, depths))
        variables = self.model.variables
        target, stream = self._start(variables, self.tokens)
        for layer in range(layers):
            losses, stream = self._layer(variables, target, stream, layer, base, jnp.asarray(variants))
            unchanged, *changed = np.asarray(losses, np.float64)
            for (linear, depth), loss in zip(changes, changed, strict=True):
                increases[layer, linear, depth - 1] = loss - unchanged
            on_layer(layer)
        return increases

    @cached_property
    def _start(self) -> Callable[..., tuple[Array, Array]]:
        """Jitted: the reference predictions, and the stream that enters the first layer."""

        @jax.jit
        def start(variables: Variables, tokens: Array) -> tuple[Array, Any]:
            with jax.default_matmul_precision("float32"):
                target = full_depth_log_probabilities(self.model, variables, tokens)
            return target, self.model.module.apply(variables, tokens, method="embed")

        return start

    @cached_property
    def _layer(self) -> Callable[..., tuple[Array, Array]]:
        """Jitted: the losses of variants of one layer, and the stream that enters the next one.

        What comes before the layer is the same for all variants and not repeated; what comes after it runs on all of
        them as one batch.
        """

        @jax.jit
        def layer(
            variables: Variables, target: Array, stream: Array, index: Array, base: Array, variants: Array
        ) -> tuple[Array, Array]:
            def unchanged(index: Any, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
                return self._block(variables, x, index, jnp.full(variants.shape[1], base))

            def loss(x: Float[Array, "B T D"]) -> Float[Array, ""]:
                logits: Any = self.model.module.apply(variables, x, method="unembed")
                return kullback_leibler(target, logits)

            with jax.default_matmul_precision("float32"):
                tried = jax.lax.map(lambda depths: self._block(variables, stream, index, depths), variants)
                batch = tried.reshape(-1, *stream.shape[1:])  # [V * B, T, D]
                ends = jax.lax.fori_loop(index + 1, self.model.config.num_hidden_layers, unchanged, batch)
                return jax.lax.map(loss, ends.reshape(tried.shape)), tried[0]

        return layer

    def _block(
        self, variables: Variables, x: Float[Array, "B T D"], index: Any, depths: Int[Array, " N"]
    ) -> Float[Array, "B T D"]:
        """One layer at the depths of its linears."""
        linear = partial(TabledLinear, elastic=elastic_config(self.model))
        block = Block(self.model.config, linear=linear, dtype=self.model.dtype)
        layer = {
            name: jax.tree.map(
                lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), variables[name]["layers"]
            )
            for name in ("params", "slices")
        }
        positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
        return block.apply({**layer, "routing": nest(self.model.config, "depth", depths)}, x, positions)[0]
