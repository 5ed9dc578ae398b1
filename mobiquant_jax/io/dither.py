"""Moving weights off the grid of a 4-bit file, so that 4-bit results on them are not flattered.

A model that ships as 4-bit blocks already lies on a 4-bit grid, and a quantizer that lines up with it looks better than
it is. Uniform noise of one step of that grid removes the advantage; the dithered copy is then the full-precision
reference.
"""

import numpy as np

from mobiquant_jax.io.names import Params
from mobiquant_jax.models.config import LlamaConfig

BLOCK = 32  # weights along the input that share a step in the file
STEPS = 15  # steps between the smallest and the largest of a block: 4 bits


def dither(params: Params, config: LlamaConfig, seed: int = 0) -> Params:
    """A dithered copy of every linear of every block.

        W += step (u - 1/2),  step = (max - min) / 15 of each 32 inputs,  u uniform in [0, 1)

    The noise is drawn in the order of the Hugging Face parameter names, in their layout ``[out, in]``: it is the
    same for anyone who starts from the same seed.

    Args:
        params: dense parameters, kernels ``[L, in, out]``; not changed.
        config: architecture.
        seed: of ``numpy.random.default_rng``.

    Raises:
        ValueError: 32 does not divide a linear's inputs.
    """
    rng = np.random.default_rng(seed)
    owner = {"attention": "self_attn", "mlp": "mlp"}
    kernels = {
        (layer, path): f"model.layers.{layer}.{owner[path.split('/')[0]]}.{path.split('/')[1]}.weight"
        for layer in range(config.num_hidden_layers)
        for path in config.linear_shapes()
    }
    layers = {part: dict(leaves) for part, leaves in params["layers"].items()}
    for path in config.linear_shapes():
        part, name = path.split("/")
        layers[part][name] = {"kernel": np.array(params["layers"][part][name]["kernel"], np.float32)}
    for (layer, path), _ in sorted(kernels.items(), key=lambda item: item[1]):
        part, name = path.split("/")
        weight = layers[part][name]["kernel"][layer].T  # [out, in], a view
        if weight.shape[1] % BLOCK:
            raise ValueError(f"{path}: {weight.shape[1]} inputs are no multiple of the dither's block of {BLOCK}")
        blocks = weight.reshape(weight.shape[0], -1, BLOCK)
        step = (blocks.max(axis=2, keepdims=True) - blocks.min(axis=2, keepdims=True)) / STEPS
        noise = rng.random(weight.shape, dtype=np.float32) - np.float32(0.5)
        weight += (step * noise.reshape(blocks.shape)).reshape(weight.shape)
    return {**params, "layers": layers}
