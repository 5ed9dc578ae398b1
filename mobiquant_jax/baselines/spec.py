"""What every baseline is told: the model, the width, the group size, and the block at hand."""

import math
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

WINDOWS_AT_ONCE = 8  # of a forward pass: enough to fill an accelerator, few enough for its memory


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
    """One block to quantize, for R models at once.

    Attributes:
        dense: its full-precision parameters.
        quantized: what each model's quantized blocks before it send in.
        target: what the full-precision model has after it.
        settings: the method's, each leaf ``[R]``.
        rngs: one a model, for methods that draw; seeded by the model's seed and the block's number.
    """

    dense: Params
    quantized: Float[Array, "R N T D"]
    target: Float[Array, "N T D"]
    settings: Any
    rngs: tuple[np.random.Generator, ...]


@dataclass(frozen=True, kw_only=True)
class BlockOutcome:
    """A quantized block of each of R models.

    Attributes:
        params: dense blocks whose kernels hold dequantized values; each leaf has a leading axis R.
        kept: what the method wants to remember of this block, a pytree with the same leading axis, or None.
    """

    params: Params
    kept: Any = None


def positions(x: Float[Array, "B T D"]) -> Int[Array, "B T"]:
    """Positions of windows, counted from 0."""
    return jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])


def in_batches(stream: Float[Array, "N T D"]) -> Float[Array, "N/B B T D"]:
    """Splits windows into batches as large as divides their number, at most `WINDOWS_AT_ONCE`."""
    return stream.reshape(-1, math.gcd(len(stream), WINDOWS_AT_ONCE), *stream.shape[1:])


@partial(jax.jit, static_argnums=0)
def block_forward(config: LlamaConfig, block: Params, stream: Float[Array, "N T D"]) -> Float[Array, "N T D"]:
    """A dense block applied to a stream in float32, a few windows at a time."""
    module = Block(config)

    def batch(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return module.apply({"params": block}, x, positions(x))[0]

    with jax.default_matmul_precision("highest"):  # accelerators would round the operands of float32 products
        return jax.lax.map(batch, in_batches(stream)).reshape(stream.shape)


@partial(jax.jit, static_argnums=0)
def blocks_forward(config: LlamaConfig, blocks: Params, streams: Float[Array, "R N T D"]) -> Float[Array, "R N T D"]:
    """`block_forward` of R models, each with its own block and stream."""
    return jax.vmap(partial(block_forward, config))(blocks, streams)
