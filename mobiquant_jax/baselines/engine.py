"""Block-by-block quantization over two activation streams, the same for every method.

The full-precision stream gives each block its target; the quantized stream gives it the inputs that the quantized
blocks before it really make. A method turns one dense block into another whose kernels hold dequantized values, so that
the result is a plain dense model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mobiquant_jax.baselines.kernels import Params
from mobiquant_jax.baselines.spec import BlockOutcome, BlockTask, QuantSpec, block_forward
from mobiquant_jax.models import Llama, LlamaConfig

QuantizeBlock = Callable[[BlockTask], BlockOutcome]


@dataclass(frozen=True, kw_only=True)
class QuantizedModel:
    """What a fixed-width method made of a model.

    Attributes:
        params: dense parameters, kernels dequantized, on the device.
        errors: mean squared error of each block's output against the full-precision stream; empty for a method that
            takes no data.
        kept: what the method kept of each block, stacked over layers, or None.
    """

    params: Params
    errors: tuple[float, ...] = ()
    kept: Any = None


def quantize_blocks(
    spec: QuantSpec,
    quantize_block: QuantizeBlock,
    params: Params,
    windows: Int[np.ndarray, "N T"],
    seed: int,
    on_block: Callable[[int, float], None] = lambda index, error: None,
) -> QuantizedModel:
    """Quantizes all blocks of a model in order.

    Args:
        spec: model, width and group size.
        quantize_block: the method; compiled once, it serves every block.
        params: the dense model's parameters; host arrays are fine, a block goes to the device at its turn.
        windows: calibration tokens.
        seed: of the methods that draw.
        on_block: called with the number of a finished block and its error.

    Raises:
        ValueError: a block's output is not finite.
    """
    full = _embed(spec.config, {"embedder": params["embedder"]}, jnp.asarray(windows))
    quantized = full
    outcomes, errors = [], []
    for index in range(spec.config.num_hidden_layers):
        dense = jax.tree.map(lambda leaf, index=index: jnp.asarray(leaf[index]), params["layers"])
        target = block_forward(spec.config, dense, full)
        rng = np.random.default_rng([seed, index])
        outcome = quantize_block(BlockTask(dense=dense, quantized=quantized, target=target, rng=rng))
        quantized, full = block_forward(spec.config, outcome.params, quantized), target
        errors.append(float(_mean_squared(quantized, target)))
        if not np.isfinite(errors[-1]):
            raise ValueError(f"the output of block {index} is not finite after quantization")
        outcomes.append(jax.device_get((outcome.params, outcome.kept)))
        on_block(index, errors[-1])
    layers, kept = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *outcomes)
    return QuantizedModel(params=with_layers(params, layers), errors=tuple(errors), kept=kept)


def with_layers(params: Params, layers: Params) -> Params:
    """A model's parameters on the device, with other blocks."""
    around = {name: jax.tree.map(jnp.asarray, part) for name, part in params.items() if name != "layers"}
    return {**around, "layers": layers}


@partial(jax.jit, static_argnums=0)
def _embed(config: LlamaConfig, params: Params, tokens: Int[Array, "N T"]) -> Any:
    """The stream that enters the first block."""
    return Llama(config).apply({"params": params}, tokens, method="embed")


@jax.jit
def _mean_squared(output: Float[Array, "N T D"], target: Float[Array, "N T D"]) -> Float[Array, ""]:
    return jnp.mean(jnp.square(output - target))
