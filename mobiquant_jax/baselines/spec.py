"""What every baseline is told: the model, the width, the group size."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mobiquant_jax.baselines.grid import check_bits
from mobiquant_jax.baselines.kernels import Params
from mobiquant_jax.models import Block, LlamaConfig
from mobiquant_jax.quant import check_group_size


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """A fixed-width quantization of all linears of all blocks.

    Attributes:
        config: architecture.
        bits: width of every weight, 2 to 8.
        group_size: inputs that share a scale and a zero point.
        dtype: type of the matmuls in training; statistics, streams and errors stay float32.
    """

    config: LlamaConfig
    bits: int
    group_size: int
    dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        """Checks the width and that the group size divides every linear's inputs."""
        check_bits(self.bits)
        for name, (in_features, _) in self.config.linear_shapes().items():
            try:
                check_group_size(in_features, self.group_size)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class BlockTask:
    """One block to quantize.

    Attributes:
        dense: its full-precision parameters.
        quantized: what the quantized blocks before it send in.
        target: what the full-precision model has after it.
        rng: for methods that draw; seeded by the run's seed and the block's number.
    """

    dense: Params
    quantized: Float[Array, "N T D"]
    target: Float[Array, "N T D"]
    rng: np.random.Generator


@dataclass(frozen=True, kw_only=True)
class BlockOutcome:
    """A quantized block.

    Attributes:
        params: a dense block whose kernels hold dequantized values.
        kept: what the method wants to remember of this block, a pytree, or None.
    """

    params: Params
    kept: Any = None


def positions(x: Float[Array, "B T D"]) -> Int[Array, "B T"]:
    """Positions of windows, counted from 0."""
    return jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])


@partial(jax.jit, static_argnums=0)
def block_forward(config: LlamaConfig, block: Params, stream: Float[Array, "N T D"]) -> Float[Array, "N T D"]:
    """A dense block applied to a stream in float32, a window at a time."""
    module = Block(config)

    def window(x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        return module.apply({"params": block}, x[None], positions(x[None]))[0][0]

    return jax.lax.map(window, stream)
