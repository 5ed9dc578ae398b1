"""Any depth for any token of any linear: a table in place of the routers.

Static allocations, the oracle and the retention of single tokens are all tables of depths, applied by one forward pass.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mobiquant_jax.analysis.linears import elastic_config, linear_shares, nest
from mobiquant_jax.models import Llama
from mobiquant_jax.models.elastic import ElasticConfig, ElasticModel, Variables
from mobiquant_jax.models.layers import project
from mobiquant_jax.ops import sliced_matmul
from mobiquant_jax.quant import SlicedWeight, widths


class TabledLinear(nn.Module):
    """A linear over a `SlicedWeight` whose depths are the variable ``routing/depth``: ``[B, T]``, or one for all.

    Attributes:
        features: number of outputs.
        elastic: slicing.
        dtype: type of the multiplication and of the result.
    """

    features: int
    elastic: ElasticConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B T in"], control: None = None) -> Float[Array, "B T out"]:
        """``y[t] = x[t] @ W_{depth[t]}``."""
        weight: SlicedWeight = self.get_variable("slices", "weight")
        depth: Int[Array, "*tokens"] = self.get_variable("routing", "depth")
        if depth.ndim:
            return sliced_matmul(x.astype(self.dtype), weight, depth).astype(self.dtype)
        # One read: those of all depths would cost as much as the matmul of a short window.
        reads = [partial(weight.dequantize, k) for k in range(1, len(self.elastic.slice_bits) + 1)]
        return project(x.astype(self.dtype), jax.lax.switch(depth - 1, reads), self.dtype)


def forward_at(
    model: ElasticModel, variables: Variables, tokens: Int[Array, "B T"], table: Int[Array, "L N *tokens"]
) -> Float[Array, "B T V"]:
    """Logits with the depths of a table. Pure.

    Args:
        model: an elastic model.
        variables: its arrays; its routers and thresholds are not read.
        tokens: token ids.
        table: depth, 1..E, of each layer's linears: one for all tokens, ``[L, N]``, or one a token, ``[L, N, B, T]``.
    """
    module = Llama(model.config, linear=partial(TabledLinear, elastic=elastic_config(model)), dtype=model.dtype)
    routing = {"layers": nest(model.config, "depth", jnp.moveaxis(table, 1, 0))}
    logits = module.apply({**variables, "routing": routing}, tokens)
    assert isinstance(logits, jax.Array), "no collection is mutable"
    return logits


def table_bits(model: ElasticModel, table: Int[Array, "L N *tokens"]) -> Float[Array, ""]:
    """Average bits of a table, weighted by parameters."""
    bits = jnp.asarray(widths(elastic_config(model).slice_bits), jnp.float32)[table - 1]
    return bits.reshape(*table.shape[:2], -1).mean(axis=(0, 2)) @ jnp.asarray(linear_shares(model.config), jnp.float32)
