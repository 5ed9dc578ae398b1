"""Block-by-block quantization over two activation streams, the same for every method.

The full-precision stream gives each block its target; the quantized stream gives it the inputs that the quantized
blocks before it really make. A method turns one dense block into another whose kernels hold dequantized values, so that
the result is a plain dense model.

R models, which may differ in seed and in the numbers among their settings, share the full-precision stream and one
program: one block of a small model leaves most of an accelerator idle.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mobiquant_jax.baselines.kernels import Params
from mobiquant_jax.baselines.settings import stack_settings
from mobiquant_jax.baselines.spec import BlockOutcome, BlockTask, QuantSpec, block_forward, blocks_forward
from mobiquant_jax.models import Llama, LlamaConfig

QuantizeBlock = Callable[[BlockTask], BlockOutcome]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One model to make.

    Attributes:
        settings: of the method.
        seed: of what the method draws.
    """

    settings: Any
    seed: int = 0


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
    runs: Sequence[Run],
    on_block: Callable[[int, tuple[float, ...]], None] = lambda index, errors: None,
) -> list[QuantizedModel]:
    """Quantizes all blocks of a model in order, once for each run.

    Args:
        spec: model, width and group size.
        quantize_block: the method; compiled once, it serves every block.
        params: the dense model's parameters; host arrays are fine, a block goes to the device at its turn.
        windows: calibration tokens.
        runs: settings and seeds; the settings share their static fields.
        on_block: called with the number of a finished block and its error in each run.

    Returns:
        A model for each run.

    Raises:
        ValueError: runs that no single program can make, or a block whose output is not finite.
    """
    settings = stack_settings([run.settings for run in runs])
    full = _embed(spec.config, {"embedder": params["embedder"]}, jnp.asarray(windows))
    quantized = jnp.broadcast_to(full, (len(runs), *full.shape))
    outcomes, errors = [], []
    for index in range(spec.config.num_hidden_layers):
        dense = jax.tree.map(lambda leaf, index=index: jnp.asarray(leaf[index]), params["layers"])
        target = block_forward(spec.config, dense, full)
        rngs = tuple(np.random.default_rng([run.seed, index]) for run in runs)
        task = BlockTask(dense=dense, quantized=quantized, target=target, settings=settings, rngs=rngs)
        outcome = quantize_block(task)
        quantized, full = blocks_forward(spec.config, outcome.params, quantized), target
        errors.append(np.asarray(_mean_squared(quantized, target)))  # [R]
        if not np.isfinite(errors[-1]).all():
            run = runs[int(np.argmin(np.isfinite(errors[-1])))]
            raise ValueError(f"the output of block {index} is not finite after quantization with {run}")
        outcomes.append((outcome.params, outcome.kept))
        on_block(index, tuple(errors[-1].tolist()))
    layers, kept = jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *outcomes)  # [R, L, ...]
    return [
        QuantizedModel(
            params=with_layers(params, _pick(layers, number)),
            errors=tuple(float(error[number]) for error in errors),
            kept=_pick(kept, number),
        )
        for number in range(len(runs))
    ]


def with_layers(params: Params, layers: Params) -> Params:
    """A model's parameters on the device, with other blocks."""
    around = {name: jax.tree.map(jnp.asarray, part) for name, part in params.items() if name != "layers"}
    return {**around, "layers": layers}


def _pick(tree: Any, number: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[number], tree)


@partial(jax.jit, static_argnums=0)
def _embed(config: LlamaConfig, params: Params, tokens: Int[Array, "N T"]) -> Any:
    """The stream that enters the first block."""
    return Llama(config).apply({"params": params}, tokens, method="embed")


@jax.jit
def _mean_squared(outputs: Float[Array, "R N T D"], target: Float[Array, "N T D"]) -> Float[Array, " R"]:
    return jnp.mean(jnp.square(outputs - target), axis=(1, 2, 3))
