"""The routers of linears that share their input, all layers stacked: what serving evaluates as one."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class FusedRouter:
    """The routers of S linears that share an input, so that their first layers are one matmul.

    Attributes:
        hidden: first layers, ``[L, in, S * h]``.
        magnitude: weight of the input's log RMS in the first layers.
        hidden_bias: biases of the first layers.
        output: second layers.
        output_bias: biases of the second layers.
    """

    hidden: Float[Array, "L D hiddens"]
    magnitude: Float[Array, "L S h"]
    hidden_bias: Float[Array, "L S h"]
    output: Float[Array, "L S h E-1"]
    output_bias: Float[Array, "L S E-1"]

    def depths(
        self, x: Float[Array, "B T in"], thresholds: Float[Array, "L S B"], layer: Int[Array, ""]
    ) -> Int[Array, "S B T"]:
        """Depth of each token in each linear; the same as ``score`` and ``TableBudget`` linear by linear.

        Args:
            x: the linears' input; the first layers multiply in the dtype of ``hidden``.
            thresholds: of these linears, for each sequence.
            layer: which layer.
        """
        with jax.named_scope("router"):
            stacks = (self.hidden, self.magnitude, self.hidden_bias, self.output, self.output_bias, thresholds)
            hidden, magnitude, hidden_bias, output, output_bias, threshold = (
                jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False) for stack in stacks
            )
            wide = x.astype(jnp.float32)
            rms = jnp.sqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-12)
            product = jnp.einsum(
                "bti,ih->bth", (wide / rms).astype(hidden.dtype), hidden, preferred_element_type=jnp.float32
            )
            units = product.reshape(*x.shape[:2], *magnitude.shape) + jnp.log(rms)[..., None] * magnitude
            units = jax.nn.silu(units + hidden_bias)
            # Too small for a matmul: as a sum, it is one kernel with what surrounds it.
            scores = jnp.sum(units[..., None] * output, axis=-2) + output_bias  # [B, T, S, E-1]
            gates = scores > threshold.T[:, None, :, None]
            return 1 + jnp.moveaxis(jnp.sum(jnp.cumprod(gates, axis=-1, dtype=jnp.int32), axis=-1), -1, 0)
