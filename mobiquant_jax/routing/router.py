"""The router: a small MLP that scores slices 2..E for each token, from the linear's own input."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

# At the start slice 2 of every token outranks slice 3 of any: tokens mix two adjacent depths, as an untrained
# mixture should, until training finds tokens worth more.
INITIAL_SCORE_GAP = 4.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Router:
    """Parameters of one linear's router.

    Attributes:
        hidden: first layer, ``[in, h]``.
        magnitude: weight of the input's log RMS in the first layer, ``[h]``.
        hidden_bias: ``[h]``.
        output: second layer, ``[h, E-1]``.
        output_bias: ``[E-1]``.
    """

    hidden: Float[Array, "in h"]
    magnitude: Float[Array, " h"]
    hidden_bias: Float[Array, " h"]
    output: Float[Array, "h E-1"]
    output_bias: Float[Array, " E-1"]

    @classmethod
    def create(cls, key: Key[Array, ""], in_features: int, hidden_size: int, slices: int) -> "Router":
        """A random router whose scores rank earlier slices above later ones.

        Args:
            key: PRNG key.
            in_features: inputs of the linear.
            hidden_size: width of the MLP.
            slices: E; the router scores the E - 1 optional ones.
        """
        hidden_key, output_key = jax.random.split(key)
        ranks = jnp.arange(slices - 1, dtype=jnp.float32)
        return cls(
            hidden=jax.random.normal(hidden_key, (in_features, hidden_size)) / in_features**0.5,
            magnitude=jnp.zeros(hidden_size),
            hidden_bias=jnp.zeros(hidden_size),
            output=jax.random.normal(output_key, (hidden_size, slices - 1)) / hidden_size**0.5,
            output_bias=INITIAL_SCORE_GAP * (ranks.mean() - ranks),
        )


def score(router: Router, x: Float[Array, "*batch in"]) -> Float[Array, "*batch E-1"]:
    """Scores of slices 2..E: ``Dense(silu(Dense([x / rms(x), log rms(x)])))``.

    The input's direction and magnitude enter apart, since an attention sink's magnitude is a hundred times the median's
    and would drown everything else.

    Args:
        router: parameters.
        x: the linear's input.

    Returns:
        Float32 scores; a higher score keeps the slice.
    """
    with jax.named_scope("router"):
        x = x.astype(jnp.float32)
        rms = jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-12)
        hidden = jnp.einsum("...i,ih->...h", x / rms, router.hidden) + jnp.log(rms) * router.magnitude
        hidden = jax.nn.silu(hidden + router.hidden_bias)
        return jnp.einsum("...h,he->...e", hidden, router.output) + router.output_bias
