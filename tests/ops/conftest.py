"""Random weights for every backend, and float64 as their judge."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax import quant


@pytest.fixture
def stacked_weights():
    """A function that quantizes random kernels ``[layers, in, out]``, one for each of ``outputs``."""

    def make(rng, layers, inputs, outputs, group_size=128):
        quantize = jax.vmap(lambda kernel: quant.round_to_nearest(kernel, group_size))
        return [
            quantize(jnp.asarray(rng.normal(loc=0.3, size=(layers, inputs, out)).astype(np.float32))) for out in outputs
        ]

    return make


@pytest.fixture
def exact_product():
    """A function: each token times its segment's kernel at its depth, in float64."""

    def product(x, weights, depths, layer):
        parts = []
        for weight, depth in zip(weights, np.asarray(depths), strict=True):
            one = jax.tree.map(lambda leaf: leaf[layer], weight)
            part = np.full((len(depth), one.scale.shape[-1]), np.nan)
            for k in set(depth.tolist()):
                part[depth == k] = np.asarray(x, np.float64)[depth == k] @ np.asarray(one.dequantize(k), np.float64)
            parts.append(part)
        return np.concatenate(parts, axis=1)

    return product
