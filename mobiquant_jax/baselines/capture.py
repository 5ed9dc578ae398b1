"""Second moments of what enters each linear of a block, summed over all calibration tokens."""

from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mobiquant_jax.baselines.kernels import Params
from mobiquant_jax.baselines.settings import check_number
from mobiquant_jax.baselines.spec import in_batches, positions
from mobiquant_jax.models import Block, LlamaConfig
from mobiquant_jax.models.layers import project

INPUT_GROUPS = (
    ("attention/q_proj", "attention/k_proj", "attention/v_proj"),
    ("attention/o_proj",),
    ("mlp/gate_proj", "mlp/up_proj"),
    ("mlp/down_proj",),
)
"""Linears that read the same input, in the order of execution."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TokenWeighting:
    """How much each token counts in the statistics of a linear's inputs.

        weight_t = first^[t = 0] (|x_t|^2 / in)^-exponent

    A trained model parks attention on its first token, whose activations grow by orders of magnitude. Two things go
    wrong without weights: where that token is large it drowns all others (mend it with ``exponent``), and where every
    token is of one size it counts once, though all later tokens read its keys and values (mend it with ``first``).

    Attributes:
        exponent: 0 counts squared errors as they are, 1 counts them relative to the token's own energy.
        first: how often the token at position 0 counts.
    """

    exponent: float = 0.0
    first: float = 1.0

    def __post_init__(self) -> None:
        """Checks both fields."""
        check_number("energy_exponent", self.exponent, least=0)
        check_number("first_token", self.first, least=0)

    def __call__(self, x: Float[Array, "B T in"]) -> Float[Array, "B T"]:
        """The weight of each token."""
        energy = jnp.mean(jnp.square(x), axis=-1) + 1e-12
        return energy**-self.exponent * jnp.where(jnp.arange(x.shape[1]) == 0, self.first, 1.0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Moments:
    """Weighted mean moments of one input.

    Attributes:
        gram: ``mean_t w_t x_t x_t^T``.
        magnitude: ``mean_t w_t^(1/2) |x_t|``, the size of each channel.
    """

    gram: Float[Array, "in in"]
    magnitude: Float[Array, " in"]


class MomentsLinear(nn.Module):
    """A dense linear that sows the moments of its inputs into the collection ``moments``.

    Attributes:
        features: number of outputs.
        weighting: of the tokens.
        dtype: type of the multiplication and of the result.
    """

    features: int
    weighting: TokenWeighting
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B T in"], control: None = None) -> Float[Array, "B T out"]:
        """``x @ kernel``."""
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features), jnp.float32)
        self.sow("moments", "inputs", moments(x.astype(jnp.float32), self.weighting))
        return project(x.astype(self.dtype), kernel, self.dtype)


def moments(x: Float[Array, "B T in"], weighting: TokenWeighting) -> Moments:
    """The moments of a batch of windows."""
    root = jnp.sqrt(weighting(x))[..., None] * x
    gram = jnp.einsum("bti,btj->ij", root, root, precision="highest")
    tokens = x.shape[0] * x.shape[1]
    return Moments(gram=gram / tokens, magnitude=jnp.mean(jnp.abs(root), axis=(0, 1)))


def capture(
    config: LlamaConfig,
    block: Params,
    stream: Float[Array, "N T D"],
    paths: tuple[str, ...],
    weighting: TokenWeighting,
) -> dict[str, Moments]:
    """The moments of the inputs of some linears; traceable.

    Args:
        config: architecture.
        block: the block's dense parameters.
        stream: what enters the block.
        paths: which linears; the others cost nothing.
        weighting: of the tokens.
    """
    module = Block(config, linear=partial(MomentsLinear, weighting=weighting))
    batches = in_batches(stream)

    def batch(x: Float[Array, "B T D"]) -> dict[str, Moments]:
        _, state = module.apply({"params": block}, x, positions(x), mutable=["moments"])
        split = (path.split("/") for path in paths)
        return {f"{part}/{name}": state["moments"][part][name]["inputs"][0] for part, name in split}

    def add(total: dict[str, Moments], x: Float[Array, "B T D"]) -> tuple[dict[str, Moments], None]:
        return jax.tree.map(jnp.add, total, batch(x)), None

    with jax.default_matmul_precision("highest"):
        zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(batch, batches[0]))
        total, _ = jax.lax.scan(add, zero, batches)
    return jax.tree.map(lambda leaf: leaf / len(batches), total)
